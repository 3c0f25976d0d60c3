"""A trained model at work: embeds, ranks, classifies, shows where it looks, and does what its tasks offer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmo import plugins as plugin_modules
from vlmo.checkpoints.metadata import incompatibilities
from vlmo.checkpoints.pretrained import metadata_of
from vlmo.errors import InputError, VLMoError
from vlmo.inference.attention_maps import AttentionMap, text_to_patches
from vlmo.inference.io import load_image
from vlmo.inference.uses import bind, broadcast, find_use, registered_uses, uses_of
from vlmo.label_names import read_label_names
from vlmo.modules.model import VLMoModel
from vlmo.text import Tokenizer, load_tokenizer, tokenize, tokenizer_of, vocabulary_of
from vlmo.transforms import square_transform

READERS = 4  # threads that decode and resize images


class Prediction(NamedTuple):
    """An answer, a token or a class, and how sure the model is of it, in [0, 1]."""

    text: str
    score: float


class Ranking(NamedTuple):
    """How well each of I images goes with each of T texts.

    Attributes:
        scores: (I, T), cosine of their features.
        images: (T, I), for each text the numbers of the images, best first.
        texts: (I, T), for each image the numbers of the texts, best first.
    """

    scores: Tensor
    images: Tensor
    texts: Tensor


class Predictor:
    """Uses a loaded model.

    An image is a path, a Pillow image, an array (H, W, 3) or a tensor (3, H, W) of uint8 or of floats in [0, 1], or the
    bytes of an image file. Beside the methods below there are those that the tasks offer (`Task.uses`; `dir` lists
    them): `match`, `fill_mask`, ... They take one input and give one result, or take lists and give a list (one image
    goes with each of many texts, and so on); lists are worked off in batches.

    Every method raises VLMoError if the checkpoint lacks the head it needs, and InputError, which is one, for an input
    that cannot be used.
    """

    def __init__(
        self,
        model: VLMoModel,
        tokenizer: str | Path | None = None,
        answers: Sequence[str] | str | Path | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        image_decoding: Literal["correct", "original"] = "correct",
    ) -> None:
        """
        Args:
            tokenizer: hub name, folder or vocab.txt; None: the vocabulary in the checkpoint, else the name in it. A
                model of images alone needs none.
            answers: in the order of their labels, or the JSON file with them; None: those in the checkpoint.
            device: None: the GPU if there is one, else the CPU.
            image_decoding: "original" shows released weights images as they were trained on them (see `decode_image`).

        Raises:
            VLMoError: if the tokenizer or the device cannot be had, or tokenizer or answers are not the training's.
        """
        self.model = model.eval()
        chosen = _choose_tokenizer(model, tokenizer) if hasattr(model, "text_embeddings") else None
        self.tokenizer: Any = chosen
        self.answers = _choose_answers(model, answers)
        self.vocabulary = [] if chosen is None else vocabulary_of(chosen)
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model.to(self.device)
        except (RuntimeError, AssertionError) as error:  # no such device, or a torch built without it
            raise VLMoError(f"device={device}: {str(error).splitlines()[0]}") from error
        if image_decoding not in ("correct", "original"):
            raise VLMoError(f"image_decoding={image_decoding!r}: must be 'correct' or 'original'")
        self.batch_size, self.image_decoding = batch_size, image_decoding
        self._transform = square_transform(model.image_size)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        tokenizer: str | Path | None = None,
        answers: Sequence[str] | str | Path | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        plugins: Iterable[str] = (),
        image_decoding: Literal["correct", "original"] = "correct",
        **options: Any,
    ) -> "Predictor":
        """Loads a file, folder or hub name.

        Args:
            plugins: modules to import first, which bring the tasks of the checkpoint.
            options: `task`, `image_size`, ... of `VLMoModel.from_pretrained`.
        """
        plugin_modules.load(plugins)
        model = VLMoModel.from_pretrained(path_or_hub_id, **options)
        return cls(model, tokenizer, answers, device, batch_size, image_decoding)

    # --- what tasks offer --------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        use = find_use(self.model, name) if "model" in vars(self) else None
        if use is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}, and no task offers it")
        return bind(use, self)

    @property
    def offers(self) -> list[str]:
        """Names of the methods that the model has the heads for, among those that take rows of inputs."""
        sides = {"embed_images": "itc_image_proj", "embed_texts": "itc_text_proj"}
        return [*(name for name, head in sides.items() if hasattr(self.model, head)), *uses_of(self.model)]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *registered_uses()})

    def require_head(self, head: str, purpose: str) -> None:
        """Raises VLMoError if the model lacks a head, saying what it is needed for, such as "answering"."""
        if not hasattr(self.model, head):
            present = ", ".join(task.name for task in self.model.tasks)
            raise VLMoError(f"{purpose} needs a checkpoint with {head}; this one was trained for {present}")

    @torch.inference_mode()
    def compute(self, function: Callable[[VLMoModel, Mapping[str, Any]], Tensor], **columns: Any) -> Tensor:
        """Gives `function(model, batch)` of every batch of the inputs, concatenated, float32 on the CPU.

        Args:
            columns: lists of one length, or one value for all rows; None for what is not given. A column that is called
                "image..." is of images and in the batch under its name, (B, 3, size, size); another one, such as
                "text", is of texts and in the batch as `text_ids` and `text_masks`, (B, T).
        """
        return self.collect(lambda batch: function(self.model, batch), columns)

    def collect(self, function: Callable[[Mapping[str, Any]], Tensor], columns: Mapping[str, Any]) -> Tensor:
        """Gives `function(batch)` of every batch, concatenated; columns are those of `compute`."""
        results = [function(batch).float().cpu() for batch in self.batches(columns)]
        return torch.cat(results) if results else torch.empty(0, 2)

    def token_ids(self, text: str) -> list[int]:
        """Gives the ids of [CLS], the text's tokens and [SEP], cut at the longest text that the model takes."""
        if self.tokenizer is None:
            raise VLMoError("this checkpoint is of images alone: it reads no texts")
        if not isinstance(text, str):
            raise InputError(f"a text is a str, not {type(text).__name__}")
        return tokenize(self.tokenizer, text, self.model.max_text_len)

    @staticmethod
    def best(scores: Tensor, names: Sequence[str], top_k: int) -> list[Prediction]:
        """Gives the names of the `top_k` highest of (N,) scores, best first."""
        values, numbers = scores.topk(min(top_k, len(scores)))
        return [Prediction(names[i], value) for i, value in zip(numbers.tolist(), values.tolist(), strict=True)]

    # --- pairs -------------------------------------------------------------------------------------------------------

    def attention(self, image: Any, text: str, layers: Sequence[int] | None = None) -> AttentionMap:
        """Shows where each token of the text looks in the image, layer by layer (None: all); `.picture()` draws it."""
        numbers = list(range(self.model.transformer.depth))
        if layers is not None and not set(layers) <= set(numbers):
            raise VLMoError(f"layers={list(layers)}: the model has {len(numbers)}, from 0")
        layers = numbers if layers is None else list(layers)
        (batch,) = self.batches({"image": [image], "text": [text]})
        tokens = [self.vocabulary[i] for i in batch["text_ids"][0].tolist()]
        weights = text_to_patches(self.model, batch, layers)
        return AttentionMap(load_image(image, self.image_decoding), tokens, layers, weights)

    # --- images and texts apart --------------------------------------------------------------------------------------

    def embed_images(self, images: Sequence[Any], branch: Literal["v", "vl"] = "v") -> Tensor:
        """Gives contrastive features (N, D) of unit length: of the V-FFN branch, or of the VL-FFN branch."""
        self._require_branch(branch, "v", "itc_image_proj", "itc_vl_image_proj")

        def features(model: VLMoModel, batch: Mapping[str, Any]) -> Tensor:
            return model.image_features(batch["image"], branch == "vl")

        return self.compute(features, image=images)

    def embed_texts(self, texts: Sequence[str], branch: Literal["l", "vl"] = "l") -> Tensor:
        """Gives contrastive features (N, D) of unit length: of the L-FFN branch, or of the VL-FFN branch."""
        self._require_branch(branch, "l", "itc_text_proj", "itc_vl_text_proj")

        def features(model: VLMoModel, batch: Mapping[str, Any]) -> Tensor:
            return model.text_features(batch["text_ids"], batch["text_masks"], branch == "vl")

        return self.compute(features, text=list(texts))

    def _require_branch(self, branch: str, own: str, head: str, vl_head: str) -> None:
        if branch not in (own, "vl"):
            raise VLMoError(f"branch={branch!r}: must be {own!r} or 'vl'")
        self.require_head(head if branch == own else vl_head, "embedding")

    def rank(self, images: Sequence[Any], texts: Sequence[str], vl_branch: bool = False) -> Ranking:
        """Scores every image with every text, by the features of the L- and V-FFN branches or the VL-FFN's."""
        scores = (
            self.embed_images(images, "vl" if vl_branch else "v")
            @ self.embed_texts(texts, "vl" if vl_branch else "l").t()
        )
        return Ranking(scores, scores.t().argsort(descending=True), scores.argsort(descending=True))

    def classify(
        self, images: Sequence[Any], class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> list[list[Prediction]]:
        """Classifies without training: all classes for each image, best first, by the mean feature of their sentences.

        Args:
            templates: sentences with {} for the name of the class.
        """
        texts = [template.format(name) for name in class_names for template in templates]
        sentences = self.embed_texts(texts).unflatten(0, (len(class_names), len(templates)))
        classes = F.normalize(sentences.mean(1), dim=-1).to(self.device)
        contrast = next(task for task in self.model.tasks if task.provides == "contrast")  # (whose heads were needed)
        logits = contrast.scores(self.model.heads, self.embed_images(images).to(self.device), classes)
        return [self.best(row, class_names, len(class_names)) for row in logits.float().cpu().softmax(-1)]

    # --- batches -----------------------------------------------------------------------------------------------------

    def batches(self, columns: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
        """Yields the batches on the device; texts are padded to the longest."""
        given = broadcast({name: values for name, values in columns.items() if values is not None})
        rows = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(rows), self.batch_size):
                samples = list(readers.map(self._sample, rows[start : start + self.batch_size]))
                batch: dict[str, Tensor] = {}
                for name in given:
                    values = [sample[name] for sample in samples]
                    if name.startswith("image"):
                        batch[name] = torch.stack(values)
                    else:
                        batch[f"{name}_ids"] = pad_sequence(values, True, self.tokenizer.pad_token_id)
                        batch[f"{name}_masks"] = pad_sequence([torch.ones_like(ids) for ids in values], True)
                yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _sample(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            name: self._transform(load_image(value, self.image_decoding))
            if name.startswith("image")
            else torch.tensor(self.token_ids(value))
            for name, value in row.items()
        }


def _choose_tokenizer(model: VLMoModel, name_or_path: str | Path | None) -> Tokenizer:
    """Gives the tokenizer that is asked for, which must be the model's; else the checkpoint's."""
    if name_or_path is None and model.vocabulary:
        return tokenizer_of(model.vocabulary)
    metadata = metadata_of(model)
    tokenizer = load_tokenizer(name_or_path or metadata.options["tokenizer"])
    problems = incompatibilities(metadata, None, vocabulary_of(tokenizer), "this checkpoint")
    if len(tokenizer) > model.vocab_size:
        problems.append(f"tokenizer: has {len(tokenizer)} tokens, the model {model.vocab_size}; give the model's")
    if problems:
        raise VLMoError("\n".join(problems))
    return tokenizer


def _choose_answers(model: VLMoModel, answers: Sequence[str] | str | Path | None) -> list[str] | None:
    """Gives the answers that are asked for, which must be the model's; else the checkpoint's."""
    if answers is None:
        return model.answers
    if isinstance(answers, str | Path):
        answers = read_label_names(Path(answers).expanduser())
    problems = incompatibilities(metadata_of(model), answers, None, "this checkpoint")
    if problems:
        raise VLMoError("\n".join(problems))
    return list(answers)
