"""What travels with the weights, so that a checkpoint can be used without the data that it was trained on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from vlmo.errors import VLMoError


class Metadata(pydantic.BaseModel):
    """The options (`vlmo/config.py`) that shape the weights and their use, and the names of words and answers.

    Attributes:
        answers: of each label of the VQA head, "" where it was never seen; None if it has none, or they are not known.
        vocabulary: the tokenizer's words in the order of their ids, None if not known.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    model_arch: str
    image_size: int
    max_text_len: int
    max_text_len_of_initckpt: int
    vocab_size: int
    vqav2_label_size: int
    loss_names: dict[str, float]
    tokenizer: str
    shared_ffn: bool = False
    answers: list[str] | None = None
    vocabulary: list[str] | None = None

    @classmethod
    def from_dict(cls, content: Any, path: Path) -> "Metadata":
        """Checks what a file holds. Raises VLMoError, naming `path`, if it is not what was written."""
        try:
            return cls.model_validate(content)
        except pydantic.ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "all of it"
            raise VLMoError(
                f"{path}: what it says of the model is damaged ({where}: {error.errors()[0]['msg']}); copy or download "
                "it again"
            ) from error

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return self.model_dump(exclude={"answers", "vocabulary"})

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives that the weights were trained with."""
        return tuple(name for name, weight in self.loss_names.items() if weight)


OPTIONS = tuple(name for name in Metadata.model_fields if name not in ("answers", "vocabulary"))


def options_of(settings: Any) -> dict[str, Any]:
    """The options that `Metadata` holds, from `Settings`."""
    return {name: getattr(settings, name) for name in OPTIONS}


def vocabulary_hash(vocabulary: Sequence[str]) -> str:
    """SHA-256 of a vocabulary: that of its vocab.txt with a newline after each word."""
    return hashlib.sha256("".join(f"{word}\n" for word in vocabulary).encode()).hexdigest()


def first_mismatch(saved: Sequence[str], current: Sequence[str]) -> str | None:
    """Where the names in a checkpoint contradict those in use, in words; None if nowhere.

    An empty name is an unknown one, and fewer current names than saved ones are no contradiction.
    """
    for number, name in enumerate(current):
        if name and number >= len(saved):
            return f"number {number} is {name!r} here, and the file has {len(saved)}"
        if name and saved[number] not in ("", name):
            return f"number {number} is {saved[number]!r} in the file and {name!r} here"
    return None


def incompatibilities(
    saved: Metadata | None, answers: Sequence[str] | None, vocabulary: Sequence[str] | None, path: str | Path
) -> list[str]:
    """One line each where what a checkpoint holds and what is in use differ; what one of them lacks is no difference.

    Args:
        saved: of the checkpoint.
        answers: in use, if the VQA head is.
        path: of the checkpoint, for the lines.
    """
    problems = []
    if saved and saved.answers and answers and (where := first_mismatch(saved.answers, answers)):
        problems.append(
            f"{path}: was trained with other VQA answers: {where}; "
            "use the tables and the vqav2_answers.json that it was trained with"
        )
    if saved and saved.vocabulary and vocabulary and (where := first_mismatch(saved.vocabulary, vocabulary)):
        problems.append(
            f"{path}: was trained with another vocabulary: word {where}; its tokenizer was {saved.tokenizer} "
            f"(SHA-256 of vocab.txt {vocabulary_hash(saved.vocabulary)[:12]}...): give that with tokenizer="
        )
    return problems
