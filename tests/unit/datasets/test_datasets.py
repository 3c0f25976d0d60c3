"""Samples of the four kinds of data sets, from tables made here and from files that the original wrote."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchvision.transforms import v2

from tests import tables
from tests.conftest import GOLDENS
from vlmo.batch import FIELDS
from vlmo.datasets.base_dataset import BaseDataset, ImageView, Skipped, TextView
from vlmo.datasets.nlvr2_dataset import NUMBERS_KEY
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS
from vlmo.text import TokenMasker, load_tokenizer

ORIGINAL = GOLDENS / "converters" / "original_arrow"
TRANSFORM = v2.Compose([v2.RandomCrop(16), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


@pytest.fixture
def open_dataset(tmp_path):
    tokenizer = load_tokenizer(tables.write_vocabulary(tmp_path))

    def opened(name: str, *paths: Path, wanted=FIELDS) -> BaseDataset:
        masker = TokenMasker(tokenizer, 0.3, whole_word=True)
        return DATASETS[name].dataset(paths, tokenizer, 12, masker, TRANSFORM, wanted)

    return opened


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name


def test_caption_samples(open_dataset, tmp_path):
    first = tables.write_captions(tmp_path, "first", rows=2, texts=2)
    second = tables.write_captions(tmp_path, "second", rows=1, texts=3, first=2)
    dataset = open_dataset("coco", first, second)
    assert len(dataset) == 7
    samples = [dataset[index] for index in range(7)]
    assert [(s["raw_index"], s["img_index"], s["cap_index"]) for s in samples] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
        (4, 2, 0),
        (5, 2, 1),
        (6, 2, 2),
    ]
    assert samples[5]["text"] == tables.captions(1, 3, first=2)[0][1]
    tokens = dataset.tokenizer.convert_ids_to_tokens(samples[5]["text_ids"])
    assert tokens == ["[CLS]", *samples[5]["text"].replace("2", "[UNK]").split(), "[SEP]"]
    masked = samples[5]["text_labels_mlm"] != -100
    assert masked.any()
    assert np.array_equal(samples[5]["text_labels_mlm"][masked], np.array(samples[5]["text_ids"])[masked])
    assert samples[5]["image"].shape == (3, 16, 16)


def test_number_and_seed_alone_determine_a_sample(open_dataset, tmp_path):
    path = tables.write_captions(tmp_path, "t", rows=3)
    dataset = open_dataset("coco", path)
    one = dataset[(3, 5)]
    torch.rand(3)
    state = torch.get_rng_state()
    assert_equal(pickle.loads(pickle.dumps(dataset))[(3, 5)], one)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(dataset[3], dataset[(3, 0)])
    crops = {dataset[(3, seed)]["image"].numpy().tobytes() for seed in range(20)}
    masks = {dataset[(3, seed)]["text_ids_mlm"].tobytes() for seed in range(20)}
    assert len(crops) > 10
    assert len(masks) > 3


def test_all_captions_are_kept_and_rows_without_are_passed_over(open_dataset, tmp_path):
    captions = [["same", "same"], [], ["same"], None, [None]]
    columns = {"image": [tables.png(row) for row in range(5)], "caption": pa.array(captions, pa.list_(pa.string()))}
    dataset = open_dataset("coco", tables.write_table(tmp_path / "t.arrow", columns))
    samples = [dataset[index] for index in range(len(dataset))]
    assert [(s["img_index"], s["cap_index"], s["text"]) for s in samples] == [
        (0, 0, "same"),
        (0, 1, "same"),
        (2, 0, "same"),
        (4, 0, ""),
    ]
    assert len(ImageView(dataset)) == 5


def test_equal_images_are_known_in_whatever_file_they_lie(open_dataset, tmp_path):
    first = tables.write_captions(tmp_path, "first", rows=2, texts=2)
    again = tables.write_captions(tmp_path, "again", rows=1, texts=1, first=1)
    keys = [open_dataset("coco", first, again)[index]["image_key"] for index in range(5)]
    assert keys[0] == keys[1] != keys[2] == keys[3] == keys[4]
    (other,) = {open_dataset("f30k", again)[0]["image_key"]}
    assert other == keys[4] and -(2**63) <= other < 2**63


def test_undecodable_images_become_skipped(open_dataset, tmp_path):
    columns = {"image": [tables.png(0), b"damaged", None], "caption": [["a"], ["b"], ["c"]]}
    dataset = open_dataset("coco", tables.write_table(tmp_path / "bad.arrow", columns))
    assert isinstance(dataset[0], dict)
    for sample in (dataset[1], ImageView(dataset)[1]):
        assert isinstance(sample, Skipped)
        assert sample.reason.startswith("bad: image row 1 of the data set (image): UnidentifiedImageError")
    assert dataset[2].reason.endswith("there is no image")


@pytest.mark.parametrize("wanted", [(), ("image",), ("text_ids_mlm",), ("text_labels_mlm", "text_ids_mlm", "image")])
def test_only_wanted_fields_are_made(open_dataset, tmp_path, wanted):
    path = tables.write_captions(tmp_path, "t", rows=3)
    sample, whole = (open_dataset("coco", path, wanted=names)[(2, 5)] for names in (wanted, FIELDS))
    dear = {"image"} & {*wanted} | ({"text_ids_mlm", "text_labels_mlm"} if "text_ids_mlm" in wanted else set())
    assert sample.keys() == {"text", "text_ids", "raw_index", "img_index", "cap_index"} | dear
    assert_equal(sample, {name: whole[name] for name in sample})  # whatever else is made


@pytest.mark.parametrize(
    "name, numbers",
    [(b"\x80dev-0-0", None), (b"dev-0-0", b'{"dev-0-0": 1}'), (b"dev-0-0", b'{"dev-0-0": []}'), (b"dev-0-0", b"{")],
)
def test_damaged_names_of_pairs_are_the_projects_own_error(open_dataset, tmp_path, name, numbers):
    names = [name]
    buffers = pa.array(names, pa.binary()).buffers()
    columns = {"image_0": [tables.png(0)], "image_1": [tables.png(1)], "questions": [["a cat"]], "answers": [["True"]]}
    table = pa.table(columns | {"identifier": pa.StringArray.from_buffers(1, *buffers[1:])})
    if numbers:
        table = table.replace_schema_metadata({NUMBERS_KEY: numbers})
    path = tmp_path / "nlvr2_dev.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(VLMoError, match="nlvr2_dev.arrow: is damaged"):
        open_dataset("nlvr2", path)[0]


def test_views_for_retrieval(open_dataset, tmp_path):
    columns = {"image": [tables.png(0), b"damaged"], "caption": [["a cat"], ["a dog", "red"]]}
    dataset = open_dataset("coco", tables.write_table(tmp_path / "t.arrow", columns))
    assert ImageView(dataset)[0].keys() == {"image", "raw_index", "img_index"}
    texts = [TextView(dataset)[index] for index in range(len(TextView(dataset)))]  # the damaged image is not looked at
    assert [text["img_index"] for text in texts] == [0, 1, 1]
    assert texts[1] == {"text_ids": dataset.text_ids("a dog"), "raw_index": 1, "img_index": 1}


def test_text_samples_have_no_image(open_dataset, tmp_path):
    tables.write_wikibk(tmp_path)
    dataset = open_dataset("wikibk", tmp_path / "wikibk_train_0.arrow", tmp_path / "wikibk_train_1.arrow")
    assert len(dataset) == 10
    assert "image" not in dataset[7]
    assert dataset[7]["text"] == "the dog runs . red red "
    assert len(dataset[9]["text_ids"]) == 10


def test_vqa_samples(open_dataset, tmp_path):
    tables.write_vqa(tmp_path)
    sample = open_dataset("vqa", tmp_path / "vqav2_train.arrow")[3]
    assert (sample["qid"], sample["text"]) == (11, "what colour is the cat ?")
    assert (sample["vqa_labels"], sample["vqa_scores"]) == ([1, 2], [1.0, 0.3])
    assert sample["vqa_answer"] == ["answer 1", "answer 2"]
    sample = open_dataset("vqa", tmp_path / "vqav2_test.arrow")[3]
    assert (sample["qid"], sample["vqa_labels"], sample["vqa_scores"], sample["vqa_answer"]) == (11, [], [], [])


def test_unknown_answers_are_not_those_outside_the_vocabulary(open_dataset, tmp_path):
    tables.write_vqa(tmp_path)
    assert open_dataset("vqa", tmp_path / "vqav2_train.arrow")[3]["answered"]
    assert not open_dataset("vqa", tmp_path / "vqav2_test.arrow")[3]["answered"]
    columns = {"image": [tables.png(0)], "questions": [["a", "b", "c"]], "question_id": [[0, 1, 2]]}
    columns |= {"answers": [[["yes"], [], None]], "answer_labels": [[[0], [], None]]}
    columns |= {"answer_scores": [[[1.0], [], None]]}
    dataset = open_dataset("vqa", tables.write_table(tmp_path / "vqav2_own.arrow", columns))
    assert [dataset[index]["answered"] for index in range(3)] == [True, True, False]
    assert [dataset[index]["vqa_labels"] for index in range(3)] == [[0], [], []]


def test_nlvr2_samples(open_dataset, tmp_path):
    tables.write_nlvr2(tmp_path)
    dataset = open_dataset("nlvr2", tmp_path / "nlvr2_dev.arrow", tmp_path / "nlvr2_test1.arrow")
    samples = [dataset[index] for index in (0, 7)]
    assert [s["answers"] for s in samples] == [True, False]
    assert [s["table_name"] for s in samples] == ["nlvr2_dev", "nlvr2_test1"]
    assert [s["identifier"] for s in samples] == ["dev-0-0-0", "test1-0-0-1"]
    assert [s["sentence"] for s in samples] == ["the left cat runs .", "a dog ."]
    assert not torch.equal(samples[0]["image_0"], samples[0]["image_1"])


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("coco", "coco_caption_karpathy_train"),
        ("vg", "vg"),
        ("wikibk", "wikibk_train_0"),
        ("vqa", "vqav2_train"),
        ("vqa", "vqav2_test"),
        ("nlvr2", "nlvr2_dev"),
    ],
)
def test_files_of_the_original(open_dataset, name, stem):
    path = ORIGINAL / f"{stem}.arrow"
    dataset = open_dataset(name, path)
    rows = pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist()
    column = dataset.text_column
    texts = [(image, item, text) for image, row in enumerate(rows) for item, text in enumerate(row[column])]
    samples = [dataset[index] for index in range(len(dataset))]
    assert [(s["img_index"], s["cap_index"], s["text"]) for s in samples] == texts
    places = [(rows[s["img_index"]], s["cap_index"], s) for s in samples]
    if name == "vqa":
        assert all(s["qid"] == row["question_id"][item] for row, item, s in places)
        labels = [row["answer_labels"][item] if row["answer_labels"] else [] for row, item, _ in places]
        assert [s["vqa_labels"] for s in samples] == labels
    if name == "nlvr2":
        assert all(s["answers"] == (row["answers"][item] == "True") for row, item, s in places)
        assert Counter(s["table_name"] for s in samples) == {"nlvr2_dev": len(samples)}
