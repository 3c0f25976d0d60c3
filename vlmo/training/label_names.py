"""The names of a run's outputs and words: the data's, which must be those that a loaded checkpoint was trained with."""

import logging

from vlmo.checkpoints.metadata import Metadata, incompatibilities
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets.text import vocabulary_of
from vlmo.errors import VLMoError
from vlmo.settings import Settings

log = logging.getLogger(__name__)


def resolve_label_names(
    settings: Settings, datamodule: MTDataModule, loaded: Metadata | None
) -> tuple[list[str] | None, list[str] | None]:
    """The answer of each VQA label (None without VQA, or where nobody says); the tokenizer's words (None in stage 1).

    Evaluation takes the answers from the checkpoint, so that it needs no training data; training takes the data's.

    Args:
        loaded: what the file at `load_path` says of itself.

    Raises:
        VLMoError: in evaluation, if the file was trained with other answers or words. Training warns: it learns anew.
    """
    vocabulary = None if "mim" in settings.active else vocabulary_of(datamodule.tokenizer)
    answers = datamodule.vqa_answers() if "vqa" in settings.active else None
    problems = incompatibilities(loaded, answers, vocabulary, settings.load_path)
    if problems and settings.test_only:
        raise VLMoError("\n".join(problems))
    for problem in problems:
        log.warning(problem)
    saved = loaded.answers if loaded and "vqa" in settings.active else None
    answers = saved or answers if settings.test_only else answers or saved
    if "vqa" in settings.active and settings.test_only and not answers:
        log.warning(
            f"{settings.load_path}: does not hold its answers, and there is no vqav2_answers.json in data_root: "
            "no prediction file is written"
        )
    return answers, vocabulary
