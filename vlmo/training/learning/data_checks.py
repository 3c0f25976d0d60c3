"""What is wrong with the data, judged by the first samples that training sees: no weight is looked at."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vlmo.batch import IGNORE_INDEX
from vlmo.text import SPECIAL_TOKENS
from vlmo.training.learning.seen import Seen

FEW = 32  # samples below which nothing is said
MANY = 512  # images that the test of whether pairs belong together wants
FLAT = 0.01  # standard deviation of values in [-1, 1] below which there is nothing to see
IN_RANGE = 1.05  # greatest value of an image normalised with mean and deviation 0.5
PERMUTATIONS = 50
RELATED = 3.0  # deviations above which thumbnails and words go together
BUCKETS = 1024  # of token ids


class Finding(NamedTuple):
    """Something that is wrong: a code, and a sentence that says what it is and what to change."""

    code: str
    sentence: str


def data_findings(
    seen: Seen, vocabulary: Sequence[str] | None, total: int, pairs_belong_together: bool
) -> Iterator[Finding]:
    """Judges what was fetched.

    Args:
        vocabulary: the tokenizer's tokens by id.
        total: samples of an epoch.
        pairs_belong_together: whether texts are about their images, as captions are and questions need not be.
    """
    if sum(len(next(iter(batch.values()))) for batch in seen.batches) < FEW:
        return
    yield from _images(seen)
    texts = seen.texts()
    if texts is None:
        return
    yield from _words(texts, vocabulary or ())
    yield from _copies(seen, texts, total)
    yield from _masked_labels(seen)
    if pairs_belong_together:
        yield from _pairs(seen, texts)


# --- images -----------------------------------------------------------------------------------------------------------


def _images(seen: Seen) -> Iterator[Finding]:
    spread, lowest, highest = (seen.column(name) for name in ("spread", "lowest", "highest"))
    thumbnails = seen.column("thumbnail")
    if spread is None or lowest is None or highest is None or thumbnails is None:
        return
    flat = float((spread < FLAT).mean())
    if flat > 0.5:
        yield Finding(
            "constant_images",
            f"{flat:.0%} of the images are of a single colour: look at the images of the tables, and at the "
            "transform (train_transform_keys)",
        )
        return
    numbers, keys = seen.column("raw_index"), seen.column("image_key")
    looks = [row.tobytes() for row in thumbnails.round(2)] if keys is None else keys.tolist()
    _, first = np.unique(np.arange(len(looks)) if numbers is None else numbers, return_index=True)
    most = Counter(looks[number] for number in first).most_common(1)[0][1]
    if len(first) >= FEW and most > 0.3 * len(first):
        yield Finding(
            "constant_images",
            f"{most / len(first):.0%} of the images are the same one: look at the images of the tables",
        )
        return
    low, high = float(lowest.min()), float(highest.max())
    said = f"images have values from {low:.3g} to {high:.3g}, where the model expects -1 to 1 (mean 0.5, deviation 0.5)"
    remedy = "use train_transform_keys and val_transform_keys that normalise so, such as square_transform"
    if low >= 0 and len(spread) >= 2 * FEW:
        yield Finding("image_range", f"{said}: as if they were not normalised; {remedy}")
    elif high > 10:
        yield Finding("image_range", f"{said}: as if they were bytes; {remedy}")
    elif high > IN_RANGE or low < -IN_RANGE:
        yield Finding("image_range", f"{said}: as if they had another mean and deviation; {remedy}")


# --- texts ------------------------------------------------------------------------------------------------------------


def _words(texts: Sequence[np.ndarray], vocabulary: Sequence[str]) -> Iterator[Finding]:
    known = np.array([token.startswith("##") for token in vocabulary], bool)
    counts = np.bincount(np.concatenate(texts), minlength=len(vocabulary))[: len(vocabulary)].astype(float)
    ids = {token: number for number, token in enumerate(vocabulary) if token in SPECIAL_TOKENS}
    if not {"[UNK]", "[CLS]", "[SEP]"} <= set(ids):
        return
    unknown = counts[ids["[UNK]"]]
    counts[list(ids.values())] = 0
    real = counts.sum() + unknown
    if not real:
        yield Finding("unknown_words", "the texts are empty: look at the captions of the tables")
    elif unknown > 0.3 * real:
        yield Finding(
            "unknown_words",
            f"{unknown / real:.0%} of the tokens are [UNK], words that the tokenizer does not know: give the "
            "vocabulary of this language (tokenizer=)",
        )
    elif counts[known].sum() > 0.5 * real:
        yield Finding(
            "foreign_tokenizer",
            f"{counts[known].sum() / real:.0%} of the tokens are pieces within a word: the tokenizer was made for "
            "other texts; give the vocabulary that the model and the data belong to (tokenizer=)",
        )


def _copies(seen: Seen, texts: Sequence[np.ndarray], total: int) -> Iterator[Finding]:
    numbers, images = seen.column("raw_index"), seen.column("image_key")
    if numbers is None:
        numbers = np.arange(len(texts))
    _, first = np.unique(numbers, return_index=True)  # (a sample may have come again)
    keys = [texts[number].tobytes() for number in first]
    most = Counter(keys).most_common(1)[0][1]
    if len(keys) >= FEW and most > len(keys) / 2:
        yield Finding(
            "one_caption",
            f"{most / len(keys):.0%} of the texts are the same: nothing can be learnt from them; look at the captions "
            "of the tables",
        )
        return
    if images is None:
        return
    pairs = Counter(zip(keys, images[first].tolist(), strict=True))
    met = sum(count * (count - 1) // 2 for count in pairs.values())
    # of k copies of each sample, n samples of `total` hold n^2 / 2 * (k - 1) / total pairs of copies
    copies = 2 * met * total / len(keys) ** 2
    if met >= 5 and copies > 0.5:
        yield Finding(
            "duplicates",
            f"the data are there more than once: {met:,} of the first {len(keys):,} samples are copies, image and "
            f"text, of others among them, about {copies:.1f} copies of each in all; leave them out, or name a data set "
            "once (dataset_weights draws one more often)",
        )


def duplicate_captions(seen: Seen) -> float | None:
    """Gives the share of samples whose text another sample has too; None without texts."""
    texts, numbers = seen.texts(), seen.column("raw_index")
    if not texts:
        return None
    _, first = np.unique(np.arange(len(texts)) if numbers is None else numbers, return_index=True)
    counts = Counter(texts[number].tobytes() for number in first)
    return sum(count for count in counts.values() if count > 1) / len(first)


def _masked_labels(seen: Seen) -> Iterator[Finding]:
    wrong = masked = 0
    for batch in seen.batches:
        if "text_labels_mlm" in batch and "text_ids" in batch:
            chosen = batch["text_labels_mlm"] != IGNORE_INDEX
            masked += int(chosen.sum())
            wrong += int((chosen & (batch["text_labels_mlm"] != batch["text_ids"])).sum())
    if wrong:
        yield Finding(
            "masked_labels",
            f"{wrong / masked:.0%} of the labels of masked tokens are not the token that stands there, as if shifted: "
            "look at what makes text_labels_mlm",
        )


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pairs(seen: Seen, texts: Sequence[np.ndarray]) -> Iterator[Finding]:
    score = pairing_score(seen, texts)
    if score is not None and score < RELATED:
        yield Finding(
            "unrelated_pairs",
            f"the colours of the images say nothing of the words of their captions (z = {score:.1f} over the first "
            f"{len(texts):,} pairs; above {RELATED:g} they do): captions and images seem to be mixed up or shifted; "
            "compare some rows of the tables",
        )


def pairing_score(seen: Seen, texts: Sequence[np.ndarray]) -> float | None:
    """Tells by how many deviations images and words go together better than when they are shuffled.

    The measure is the squared norm of the covariance of thumbnails and words (HSIC with linear kernels, Gretton et al.
    2005), among permutations of the texts. Chance gives 0 +- 1, right pairs of photos and captions tens.

    Returns:
        None where there are too few samples, or nothing varies.
    """
    thumbnails, numbers = seen.column("thumbnail"), seen.column("img_index")
    if thumbnails is None or numbers is None:
        return None
    _, first = np.unique(numbers, return_index=True)  # (captions of one image are no independent samples)
    if len(first) < MANY:
        return None
    images = thumbnails[first] - thumbnails[first].mean(0)
    words = np.zeros((len(first), BUCKETS), np.float32)
    for row, number in zip(words, first, strict=True):
        row[texts[number] % BUCKETS] = 1
    words -= words.mean(0)
    draw = np.random.default_rng(0)
    shuffled = [np.square(images[draw.permutation(len(images))].T @ words).sum() for _ in range(PERMUTATIONS)]
    deviation = float(np.std(shuffled))
    if not deviation:
        return None
    return float((np.square(images.T @ words).sum() - np.mean(shuffled)) / deviation)
