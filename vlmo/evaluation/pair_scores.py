"""How well an image and a text go together, by each of the four scores that a fusion model has.

    cosine      of the contrastive features of the V- and the L-FFN (paper: Image-Text Contrast)
    cosine_vl   of those of the VL-FFN branch
    itm         log-odds of a match, by the head of image-text matching
    mlm         mean over the text's tokens of log p(token | the other tokens, image): each token is masked in turn, the
                pseudo-log-likelihood of Salazar et al. (arXiv 1910.14659) per token; [CLS] and [SEP] do not count

Of a checkpoint without the heads of a score, that score is left out (`Scorer.absent` says why).
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmo.distributed.wire_format import from_bytes, to_bytes
from vlmo.evaluation.chunks import Output, Store, in_chunks
from vlmo.evaluation.pictures import Picture
from vlmo.modules.attention import first_positions
from vlmo.modules.model import Encode, VLMoModel
from vlmo.text import Tokenizer, tokenize
from vlmo.transforms import square_transform

# what a model must have at its root for each
HEADS = {
    "cosine": ("itc_image_proj", "itc_text_proj"),
    "cosine_vl": ("itc_vl_image_proj", "itc_vl_text_proj"),
    "itm": ("itm_score",),
    "mlm": ("mlm_score",),
}
OF_FEATURES = ("cosine", "cosine_vl")  # of images and texts apart
OF_PAIRS = ("itm", "mlm")  # of both together
READERS = 4  # threads that decode images
IMAGES_AT_ONCE, TEXTS_AT_ONCE = 64, 1024  # in a chunk
# Scores this close are equal: rounding moves them so far with the size of a batch. Ties count against the model.
TIES = {"cosine": 1e-6, "cosine_vl": 1e-6, "itm": 1e-4, "mlm": 1e-4}


class Scorer:
    """A model that encodes and scores, in batches.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: of the model; None for one that reads no texts.
        batch_size: images, texts or pairs at a time.
        decoding: of images, see `decode_image`.

    Attributes:
        names: of the scores that the model has.
        absent: of those that it lacks, each with the reason.
    """

    def __init__(
        self, model: VLMoModel, tokenizer: Tokenizer | None, batch_size: int = 32, decoding: str = "correct"
    ) -> None:
        self.model, self.batch_size, self.decoding = model, batch_size, decoding
        self.tokenizer: Any = tokenizer
        self.device = next(model.parameters()).device
        self.width: int = model.transformer.embed_dim
        self._transform = square_transform(model.image_size)
        self.absent: dict[str, str] = {}
        pairs = any("pair" in task.paths for task in model.tasks)
        for name, heads in HEADS.items():
            lacking = [head for head in heads if not hasattr(model, head)]
            if lacking:
                self.absent[name] = f"the checkpoint lacks {lacking[0]}"
            elif name not in OF_FEATURES and not pairs:
                self.absent[name] = "the checkpoint was not trained on pairs"
        self.names = tuple(name for name in HEADS if name not in self.absent)
        self.of_features = tuple(name for name in OF_FEATURES if name in self.names)

    # --- images and texts apart --------------------------------------------------------------------------------------

    def read(self, pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Decodes images, in some threads: (N, 3, size, size) uint8, and (N,) bool, False where one cannot be decoded.

        (The transform gives normalised bytes: they are kept as bytes without loss.)
        """
        with ThreadPoolExecutor(READERS) as readers:
            images = list(readers.map(self._pixels, pictures))
        size = self.model.image_size
        blank = torch.zeros(3, size, size, dtype=torch.uint8)
        known = torch.tensor([image is not None for image in images], dtype=torch.bool)
        return torch.stack([blank if image is None else image for image in images]), known

    def _pixels(self, picture: Picture) -> Tensor | None:
        image = picture.load(self.decoding)
        return None if image is None else to_bytes(self._transform(image))

    @torch.inference_mode()
    def image_features(self, pixels: Tensor, known: Tensor) -> dict[str, Tensor]:
        """Gives (N, D) of unit length by score, both branches from one pass; nan where an image is not known."""
        parts = []
        for batch in pixels.split(self.batch_size):
            image = from_bytes(batch.to(self.device))
            hidden = self.model.encode_image(image, self._vl_branch, positions=first_positions(image))
            parts.append(self._project("image", hidden))
        found = {name: torch.cat([part[name] for part in parts]) for name in self.of_features}
        return {name: each.masked_fill(~known[:, None], torch.nan) for name, each in found.items()}

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Gives (N, D) of unit length by score, both branches from one pass."""
        ids = self.token_ids(texts)
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))  # little padding
        found = {name: torch.empty(len(texts), self.width) for name in self.of_features}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            text, mask = self.padded([ids[row] for row in rows])
            hidden = self.model.encode_text(text, mask, self._vl_branch, first_positions(text))
            for name, features in self._project("text", hidden).items():
                found[name][rows] = features
        return found

    @property
    def _vl_branch(self) -> bool:
        return "cosine_vl" in self.names

    def _project(self, side: str, hidden: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        sides = {"cosine": (side, hidden[0]), "cosine_vl": (f"vl_{side}", hidden[1])}
        found = {name: self.model.project(*sides[name]) for name in self.of_features}
        return {name: features.float().cpu() for name, features in found.items() if features is not None}

    def token_ids(self, texts: Sequence[str]) -> list[Tensor]:
        """Gives the ids of each text, cut at the longest that the model takes."""
        return [torch.tensor(tokenize(self.tokenizer, text, self.model.max_text_len)) for text in texts]

    def padded(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gives ids and masks (B, T) on the device."""
        text = pad_sequence(list(ids), True, self.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(each) for each in ids], True)
        return text.to(self.device), mask.to(self.device)

    # --- pairs -------------------------------------------------------------------------------------------------------

    def pair_scores(
        self, pixels: Tensor, known: Tensor, images: Sequence[int], texts: Sequence[str], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Gives (P,) by score, of those of `names` that need the pair; nan where an image is not known.

        Args:
            pixels, known: of `read`.
            images: (P,) which of them each pair has.
            texts: (P,).
        """
        ids = self.token_ids(texts)
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        ways = {"itm": self._matches, "mlm": self._likelihoods}
        found: dict[str, Tensor] = {}
        for name in (name for name in names if name in ways):
            found[name] = torch.empty(len(ids), dtype=torch.float64)
            if order:
                found[name][order] = ways[name](pixels, [images[row] for row in order], [ids[row] for row in order])
                found[name][~known[list(images)]] = torch.nan
        return found

    @torch.inference_mode()
    def _matches(self, pixels: Tensor, images: Sequence[int], ids: Sequence[Tensor]) -> Tensor:
        """Gives (P,) the log-odds of a match."""
        found = []
        for start in range(0, len(ids), self.batch_size):
            text, mask = self.padded(ids[start : start + self.batch_size])
            image = from_bytes(pixels[images[start : start + self.batch_size]].to(self.device))
            ((hidden, _),) = self.model.encode([Encode(image, text, mask, first_positions(text))])
            no_match, match = self.model.heads["itm_score"](self.model.pooler(hidden)).double().cpu().unbind(1)
            found.append(match - no_match)
        return torch.cat(found)

    @torch.inference_mode()
    def _likelihoods(self, pixels: Tensor, images: Sequence[int], ids: Sequence[Tensor]) -> Tensor:
        """Gives (P,) the mean log-probability of the tokens, each masked in turn."""
        rows = [(pair, position) for pair, text in enumerate(ids) for position in range(1, len(text) - 1)]
        total = torch.zeros(len(ids), dtype=torch.float64)
        for start in range(0, len(rows), self.batch_size):
            pair, position = torch.tensor(rows[start : start + self.batch_size]).unbind(1)
            text, mask = self.padded([ids[each] for each in pair.tolist()])
            at = position[:, None].to(self.device)
            true = text.gather(1, at)
            masked = text.scatter(1, at, self.tokenizer.mask_token_id)
            image = from_bytes(pixels[[images[each] for each in pair.tolist()]].to(self.device))
            ((hidden, _),) = self.model.encode([Encode(image, masked, mask, at)])
            log_p = self.model.heads["mlm_score"](hidden[:, 0]).float().log_softmax(-1).gather(1, true)[:, 0]
            total.index_add_(0, pair, log_p.double().cpu())
        return total / torch.tensor([len(text) - 2 for text in ids])


# --- many pairs, over all processes -----------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Images and texts of all processes, and scores of pairs.

    Attributes:
        images, texts: (I, D) and (T, D) by the scores of features; nan where an image cannot be decoded.
        pairs: (P,) by score, all that were asked for, in the order of the pairs.
        known: (I,) bool.
    """

    images: dict[str, Tensor]
    texts: dict[str, Tensor]
    pairs: dict[str, Tensor]
    known: Tensor


def encode_and_score(
    scorer: Scorer,
    pictures: Sequence[Picture],
    texts: Sequence[str],
    pairs: np.ndarray,
    store: Store,
    keep_pixels: bool = False,
) -> Encoded:
    """Encodes all images and texts, and scores pairs by everything that the model has, decoding each image once.

    Args:
        pairs: (P, 2) numbers of an image and a text; each pair once.
        keep_pixels: leave the decoded images in `store`, for `score_more_pairs`.
    """
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    by_image = pairs[order]
    starts = np.searchsorted(by_image[:, 0], np.arange(len(pictures) + 1))
    of_pairs = [name for name in scorer.names if name not in OF_FEATURES] if len(pairs) else []
    features = {name: Output((scorer.width,)) for name in scorer.of_features}
    outputs = features | {"known": Output()} | {name: Output((), starts) for name in of_pairs}

    def compute(start: int, stop: int, prepared: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        pixels, known = prepared
        own = by_image[starts[start] : starts[stop]]
        if keep_pixels:
            store.write(f"pixels_{start:07d}", {"pixels": pixels, "known": known})
        found: dict[str, Any] = {"known": known} | scorer.image_features(pixels, known)
        own_texts = [texts[text] for text in own[:, 1]]
        return found | scorer.pair_scores(pixels, known, (own[:, 0] - start).tolist(), own_texts, of_pairs)

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return scorer.read(pictures[start:stop])

    found = in_chunks("encode images", len(pictures), IMAGES_AT_ONCE, outputs, compute, read, store, torch.float64)
    encoded_texts = encode_texts(scorer, texts, store)
    images = {name: found[name].float() for name in scorer.of_features}
    known = found["known"] > 0
    scores = {}
    for name in scorer.names:
        if name in OF_FEATURES:
            scores[name] = cosines(images[name], encoded_texts[name], pairs)
        elif name in found:
            scores[name] = torch.empty(len(pairs), dtype=torch.float64)
            scores[name][order] = found[name]
    return Encoded(images, encoded_texts, scores, known)


def encode_texts(scorer: Scorer, texts: Sequence[str], store: Store) -> dict[str, Tensor]:
    """Gives (T, D) by the scores of features, over all processes."""
    outputs = {name: Output((scorer.width,)) for name in scorer.of_features}

    def compute(start: int, stop: int, prepared: None) -> Mapping[str, Tensor]:
        return scorer.text_features(texts[start:stop])

    return in_chunks("encode texts", len(texts), TEXTS_AT_ONCE, outputs, compute, store=store) if outputs else {}


def score_more_pairs(
    scorer: Scorer, pictures: Sequence[Picture], texts: Sequence[str], pairs: np.ndarray, name: str, store: Store
) -> Tensor:
    """Gives (P,) the score `name` of pairs in the order of their images, whose pixels are taken from `store`.

    Args:
        pairs: (P, 2) numbers of an image and a text, in order.
    """
    starts = np.searchsorted(pairs[:, 0], np.arange(len(pictures) + 1))

    def compute(start: int, stop: int, prepared: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        own = pairs[starts[start] : starts[stop]]
        own_texts = [texts[text] for text in own[:, 1]]
        return scorer.pair_scores(*prepared, (own[:, 0] - start).tolist(), own_texts, [name])

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        if starts[start] == starts[stop]:
            return torch.empty(0), torch.empty(0)
        kept = store.read(f"pixels_{start:07d}")
        return scorer.read(pictures[start:stop]) if kept is None else (kept["pixels"], kept["known"])

    outputs = {name: Output((), starts)}
    what = f"score pairs by {name} {hashlib.sha256(pairs.tobytes()).hexdigest()[:8]}"
    return in_chunks(what, len(pictures), IMAGES_AT_ONCE, outputs, compute, read, store, torch.float64)[name]


def cosines(images: Tensor, texts: Tensor, pairs: np.ndarray, at_once: int = 1 << 14) -> Tensor:
    """Gives (P,) the products of the features of pairs (P, 2)."""
    parts = torch.from_numpy(pairs).split(at_once)
    return torch.cat([(images[part[:, 0]].double() * texts[part[:, 1]].double()).sum(1) for part in parts])
