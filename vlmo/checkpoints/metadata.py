"""What travels with the weights, so that a checkpoint can be used without the data that it was trained on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmo.errors import VLMoError
from vlmo.registry import TASKS

METADATA_KEY = "vlmo"  # in Lightning's files
# options that shape the weights and their use, whatever the task, and their types
OPTIONS: dict[str, type] = {
    "model_arch": str,
    "image_size": int,
    "max_text_len": int,
    "max_text_len_of_initckpt": int,
    "vocab_size": int,
    "shared_ffn": bool,
    "tokenizer": str,
    "loss_names": dict,
}


@dataclass(frozen=True)
class Metadata:
    """Options, and the names of classes and tokens.

    Attributes:
        options: those of `OPTIONS`, and the tasks' that give the size of a head, by name.
        answers: name of each class of the task whose data say them, "" where it was never seen; None if there is no
            such task, or they are not known.
        vocabulary: the tokenizer's tokens in the order of their ids, None if not known.
    """

    options: dict[str, Any]
    answers: list[str] | None = field(default=None)
    vocabulary: list[str] | None = field(default=None)

    @classmethod
    def from_dict(cls, content: Any, path: Path) -> "Metadata":
        """Checks what a file holds. Raises VLMoError, naming `path`, if it is not what was written."""
        content = content if isinstance(content, Mapping) else {}
        kinds = OPTIONS | dict.fromkeys(size_options(), int)
        options = {"shared_ffn": False} | {name: content[name] for name in kinds if name in content}
        wrong = [name for name in OPTIONS if name not in options]
        wrong += [name for name, value in options.items() if not isinstance(value, kinds[name])]
        wrong += [name for name in ("answers", "vocabulary") if not _is_names(content.get(name))]
        weights = options.get("loss_names")
        if not isinstance(weights, dict) or not all(isinstance(each, int | float) for each in weights.values()):
            wrong.append("loss_names")
        if wrong:
            raise VLMoError(f"{path}: what it says of the model is damaged ({wrong[0]}); copy or download it again")
        return cls(options, content.get("answers"), content.get("vocabulary"))

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values, as files hold them."""
        content = asdict(self)
        return content.pop("options") | content

    def replace(self, **changes: Any) -> "Metadata":
        """Gives the same with other options or names."""
        names = {name: changes.pop(name) for name in ("answers", "vocabulary") if name in changes}
        return replace(self, options=self.options | changes, **names)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the weights were trained with."""
        return tuple(name for name, weight in self.options["loss_names"].items() if weight)

    @property
    def num_answers(self) -> int:
        """How many classes the task has whose names the data say; 0 without such a task."""
        own = (TASKS[name].sized_by.values() for name in self.tasks if name in TASKS and TASKS[name].stage is None)
        return next((self.options[option] for options in own for option in options), 0)


def size_options() -> set[str]:
    """Gives the names of the tasks' options that give the size of a head."""
    return {option for task in TASKS.values() for option in task.sized_by.values()}


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def vocabulary_hash(vocabulary: Sequence[str]) -> str:
    """Gives the SHA-256 of a vocabulary: that of its vocab.txt with a newline after each token."""
    return hashlib.sha256("".join(f"{token}\n" for token in vocabulary).encode()).hexdigest()


def first_mismatch(saved: Sequence[str], current: Sequence[str]) -> str | None:
    """Says where the names in a checkpoint contradict those in use; None if nowhere.

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
    """Gives a line for each contradiction between a checkpoint and what is in use; what one of them lacks is none.

    Args:
        saved: of the checkpoint.
        answers: names of the classes in use, if there are any.
        path: of the checkpoint, for the lines.
    """
    problems = []
    if saved and saved.answers and answers and (where := first_mismatch(saved.answers, answers)):
        problems.append(
            f"{path}: was trained with other answers: {where}; use the tables and the file of answers that it was "
            "trained with"
        )
    elif saved and answers and 0 < saved.num_answers < len(answers):
        problems.append(f"{path}: has {saved.num_answers} answers, not the {len(answers)} given; give its training's")
    if saved and saved.vocabulary and vocabulary and (where := first_mismatch(saved.vocabulary, vocabulary)):
        problems.append(
            f"{path}: was trained with another vocabulary: token {where}; give its tokenizer with tokenizer=: "
            f"{saved.options['tokenizer']} (SHA-256 of vocab.txt {vocabulary_hash(saved.vocabulary)[:12]}...)"
        )
    return problems


def resumed_names(
    checkpoint: Mapping[str, Any], answers: list[str] | None, vocabulary: list[str] | None
) -> tuple[list[str] | None, list[str] | None]:
    """Gives the names of classes and tokens with which a run goes on: those in use, else those of the checkpoint.

    Raises:
        VLMoError: if they contradict each other.
    """
    if METADATA_KEY not in checkpoint:
        return answers, vocabulary
    saved = Metadata.from_dict(checkpoint[METADATA_KEY], Path("the checkpoint to resume from"))
    problems = incompatibilities(saved, answers, vocabulary, "the checkpoint to resume from")
    if problems:
        raise VLMoError("\n".join(problems))
    return answers or saved.answers, vocabulary or saved.vocabulary
