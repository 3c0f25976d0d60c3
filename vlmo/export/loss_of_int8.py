"""What INT8 costs: recall, accuracy and agreement of an export, beside the model that it is of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmo.inference.io import Row
from vlmo.inference.predictor import Predictor
from vlmo.inference.uses import find_use

TRUTH = "label"  # column of a row with what is right


def losses(
    model: Predictor, exported: Predictor, columns: dict[str, tuple[str, ...]], rows: Sequence[Row]
) -> list[str]:
    """Gives a line for each method: what the model and the export say of rows that have its columns."""
    lines = []
    for name, needed in columns.items():
        own = [row for row in rows if all(column in row for column in needed)]
        if find_use(model.model, name) and own:
            lines.append(f"{name}: {_decisions(model, exported, name, needed, own)}")
        elif own:
            features = [getattr(each, name)([row[needed[0]] for row in own]) for each in (model, exported)]
            cosine = (features[0] * features[1]).sum(-1)
            said = f"cosine to the model's features {cosine.mean():.4f}, least {cosine.min():.4f}"
            lines.append(f"{name}: {said} ({len(own)} rows)")
    pairs = [row for row in rows if "image" in row and "text" in row]
    if {"embed_images", "embed_texts"} <= set(columns) and len(pairs) > 1:
        for way, before, after in zip(
            ("image to text", "text to image"), *_recalls(model, exported, pairs), strict=True
        ):
            lines.append(f"recall@1 {way}: {_change(before, after)} ({len(pairs)} pairs)")
    return lines


def _change(before: float, after: float) -> str:
    return f"{100 * before:.2f} % -> {100 * after:.2f} % ({100 * (after - before):+.2f} points)"


def _decisions(model: Predictor, exported: Predictor, name: str, columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Compares which results are best (of probabilities: above a half), and how sure both are."""
    given = {column: [row[column] for row in rows] for column in columns}
    both = [[_decision(result) for result in getattr(each, name)(**given)] for each in (model, exported)]
    agree = [a[0] == b[0] for a, b in zip(*both, strict=True)]
    apart = [abs(a[1] - b[1]) for a, b in zip(*both, strict=True)]
    said = f"same result {100 * sum(agree) / len(agree):.2f} %, score apart {sum(apart) / len(apart):.4f} in the mean"
    if all(TRUTH in row for row in rows):
        right = [
            sum(_is(each[0], row[TRUTH]) for each, row in zip(side, rows, strict=True)) / len(rows) for side in both
        ]
        said = f"accuracy {_change(*right)}, {said}"
        truths = [_is(True, row[TRUTH]) for row in rows]
        if isinstance(both[0][0][0], bool) and 0 < sum(truths) < len(truths):
            areas = [_area([score for _, score in side], truths) for side in both]
            said = f"area under the ROC curve {_change(*areas)}, {said}"
    return f"{said} ({len(rows)} rows)"


def _decision(result: Any) -> tuple[Any, float]:
    if isinstance(result, float):
        return result > 0.5, result
    return result[0].text, result[0].score


def _is(decision: Any, label: Any) -> bool:
    if isinstance(decision, bool):
        return decision == (str(label).lower() in ("true", "1", "yes"))
    return decision == label


def _area(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """Gives how often a row that is true scores above one that is not, whatever score would divide them."""
    true, false = (
        torch.tensor([s for s, t in zip(scores, truths, strict=True) if t is side]) for side in (True, False)
    )
    above, equal = true[:, None] > false, true[:, None] == false
    return (above.float() + equal.float() / 2).mean().item()


def _recalls(model: Predictor, exported: Predictor, pairs: Sequence[Row]) -> list[tuple[float, float]]:
    images = list(dict.fromkeys(pair["image"] for pair in pairs))
    texts = list(dict.fromkeys(pair["text"] for pair in pairs))
    fits = torch.zeros(len(images), len(texts), dtype=torch.bool)
    for pair in pairs:
        fits[images.index(pair["image"]), texts.index(pair["text"])] = True
    scores = [each.rank(images, texts).scores for each in (model, exported)]
    return [(_recall(each, fits), _recall(each.t(), fits.t())) for each in scores]


def _recall(scores: Tensor, fits: Tensor) -> float:
    return fits.gather(1, scores.argmax(1, keepdim=True)).float().mean().item()
