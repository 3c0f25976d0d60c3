"""What people hand in: pictures in many forms, and the names of a model's outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vlmo.checkpoints.metadata import incompatibilities
from vlmo.datasets.checks import read_answers_file
from vlmo.datasets.image import UndecodableImage, decode_image, to_upright_rgb
from vlmo.datasets.text import load_tokenizer, tokenizer_of, vocabulary_of
from vlmo.errors import VLMoError
from vlmo.modules import VLMo

if TYPE_CHECKING:
    from transformers import BertTokenizer


class InputError(VLMoError):
    """One input cannot be used; others may be."""


def load_image(image: Any) -> Image.Image:
    """An RGB picture, by the rules of `decode_image`.

    Args:
        image: path; bytes of an image file; Pillow image; array (H, W), (H, W, 3 or 4) or tensor (3, H, W) or (H, W),
            uint8, or floats in [0, 1].

    Raises:
        InputError: if it is none of these, or cannot be decoded.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if isinstance(image, Image.Image):
        try:
            return to_upright_rgb(image)
        except OSError as error:  # Pillow reads a file's pixels only now
            raise InputError(f"this Pillow image cannot be decoded ({error})") from error
    if not isinstance(image, str | Path | bytes):
        raise InputError(f"an image is a path, a Pillow image, an array or a tensor, not {type(image).__name__}")
    try:
        return decode_image(image if isinstance(image, bytes) else Path(image).expanduser().read_bytes())
    except OSError as error:
        raise InputError(f"{image!s}: cannot be read ({error.strerror or error})") from error
    except UndecodableImage as error:
        name = "these bytes" if isinstance(image, bytes) else image
        raise InputError(f"{name}: is no image that can be decoded ({error})") from error


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or not values.size:
        raise InputError(f"an array must be (H, W), (H, W, 3) or (H, W, 4), a tensor (3, H, W); not {values.shape}")
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):
            raise InputError("an image of floats must be in [0, 1]")
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise InputError(f"an image must be uint8 or floats in [0, 1], not {values.dtype}")
    return Image.fromarray(values)


def choose_tokenizer(model: VLMo, name_or_path: str | Path | None) -> "BertTokenizer":
    """The tokenizer that is given, which must be the model's; else of the vocabulary in the checkpoint, else by name.

    Raises:
        VLMoError: if there is none, or it is not the one that the model was trained with.
    """
    if name_or_path is None and model.vocabulary:
        return tokenizer_of(model.vocabulary)
    tokenizer = load_tokenizer(name_or_path or model.settings.tokenizer)
    problems = incompatibilities(model.metadata, None, vocabulary_of(tokenizer), "this checkpoint")
    if len(tokenizer) > model.settings.vocab_size:
        problems.append(
            f"tokenizer: has {len(tokenizer)} words, the model {model.settings.vocab_size}; give the model's"
        )
    if problems:
        raise VLMoError("\n".join(problems))
    return tokenizer


def choose_answers(model: VLMo, answers: Sequence[str] | str | Path | None) -> list[str] | None:
    """The VQA answers that are given, which must be the model's; else those in the checkpoint.

    Args:
        answers: in the order of their labels, or a JSON file with that list (`vqav2_answers.json`).

    Raises:
        VLMoError: if the file is not such a list, or they are not those that the model was trained with.
    """
    if answers is None:
        return model.answers
    if isinstance(answers, str | Path):
        answers = read_answers_file(Path(answers).expanduser())
    problems = incompatibilities(model.metadata, answers, None, "this checkpoint")
    if problems:
        raise VLMoError("\n".join(problems))
    return list(answers)
