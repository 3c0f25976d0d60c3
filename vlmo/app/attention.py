"""Where words look, as pictures: one for each layer, with the figures where patches are few."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from vlmo.inference import AttentionMap
from vlmo.inference.attention_maps import FIELDS

ALL_WORDS = "all words"
SIDE = 360  # pixels of a picture's longer side


def choices(shown: AttentionMap) -> list[str]:
    """Names the tokens, numbered, as a word may come twice; all together first."""
    return [ALL_WORDS, *(f"{number}: {token}" for number, token in enumerate(shown.tokens))]


def token_of(choice: str | None) -> int | None:
    """Gives the number of the token that was picked; None for all together."""
    number = (choice or "").partition(":")[0]
    return int(number) if number.isdecimal() else None


def layer_pictures(shown: AttentionMap, choice: str | None) -> list[tuple[Image.Image, str]]:
    """Draws each layer, with a caption: how much of the word's attention goes to the image."""
    return [_layer(shown, token_of(choice), place) for place in range(len(shown.layers))]


def _layer(shown: AttentionMap, token: int | None, place: int) -> tuple[Image.Image, str]:
    tokens: Sequence[int] = list(range(len(shown.tokens))) if token is None else [token]
    if token is None and len(tokens) > 2:
        tokens = tokens[1:-1]
    weights = shown.weights[place].mean(0)[list(tokens)].mean(0)
    picture = shown.picture(token, place, longer_side=SIDE)
    if len(weights) <= FIELDS:
        _write_shares(picture, weights.tolist())
    return picture, f"layer {shown.layers[place] + 1}: {float(weights.sum()):.0%} on the image"


def _write_shares(picture: Image.Image, weights: Sequence[Sequence[float]]) -> None:
    """Writes each patch's share into its field."""
    draw = ImageDraw.Draw(picture)
    rows, columns = len(weights), len(weights[0])
    for row, line in enumerate(weights):
        for column, weight in enumerate(line):
            x, y = (column + 0.5) * picture.width / columns, (row + 0.5) * picture.height / rows
            size = min(picture.width / columns, picture.height / rows) / 4
            draw.text(
                (x, y), f"{weight:.0%}", "white", anchor="mm", font_size=size, stroke_width=2, stroke_fill="black"
            )
