"""The converter of SNLI-VE."""

import pytest

from tests.unit.utils.raw import image_bytes, read_rows, write_images, write_lines
from vlmo.errors import VLMoError
from vlmo.utils import write_snli_ve


def record(image, number, label="entailment"):
    return {
        "Flickr30K_ID": str(image),
        "captionID": f"{image}.jpg#0",
        "gold_label": label,
        "annotator_labels": [label],
        "pairID": f"{image}.jpg#{number}",
        "sentence1": "the premise in words, which is not read",
        "sentence2": f"hypothesis {number}",
    }


@pytest.fixture
def raw(tmp_path):
    """Three images; in each split two pairs about one and one about another."""
    root = tmp_path / "raw"
    write_images(root / "flickr30k-images", 3)
    for split in ("train", "dev", "test"):
        lines = [record(0, 0), record(1, 1, "neutral"), record(0, 2, "contradiction")]
        write_lines(root / f"snli_ve_{split}.jsonl", lines)
    return root


def test_the_hypotheses_about_an_image_share_its_row(raw, tmp_path):
    write_snli_ve.make_arrow(str(raw), str(tmp_path / "out"))
    for split in ("train", "dev", "test"):
        first, second = read_rows(tmp_path / "out" / f"snli_ve_{split}.arrow")
        assert first == {
            "image": image_bytes(0),
            "hypotheses": ["hypothesis 0", "hypothesis 2"],
            "labels": ["entailment", "contradiction"],
            "pair_ids": ["0.jpg#0", "0.jpg#2"],
            "image_id": "0",
            "split": split,
        }
        assert (second["image"], second["labels"]) == (image_bytes(1), ["neutral"])


def test_undecided_pairs_and_missing_images_are_left_out_and_counted(raw, tmp_path):
    write_lines(raw / "snli_ve_train.jsonl", [record(0, 0), record(0, 1, "-"), record(2, 2, "-"), record(7, 3)])
    write_lines(raw / "snli_ve_dev.jsonl", [record(0, 0), record(0, 1, "-")])
    report = write_snli_ve.make_arrow(str(raw), str(tmp_path / "out"))
    assert report.skipped == {"no gold label": 3, "file not found": 1}
    assert [row["pair_ids"] for row in read_rows(tmp_path / "out" / "snli_ve_train.arrow")] == [["0.jpg#0"]]
    assert "snli_ve_dev.jsonl:2: 0.jpg#1" in (tmp_path / "out" / "snli_ve_skipped.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gold_label": "maybe"},
            "snli_ve_dev.jsonl:2: 'gold_label' must be entailment, neutral, contradiction or '-'",
        ),
        ({"Flickr30K_ID": "../../x"}, "snli_ve_dev.jsonl:2: .*leads out of"),
        ({"sentence2": 3}, "snli_ve_dev.jsonl:2: 'sentence2' must be str"),
        ({"pairID": None}, "snli_ve_dev.jsonl:2: 'pairID' must be str"),
    ],
)
def test_mistakes(change, message, raw, tmp_path):
    write_lines(raw / "snli_ve_dev.jsonl", [record(0, 0), record(0, 1) | change])
    with pytest.raises(VLMoError, match=message):
        write_snli_ve.make_arrow(str(raw), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.arrow"))


def test_missing_files_are_all_named(tmp_path):
    with pytest.raises(
        VLMoError, match=r"missing in .*: snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl, fl"
    ):
        write_snli_ve.make_arrow(str(tmp_path), str(tmp_path / "out"))
