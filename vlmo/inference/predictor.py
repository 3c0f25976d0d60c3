"""A trained model at work: answers, compares, matches, embeds, ranks, fills in words, shows where it looks."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.datamodules.collate import Collator
from vlmo.datasets.text import tokenize, vocabulary_of
from vlmo.errors import VLMoError
from vlmo.inference.attention_maps import AttentionMap, text_to_patches
from vlmo.inference.inputs import InputError, choose_answers, choose_tokenizer, load_image
from vlmo.modules import VLMo
from vlmo.transforms import square_transform

if TYPE_CHECKING:
    from transformers import BertTokenizer

READERS = 4  # threads that decode and resize images


class Prediction(NamedTuple):
    """An answer, a word or a class, and how sure the model is of it, in [0, 1]."""

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
    bytes of an image file. `answer`, `compare`, `match` and `fill_mask` take one input and give one result, or take
    lists and give a list (one image goes with each of many texts, and so on); lists are worked off in batches.

    Every method raises VLMoError if the checkpoint lacks the head it needs, and InputError, which is one, for an input
    that cannot be used.
    """

    def __init__(
        self,
        model: VLMo,
        tokenizer: str | Path | None = None,
        answers: Sequence[str] | str | Path | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
    ) -> None:
        """
        Args:
            tokenizer: hub name, folder or vocab.txt; None: the vocabulary in the checkpoint, else the name in it.
            answers: of the VQA labels, or the JSON file with them; None: those in the checkpoint.
            device: None: the GPU if there is one, else the CPU.

        Raises:
            VLMoError: if the tokenizer or the device cannot be had, or tokenizer or answers are not the training's.
        """
        self.model = model.eval()
        self.tokenizer: BertTokenizer = choose_tokenizer(model, tokenizer)
        self.answers = choose_answers(model, answers)
        self._words = vocabulary_of(self.tokenizer)
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model.to(self.device)
        except (RuntimeError, AssertionError) as error:  # no such device, or a torch built without it
            raise VLMoError(f"device={device}: {str(error).splitlines()[0]}") from error
        self.batch_size = batch_size
        self._transform = square_transform(model.settings.image_size)
        self._collate = Collator(self.tokenizer.pad_token_id, model.settings.max_text_len)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        tokenizer: str | Path | None = None,
        answers: Sequence[str] | str | Path | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> "Predictor":
        """Of a file, folder or hub name; `options` (`task`, `image_size`, ...) are those of `VLMo.from_pretrained`."""
        return cls(VLMo.from_pretrained(path_or_hub_id, **options), tokenizer, answers, device, batch_size)

    # --- pairs -------------------------------------------------------------------------------------------------------

    def answer(self, image: Any, question: str | Sequence[str], top_k: int = 1) -> Any:
        """The most likely answers, best first: `list[Guess]`, or a list of those. Scores are independent of each other.

        Raises:
            VLMoError: also if the answers' texts are not known.
        """
        self._need("vqa_classifier", "answering")
        if not self.answers:
            raise VLMoError("the checkpoint does not hold its answers: give answers=FILE (vqav2_answers.json)")
        known = len(self.answers)

        def logits(batch: Mapping[str, Any]) -> Tensor:
            return self.model.vqa_classifier(self.model.infer(batch)["cls_feats"])[:, :known]

        scores = self._run(logits, image=image, text=question).sigmoid()
        return _one_or_many([_best(row, self.answers, top_k) for row in scores], image, question)

    def compare(self, image_a: Any, image_b: Any, statement: str | Sequence[str]) -> Any:
        """Probability that the statement is true of the two images, left and right: `float`, or a list."""
        self._need("nlvr2_classifier", "comparing two images")

        def logits(batch: Mapping[str, Any]) -> Tensor:
            pooled = [self.model.infer(batch, image_token_type_idx=i)["cls_feats"] for i in (1, 2)]
            return self.model.nlvr2_classifier(torch.cat(pooled, dim=1))

        scores = self._run(logits, image_0=image_a, image_1=image_b, text=statement).softmax(-1)[:, 1]
        return _one_or_many(scores.tolist(), image_a, image_b, statement)

    def match(self, image: Any, text: str | Sequence[str]) -> Any:
        """Probability that image and text belong together: `float`, or a list (in training one pair of three does)."""
        self._need("itm_score", "matching")

        def logits(batch: Mapping[str, Any]) -> Tensor:
            return self.model.itm_score(self.model.infer(batch)["cls_feats"])

        return _one_or_many(self._run(logits, image=image, text=text).softmax(-1)[:, 1].tolist(), image, text)

    def fill_mask(self, text: str | Sequence[str], image: Any = None, top_k: int = 5) -> Any:
        """The likeliest words for each [MASK] of the text, which an image may illustrate: `list[list[Guess]]`."""
        self._need("mlm_score", "filling in words")
        lists = _lists({"text": text} if image is None else {"text": text, "image": image})
        texts, mask_id = lists["text"], self.tokenizer.mask_token_id
        counts = [tokenize(self.tokenizer, each, self._max_len).count(mask_id) for each in texts]
        if 0 in counts:
            raise InputError(f"{texts[counts.index(0)]!r}: has no [MASK] among its first {self._max_len} tokens")

        def logits(batch: Mapping[str, Any]) -> Tensor:
            joint = "image" in batch
            encoded = self.model.infer(batch) if joint else self.model.infer_text(batch, vl_branch=False)
            return self.model.mlm_score(encoded["text_feats"][batch["text_ids"] == mask_id])[:, : len(self._words)]

        guesses = iter([_best(row, self._words, top_k) for row in self._run(logits, **lists).softmax(-1)])
        return _one_or_many([list(islice(guesses, count)) for count in counts], text, image)

    def attention(self, image: Any, text: str, layers: Sequence[int] | None = None) -> AttentionMap:
        """Where each word of the text looks in the image, layer by layer (None: all); `.picture()` draws it."""
        numbers = list(range(self.model.transformer.depth))
        if layers is not None and not set(layers) <= set(numbers):
            raise VLMoError(f"layers={list(layers)}: the model has {len(numbers)}, from 0")
        layers = numbers if layers is None else list(layers)
        (batch,) = self._batches({"image": [image], "text": [text]})
        size = self.model.settings.image_size
        tokens = [self._words[i] for i in batch["text_ids"][0, : int(batch["text_masks"].sum())].tolist()]
        weights = text_to_patches(self.model, batch, layers)[:, :, : len(tokens)]
        return AttentionMap(load_image(image).resize((size, size)), tokens, layers, weights)

    # --- images and texts apart --------------------------------------------------------------------------------------

    def embed_images(self, images: Sequence[Any], branch: Literal["v", "vl"] = "v") -> Tensor:
        """Contrastive features (N, D) of unit length: of the V-FFN branch, or of the VL-FFN branch."""
        self._need_branch(branch, "v", "itc_image_proj", "itc_vl_image_proj")

        def features(batch: Mapping[str, Any]) -> Tensor:
            encoded = self.model.infer_image(batch, vl_branch=branch == "vl")
            return encoded["cls_feats" if branch == "v" else "cls_vlffn_feats"]

        return self._run(features, image=images)

    def embed_texts(self, texts: Sequence[str], branch: Literal["l", "vl"] = "l") -> Tensor:
        """Contrastive features (N, D) of unit length: of the L-FFN branch, or of the VL-FFN branch."""
        self._need_branch(branch, "l", "itc_text_proj", "itc_vl_text_proj")

        def features(batch: Mapping[str, Any]) -> Tensor:
            encoded = self.model.infer_text(batch, vl_branch=branch == "vl")
            return encoded["cls_feats" if branch == "l" else "cls_vlffn_feats"]

        return self._run(features, text=list(texts))

    def rank(self, images: Sequence[Any], texts: Sequence[str], vl_branch: bool = False) -> Ranking:
        """How well every image goes with every text, by the features of the L- and V-FFN branches or the VL-FFN's."""
        scores = (
            self.embed_images(images, "vl" if vl_branch else "v")
            @ self.embed_texts(texts, "vl" if vl_branch else "l").t()
        )
        return Ranking(scores, scores.t().argsort(descending=True), scores.argsort(descending=True))

    def classify(
        self, images: Sequence[Any], class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> list[list[Prediction]]:
        """Zero-shot: for each image all classes, best first, by its likeness to the mean feature of their sentences.

        Args:
            templates: sentences with {} for the name of the class.
        """
        texts = [template.format(name) for name in class_names for template in templates]
        classes = self.embed_texts(texts).unflatten(0, (len(class_names), len(templates))).mean(1)
        likeness = self.embed_images(images) @ F.normalize(classes, dim=-1).t()
        scores = (self.model.logit_scale.detach().float().exp().cpu() * likeness).softmax(-1)
        return [_best(row, class_names, len(class_names)) for row in scores]

    # --- the work ----------------------------------------------------------------------------------------------------

    @property
    def _max_len(self) -> int:
        return self.model.settings.max_text_len

    def _need(self, head: str, purpose: str) -> None:
        if not hasattr(self.model, head):
            present = ", ".join(objective.name for objective in self.model.objectives)
            raise VLMoError(f"{purpose} needs a checkpoint with {head}; this one was trained for {present}")

    def _need_branch(self, branch: str, own: str, head: str, vl_head: str) -> None:
        if branch not in (own, "vl"):
            raise VLMoError(f"branch={branch!r}: must be {own!r} or 'vl'")
        self._need(head if branch == own else vl_head, "embedding")

    @torch.inference_mode()
    def _run(self, compute: Callable[[Mapping[str, Any]], Tensor], **columns: Any) -> Tensor:
        """`compute` of every batch, float32 on the CPU, one after the other."""
        results = [compute(batch).float().cpu() for batch in self._batches(_lists(columns))]
        return torch.cat(results) if results else torch.empty(0, 2)

    def _batches(self, lists: Mapping[str, Sequence[Any]]) -> Any:
        """Batches as the data module makes them, on the device."""
        rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(rows), self.batch_size):
                samples = list(readers.map(self._sample, rows[start : start + self.batch_size]))
                batch = self._collate(samples)
                yield {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _sample(self, row: Mapping[str, Any]) -> dict[str, Any]:
        sample = {name: self._transform(load_image(value)) for name, value in row.items() if name != "text"}
        if "text" in row:
            if not isinstance(row["text"], str):
                raise InputError(f"a text is a str, not {type(row['text']).__name__}")
            sample["text_ids"] = tokenize(self.tokenizer, row["text"], self._max_len)
        return sample


def _is_many(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _lists(columns: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """What is one goes with each of what is many."""
    lengths = {name: len(value) for name, value in columns.items() if _is_many(value)}
    if len(set(lengths.values())) > 1:
        raise VLMoError("lists of different lengths: " + ", ".join(f"{n} {number}" for n, number in lengths.items()))
    number = next(iter(lengths.values()), 1)
    return {name: value if name in lengths else [value] * number for name, value in columns.items()}


def _one_or_many(results: list[Any], *given: Any) -> Any:
    return results if any(map(_is_many, given)) else results[0]


def _best(scores: Tensor, names: Sequence[str], top_k: int) -> list[Prediction]:
    values, numbers = scores.topk(min(top_k, len(scores)))
    return [Prediction(names[i], value) for i, value in zip(numbers.tolist(), values.tolist(), strict=True)]
