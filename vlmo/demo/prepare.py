"""From nothing to what `run.py` reads: the raw world, a vocabulary trained on its text, and the Arrow files."""

import contextlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlmo.demo.raw_layout import Sizes, write_raw
from vlmo.utils import (
    write_coco_karpathy,
    write_conceptual_caption,
    write_f30k_karpathy,
    write_nlvr2,
    write_sbu,
    write_vg,
    write_vqa,
    write_wikibk,
)

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY_SIZE = 300  # at most: a world this small has fewer words and pieces


@dataclass(frozen=True)
class Prepared:
    """Where everything lies; `withheld`: right answers to the questions of VQA's test split, by question id."""

    data_root: Path
    vocabulary: Path
    vocabulary_size: int
    answers: list[str]
    withheld: dict[int, str]


def prepare(out: Path, seed: int, sizes: Sizes) -> Prepared:
    """Writes `out/raw` (official layouts), `out/arrow` and `out/vocab.txt`."""
    raw, arrow, vocabulary = out / "raw", out / "arrow", out / "vocab.txt"
    withheld = write_raw(raw, seed, sizes)
    words = train_vocabulary(_texts(raw), vocabulary)
    convert(raw, arrow, rest_val_images=sizes.coco_val)
    answers = json.loads((arrow / "vqav2_answers.json").read_text())
    return Prepared(arrow, vocabulary, words, answers, withheld)


def convert(raw: Path, arrow: Path, rest_val_images: int) -> None:
    """Runs the project's converters of all eight data sets."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # reports and bars
        write_coco_karpathy.make_arrow(str(raw / "coco"), str(arrow))
        write_f30k_karpathy.make_arrow(str(raw / "f30k"), str(arrow))
        write_vg.make_arrow(str(raw / "vg"), str(arrow))
        write_conceptual_caption.make_arrow(str(raw / "gcc"), str(arrow))
        write_sbu.make_arrow(str(raw / "sbu"), str(arrow))
        write_vqa.make_arrow(str(raw / "vqa"), str(arrow), rest_val_images=rest_val_images)
        write_nlvr2.make_arrow(str(raw / "nlvr2"), str(arrow))
        write_wikibk.make_arrow(str(raw / "wikibk"), str(arrow), val_share=0.05)


def train_vocabulary(texts: Iterable[str], path: Path, size: int = VOCABULARY_SIZE) -> int:
    """Trains a lower-casing WordPiece vocabulary and writes it as BERT's vocab.txt; returns its number of words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = list(texts)
    letters = sorted({letter for text in texts for letter in text.lower() if letter.isalnum()})
    # the trainer numbers ##letters in the order of a hash map and breaks ties by number: named here, all is determined
    first = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=first, continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    path.write_text("".join(f"{word}\n" for word, _ in words))
    return len(words)


def _texts(raw: Path) -> Iterator[str]:
    """The words that training sees: plain text, captions, questions, statements (no held-out ones are needed)."""
    for path in sorted((raw / "wikibk").glob("*.txt")):
        yield path.read_text()
    for image in json.loads((raw / "coco/karpathy/dataset_coco.json").read_text())["images"]:
        if image["split"] == "train":
            yield from (sentence["raw"] for sentence in image["sentences"])
    for question in json.loads((raw / "vqa/v2_OpenEnded_mscoco_train2014_questions.json").read_text())["questions"]:
        yield question["question"]
    for line in (raw / "nlvr2/nlvr2/data/train.json").read_text().splitlines():
        yield json.loads(line)["sentence"]
