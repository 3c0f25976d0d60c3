"""The tabs for looking at data: samples, and the hard negatives of a batch."""

from collections.abc import Callable, Sequence
from typing import Any

from vlmo.app.browser import FILTERS, MOST_PAIRS, Browser, Sample
from vlmo.app.models import Models
from vlmo.app.parts import Parts
from vlmo.errors import InputError
from vlmo.pages import Html, image_uri, markup, table


def browse_tab(parts: Parts, browser: Browser) -> None:
    """Samples as they lie in the data and as a model sees them."""
    names = browser.names
    with parts.gr.Row():
        dataset = parts.gr.Dropdown(names, value=names[0], label="Data set and split")
        number = parts.gr.Number(0, label="Sample", precision=0, minimum=0)
        seed = parts.gr.Number(0, label="Epoch (seed of augmentation and masking)", precision=0, minimum=0)
    with parts.gr.Row():
        back = parts.gr.Button("←", min_width=60)
        show = parts.gr.Button("Show", variant="primary", min_width=60)
        forth = parts.gr.Button("→", min_width=60)
    with parts.gr.Accordion("Search and filter", open=False):
        words = parts.gr.Textbox(label="Text has these words")
        kept = parts.gr.Dropdown(list(FILTERS), value=FILTERS[0], label="Only those")
        look = parts.gr.Button("Search from the sample on")
        hits = parts.gr.Textbox(label="Found", interactive=False, lines=2)
    note = parts.note()
    images = parts.gr.Gallery(label="Before and after augmentation", columns=2, object_fit="contain", height="auto")
    text = parts.gr.Textbox(label="Text", interactive=False)
    tokens = parts.gr.HTML(label="Tokens", show_label=True)
    facts = parts.gr.HTML()
    outputs = [note, number, images, text, tokens, facts]

    def open_at(step: int) -> Callable[..., Any]:
        def work(name: str, at: float, epoch: float) -> Any:
            place = min(max(int(at or 0) + step, 0), browser.size(name) - 1) if step else int(at or 0)
            return place, *shown_sample(browser.sample(name, place, int(epoch or 0)))

        return work

    def search(name: str, text_has: str, only: str, at: float) -> Any:
        found, end = browser.find(name, text_has or "", only, int(at or 0))
        size = browser.size(name)
        told = ", ".join(map(str, found)) or "nothing"
        return f"{told} (looked at {int(at or 0):,} to {end - 1:,} of {size:,})", found[0] if found else int(at or 0)

    parts.on([show.click, number.submit, dataset.input], open_at(0), [dataset, number, seed], outputs)
    parts.on([back.click], open_at(-1), [dataset, number, seed], outputs)
    parts.on([forth.click], open_at(1), [dataset, number, seed], outputs)
    parts.on([look.click, words.submit], search, [dataset, words, kept, number], [note, hits, number])


def negatives_tab(parts: Parts, browser: Browser, models: Models) -> None:
    """What matching would set against each pair of a batch."""
    able = models.able("search")
    if not able:
        parts.gr.Markdown(
            models.why_not("search")
            or "Hard negatives are drawn by a contrast: start the page with a `--checkpoint` that has one."
        )
        return
    model = parts.gr.Dropdown(able, value=able[0], label="Checkpoint", visible=len(able) > 1)
    with parts.gr.Row():
        dataset = parts.gr.Dropdown(browser.names, value=browser.names[0], label="Data set and split")
        start = parts.gr.Number(0, label="First sample", precision=0, minimum=0)
        size = parts.gr.Slider(2, MOST_PAIRS, 8, step=1, label="Batch")
    draw = parts.gr.Button("Draw", variant="primary")
    note = parts.note()
    drawn = parts.gr.HTML()

    def work(name: str, data: str, first: float, count: float) -> Any:
        return negatives_table(browser.negatives(data, int(first or 0), int(count), models.get(name, "search")))

    parts.on([draw.click], work, [model, dataset, start, size], [note, drawn])


def tokens_line(tokens: Sequence[tuple[str, str]]) -> str:
    """Gives tokens as markup, with what becomes of each."""
    kinds = dict.fromkeys(kind for _, kind in tokens if kind)
    legend = " ".join(f'<span class="token {kind}">{kind}</span>' for kind in kinds)
    line = "".join(f'<span class="token {kind}">{markup(token)}</span>' for token, kind in tokens)
    return f"{line}<br><small>{legend}</small>"


def negatives_table(rows: Sequence[dict[str, Any]]) -> str:
    """Gives pairs with what was drawn against them, as markup."""

    def picture(image: Any) -> Html:
        return Html(f'<img alt="" style="width: 7em" src="{image_uri(image)}">')

    cells = [
        [
            picture(row["image"]),
            row["text"],
            f"{row['other text']} ({row['chance of text']:.0%})",
            Html(f"{picture(row['other image'])} ({row['chance of image']:.0%})"),
        ]
        for row in rows
    ]
    return table(["image", "text", "text drawn against it (chance)", "image drawn against it (chance)"], cells)


def shown_sample(found: Sample) -> tuple[Any, ...]:
    """Gives images with captions, text, tokens and facts, as the page shows them.

    Raises:
        InputError: for a sample that cannot be read, saying why.
    """
    if found.problem:
        raise InputError(f"Sample {found.facts['number']:,} cannot be read: {found.problem}")
    before = [(image, f"as it is, {image.width} x {image.height}") for image in found.before]
    after = [(image, f"as the model sees it, {image.width} x {image.height}") for image in found.after]
    return (
        [*before, *after],
        found.text,
        tokens_line(found.tokens),
        table(["", ""], found.facts.items(), plain=True),
    )
