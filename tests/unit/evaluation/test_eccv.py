"""ECCV Caption on a small table: captions are found by image and text, and judged by all that fits."""

import json

import pytest

from tests import suites
from vlmo.errors import VLMoError
from vlmo.evaluation.pair_scores import Scorer
from vlmo.evaluation.suites import eccv
from vlmo.evaluation.suites.base import Context
from vlmo.evaluation.suites.eccv import EccvCaption, Truth, image_number
from vlmo.evaluation.suites.retrieval import read_captions


@pytest.fixture
def context(tmp_path, monkeypatch):
    """Ten images of two captions; the annotations are in another order, with other spaces and capitals."""
    suites.write_retrieval(tmp_path, rows=10, texts=2)
    captions = read_captions(tmp_path / "coco_caption_karpathy_test.arrow")
    annotations = [
        {"id": 100 + row, "image_id": int(captions.owner[row]) + 1, "caption": f" {text.upper()}\n"}
        for row, text in enumerate(captions.texts)
    ]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": annotations[::-1]}))
    of_image = {image + 1: [100 + 2 * image, 101 + 2 * image] for image in range(10)}
    of_caption = {100 + row: [row // 2 + 1, 10 - row // 2] for row in range(20)}
    truth = Truth((of_image, of_caption), (of_image, of_caption), None, list(range(100, 120)))
    monkeypatch.setattr(eccv, "load_truth", lambda folder=None: truth)
    predictor = suites.predictor()
    return Context(Scorer(predictor.model, predictor.tokenizer, 8), tmp_path)


def test_figures(context):
    result = EccvCaption().run(context)
    found = {(each.part, each.metric): each for each in result.measures if each.score == "cosine"}
    assert {("ECCV image to text", "mAP@R"), ("CxC text to image", "R@5"), ("COCO 1K image to text", "R@10")} <= set(
        found
    )
    # by image, ECCV's list is that of CxC here
    assert found["ECCV image to text", "R@1"].value == found["CxC image to text", "R@1"].value
    assert found["CxC text to image", "R@1"].chance == pytest.approx(0.2)
    assert found["COCO 1K image to text", "R@10"].value == 1  # folds of two images have four captions
    assert "PMRP" in result.notes[0]


def test_captions_that_the_table_lacks(context):
    path = context.root / "captions_val2014.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["caption"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(VLMoError, match="lacks 1 of the 20 captions"):
        EccvCaption().run(context)


def test_numbers_of_images():
    assert image_number("COCO_val2014_000000391895.jpg") == 391895
    with pytest.raises(VLMoError, match="has no number"):
        image_number("cat.jpg")
