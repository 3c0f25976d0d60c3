"""A few samples of a run's data with what its model says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets.base_dataset import BaseDataset
from vlmo.errors import InputError
from vlmo.images import UndecodableImage, decode_image
from vlmo.inference import Predictor
from vlmo.modules.model import VLMoModel
from vlmo.pages import image_uri
from vlmo.settings import Settings

COUNT = 12
BARS = 3  # answers that are shown of each
DRAWN = 320  # pixels of a picture of attention


def samples_of_checkpoint(checkpoint: Path, settings: Settings) -> list[dict[str, Any]]:
    """Makes the samples of a run from a checkpoint of it, as `sample_predictions` does.

    Raises:
        VLMoError: if the checkpoint cannot be loaded, or the data that the settings name are not there.
    """
    datamodule = MTDataModule(settings)
    datamodule.setup("test" if settings.test_only else "fit")
    return sample_predictions(VLMoModel.from_pretrained(checkpoint), datamodule, splits_of(settings))


def splits_of(settings: Settings) -> tuple[str, ...]:
    """Gives the splits that a run's samples may be of, held-out data first."""
    return ("test", "val") if settings.test_only else ("val", "test", "train")


def sample_predictions(
    model: VLMoModel, datamodule: MTDataModule, splits: Sequence[str], attention: bool = False
) -> list[dict[str, Any]]:
    """Gives samples evenly spread over the first of the splits that has any, as a report shows them.

    Args:
        attention: adds a picture of where all words together look, of the last layer.

    Returns:
        {"images": data URIs, "text", "truth": lines, "answers": [{"what", "bars": [[text, score]]}]} each; none
        without texts or a model that predicts anything of them.
    """
    found = next((parts for split in splits if (parts := datamodule.opened(split))), {})
    datasets = [each for each in found.values() if isinstance(each, BaseDataset)]
    if not datasets:
        return []
    was_training = model.training
    decoding: Any = datasets[0].image_decoding
    predictor = Predictor(model, device=next(model.parameters()).device, image_decoding=decoding)
    try:
        with torch.compiler.set_stance("force_eager"):  # (nobody waits for a compiler to see twelve pictures)
            return _predictions(predictor, [_read(*each) for each in _spread(datasets)], attention)
    finally:
        model.train(was_training)


def _spread(datasets: Sequence[BaseDataset]) -> list[tuple[BaseDataset, int]]:
    ends = np.cumsum([len(each) for each in datasets])
    numbers = np.unique(np.linspace(0, ends[-1] - 1, min(COUNT, int(ends[-1]))).round().astype(int))
    parts = np.searchsorted(ends, numbers, side="right")
    return [
        (datasets[part], int(number - (ends[part] - len(datasets[part]))))
        for part, number in zip(parts, numbers, strict=True)
    ]


def _read(dataset: BaseDataset, number: int) -> dict[str, Any] | None:
    """The images, the text and what is known of a sample; None if an image cannot be decoded."""
    location = dataset.tables.text(number)
    images: list[Image.Image] = []
    for column in dataset.image_columns:
        if column not in dataset.wanted:
            continue
        try:
            images.append(decode_image(location.scalar(column).as_buffer(), dataset.image_decoding))
        except UndecodableImage:
            return None
    return {"images": images, "text": dataset.text(location), "truth": _truth(dataset.targets(location))}


def _truth(targets: dict[str, Any]) -> list[str]:
    """What people can read of a sample's targets."""
    lines = []
    for name, value in targets.items():
        if name == "answered":  # (whether anything is known, which the lines themselves show)
            continue
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            lines.append(f"{name.replace('_', ' ')}: {', '.join(dict.fromkeys(value))}")
        elif isinstance(value, bool) or (isinstance(value, str) and value):
            lines.append(f"{name.replace('_', ' ')}: {value}")
    return lines


def _predictions(
    predictor: Predictor, samples: Sequence[dict[str, Any] | None], attention: bool
) -> list[dict[str, Any]]:
    read = [each for each in samples if each]
    shown = [
        {"images": list(map(image_uri, each["images"])), "text": each["text"], "truth": each["truth"], "answers": []}
        for each in read
    ]
    for task in predictor.model.tasks:
        for use in task.uses:
            for sample, place in zip(read, shown, strict=True):
                answer = _answer(predictor, use, sample)
                place["answers"] += [answer] if answer else []
    if any(task.provides == "contrast" for task in predictor.model.tasks) and len(read) > 1:
        _rank(predictor, read, shown)
    if attention and all(len(each["images"]) == 1 for each in read) and "pair" in _paths(predictor):
        for sample, place in zip(read, shown, strict=True):
            drawn = predictor.attention(sample["images"][0], sample["text"]).picture(longer_side=DRAWN)
            place["images"].append(image_uri(drawn))
    return shown


def _paths(predictor: Predictor) -> set[str]:
    return {path for task in predictor.model.tasks for path in task.paths}


def _answer(predictor: Predictor, use: Any, sample: dict[str, Any]) -> dict[str, Any] | None:
    """What a task offers, of one sample; None where it has not what that needs."""
    images, given = list(sample["images"]), {}
    text, note = sample["text"], ""
    if use.name == "fill_mask":
        word = max(text.split(), key=len, default="")
        text, note = text.replace(word, "[MASK]", 1), f" for {word!r}"
    for column in (*use.columns, *use.optional):
        if not column.startswith("image"):
            given[column] = text
        elif images:
            given[column] = images.pop(0)
        elif column in use.columns:
            return None
    try:
        top_k = {"top_k": BARS} if "top_k" in use.options else {}
        result = getattr(predictor, use.name)(**given, **top_k)
    except InputError:  # such as a word that is cut off
        return None
    if isinstance(result, float):
        bars = [["", result]]
    else:
        best = result[0] if result and isinstance(result[0], list) else result
        bars = [[each.text, each.score] for each in best[:BARS]]
    return {"what": f"{use.result.replace('_', ' ')}{note}", "bars": bars}


def _rank(predictor: Predictor, read: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> None:
    """Which of these texts goes best with each image."""
    ranking = predictor.rank([each["images"][0] for each in read], [each["text"] for each in read])
    for number, place in enumerate(shown):
        order = ranking.texts[number].tolist()
        bars = [[read[other]["text"], max(float(ranking.scores[number, other]), 0)] for other in order[:BARS]]
        place["answers"].append(
            {"what": f"nearest of {len(read)} texts; its own is number {order.index(number) + 1}", "bars": bars}
        )
