"""The raw layouts that the world is written in, the vocabulary, and what the converters make of them."""

import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pytest

from vlmo.demo.prepare import SPECIAL_TOKENS, Prepared, prepare, train_vocabulary
from vlmo.demo.raw_layout import Sizes, write_raw
from vlmo.demo.scenes import PICTURE_SIZE
from vlmo.text import load_tokenizer

SIZES = Sizes.quick()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared]:
    out = tmp_path_factory.mktemp("world")
    return out, prepare(out, seed=0, sizes=SIZES)


def read(world: tuple[Path, Prepared], name: str) -> list[dict]:
    with pa.memory_map(str(world[1].data_root / f"{name}.arrow")) as source:
        return pa.ipc.open_file(source).read_all().to_pylist()


def test_every_set_is_converted_with_the_sizes_asked_for(world: tuple[Path, Prepared]) -> None:
    expected = {
        "coco_caption_karpathy_train": SIZES.coco,
        "coco_caption_karpathy_val": SIZES.coco_val,
        "coco_caption_karpathy_test": SIZES.coco_val,
        "f30k_caption_karpathy_train": SIZES.f30k,
        "f30k_caption_karpathy_test": SIZES.f30k_val,
        "vg": SIZES.vg,
        "conceptual_caption_train_0": SIZES.web,
        "sbu_0": SIZES.web,
        "vqav2_train": SIZES.coco,
        "vqav2_rest_val": SIZES.coco_val,
        "vqav2_trainable_val": SIZES.coco_val,
        "vqav2_test": SIZES.vqa_test,
        "nlvr2_train": 4 * SIZES.nlvr2,
        "nlvr2_dev": 4 * SIZES.nlvr2_val,
    }
    assert {name: len(read(world, name)) for name in expected} == expected


def test_held_out_pictures_are_in_no_training_set(world: tuple[Path, Prepared]) -> None:
    def pictures(*names: str) -> set[bytes]:
        rows = [row for name in names for row in read(world, name)]
        return {row[key] for row in rows for key in ("image", "image_0", "image_1") if key in row}

    training = pictures(
        "coco_caption_karpathy_train", "coco_caption_karpathy_restval", "vg", "sbu_0", "conceptual_caption_train_0"
    )
    training |= pictures("f30k_caption_karpathy_train", "vqav2_train", "vqav2_trainable_val", "nlvr2_train")
    held_out = pictures("vqav2_rest_val", "vqav2_test", "nlvr2_dev", "nlvr2_test1")
    held_out |= pictures("f30k_caption_karpathy_val", "f30k_caption_karpathy_test")
    assert held_out and not training & held_out


def test_nlvr2_uses_every_sentence_with_several_pairs_and_is_balanced(world: tuple[Path, Prepared]) -> None:
    for split in ("train", "dev", "test1"):
        labels = defaultdict(list)
        for line in (world[0] / f"raw/nlvr2/nlvr2/data/{split}.json").read_text().splitlines():
            record = json.loads(line)
            _, number, _, sentence = record["identifier"].split("-")
            labels[number, sentence, record["sentence"]].append(record["label"])
        assert {tuple(sorted(found)) for found in labels.values()} == {("False", "False", "True", "True")}


def test_regions_lie_in_the_picture(world: tuple[Path, Prepared]) -> None:
    for row in read(world, "vg"):
        for x, y, width, height in zip(row["x"], row["y"], row["width"], row["height"], strict=True):
            assert 0 <= x < x + width <= PICTURE_SIZE and 0 <= y < y + height <= PICTURE_SIZE


def test_vqa_has_soft_scores_and_withholds_the_answers_of_test(world: tuple[Path, Prepared]) -> None:
    scores = Counter(s for row in read(world, "vqav2_train") for one in row["answer_scores"] for s in one)
    assert {0.3, 1.0} <= set(scores)
    rows = read(world, "vqav2_test")
    assert not any(row["answers"] for row in rows)
    assert {number for row in rows for number in row["question_id"]} == set(world[1].withheld)
    answers = world[1].answers
    assert answers == json.loads((world[1].data_root / "vqav2_answers.json").read_text())
    assert {"yes", "no", "2"} <= set(answers)


def test_vocabulary_is_berts_and_knows_every_word(world: tuple[Path, Prepared]) -> None:
    words = world[1].vocabulary.read_text().splitlines()
    assert words[: len(SPECIAL_TOKENS)] == SPECIAL_TOKENS
    assert len(words) == len(set(words)) == world[1].vocabulary_size <= 300
    tokenizer = load_tokenizer(world[1].vocabulary)
    texts = [text for row in read(world, "f30k_caption_karpathy_test") for text in row["caption"]]
    texts += [text for name in ("vqav2_test", "nlvr2_test1") for row in read(world, name) for text in row["questions"]]
    texts += [text for row in read(world, "wikibk_val_0") for text in row["caption"]]
    assert not [text for text in texts if words.index("[UNK]") in tokenizer(text)["input_ids"]]


def test_vocabulary_does_not_depend_on_the_process(tmp_path: Path) -> None:
    texts = ["a red circle above a blue star", "blue circles and red stars, reddish and bluish", "above all stars"] * 5
    code = f"from pathlib import Path; from vlmo.demo.prepare import train_vocabulary as t; t({texts}, Path('out'), 60)"
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        environment = {"PYTHONHASHSEED": str(number), "PYTHONPATH": str(Path(__file__).parents[3]), "PATH": ""}
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path / str(number), env=environment, check=True)
    assert (tmp_path / "0/out").read_text() == (tmp_path / "1/out").read_text()
    assert train_vocabulary(texts, tmp_path / "here", 60) == len((tmp_path / "here").read_text().splitlines())


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> dict[str, str]:
        root = tmp_path / name
        write_raw(root, seed, SIZES)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digest("a", 1) == digest("b", 1) != digest("c", 2)
