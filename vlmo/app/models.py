"""The checkpoints of the page: what each can do, and what it cannot and why."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmo.checkpoints.pretrained import resolve_path
from vlmo.errors import InputError, VLMoError
from vlmo.inference import Predictor
from vlmo.inference.uses import find_use

WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt")
# what a visitor can do, by name: the title of its tab, and the sentence above it
ABILITIES = {
    "answer": ("Question", "Ask a question of an image."),
    "match": ("Match", "Does a text fit an image?"),
    "search": ("Search", "Find images by a text or by an image."),
    "compare": ("Two images", "Is a statement true of two images?"),
    "fill_mask": ("Mask", "Fill in a masked word, of a text alone or beside an image."),
    "attention": ("Attention", "Where in the image does each word look, layer by layer?"),
    "classify": ("Classify", "Which of these classes is it? By the names alone, without training."),
}
CONTRASTS = ("search", "classify")


class LoadedModel:
    """One checkpoint.

    Attributes:
        name: short, for people.
        key: of its files, by which what is computed with it is kept.
    """

    def __init__(self, name: str, predictor: Predictor, key: str) -> None:
        self.name, self.predictor, self.key = name, predictor, key

    @classmethod
    def load(cls, checkpoint: str, **options: Any) -> "LoadedModel":
        """Loads a file, folder or hub name; `options` are those of `Predictor.from_pretrained`."""
        path = resolve_path(checkpoint)
        predictor = Predictor.from_pretrained(path, **options)
        return cls(short_name(path), predictor, key_of(path))

    def cannot(self, ability: str) -> str:
        """Why the checkpoint cannot do that, in a sentence; "" if it can."""
        model = self.predictor.model
        try:
            if ability in CONTRASTS:
                for head in ("itc_text_proj", "itc_image_proj"):
                    self.predictor.require_head(head, "comparing images with texts")
            elif ability == "attention":
                if not any("vl" in task.experts and task.has_text for task in model.tasks):
                    raise VLMoError("attention of words needs a checkpoint that was trained on images with texts")
            else:
                use = find_use(model, ability)
                if use is None:
                    raise VLMoError(f"no task that is known here offers {ability}")
                self.predictor.require_head(use.head, use.purpose)
                if ability == "answer" and not self.predictor.answers:
                    raise VLMoError("the checkpoint does not hold the names of its answers: give --answers FILE")
        except VLMoError as error:
            return str(error)
        return ""


class Models:
    """All checkpoints of the page, by name."""

    def __init__(self, loaded: Iterable[LoadedModel]) -> None:
        self.by_name: dict[str, LoadedModel] = {}
        for each in loaded:
            name, number = each.name, 2
            while name in self.by_name:
                name, number = f"{each.name} ({number})", number + 1
            self.by_name[name] = each

    def able(self, ability: str) -> list[str]:
        """Names of the checkpoints that can do that."""
        return [name for name, each in self.by_name.items() if not each.cannot(ability)]

    def why_not(self, ability: str) -> str:
        """A sentence for each checkpoint that cannot."""
        reasons = {name: each.cannot(ability) for name, each in self.by_name.items()}
        return "\n\n".join(f"**{name}** cannot do this: {reason}." for name, reason in reasons.items() if reason)

    def get(self, name: str | None, ability: str) -> Predictor:
        """Gives the one that was picked. Raises InputError if it cannot do that."""
        able = self.able(ability)
        picked = name or (able[0] if able else "")
        if picked not in self.by_name:
            raise InputError(self.why_not(ability) or "no checkpoint was given: start the page with --checkpoint CKPT")
        if reason := self.by_name[picked].cannot(ability):
            raise InputError(reason)
        return self.by_name[picked].predictor


def short_name(path: Path) -> str:
    """Names a checkpoint: LOG_DIR/NAME/version_K/checkpoints/last.ckpt is NAME/version_K."""
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.parent.name}/{path.parent.parent.name}"
    return path.name


def key_of(path: Path) -> str:
    """Gives the SHA-256 of a checkpoint's files together."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in WEIGHTS)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def as_bars(predictions: Iterable[Any]) -> Mapping[str, float]:
    """Gives predictions as bars are drawn of them; of equal texts the likeliest."""
    bars: dict[str, float] = {}
    for text, score in predictions:
        bars.setdefault(text or '""', float(score))
    return bars
