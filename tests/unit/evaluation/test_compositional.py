"""Which caption is right: the definitions worked out by hand, and the official layouts."""

import json
import math

import numpy as np
import pytest
import torch

from tests import suites
from tests.suites import CAPTIONS, write_images, write_json
from vlmo.errors import VLMoError
from vlmo.evaluation.suites import compositional, layouts
from vlmo.evaluation.suites.compositional import judge, measure, pairs_of, score_matrices
from vlmo.evaluation.suites.layouts import Question

TWO = Question((0, 1), (0, 1), (0, 1), "")
ONE = Question((0,), (0, 1, 2), (0,), "")


@pytest.mark.parametrize(
    ("scores", "text", "image"),
    [
        ([[2, 1], [1, 2]], True, True),  # rows images, columns captions
        ([[4, 3], [1, 2]], True, False),  # caption 1 prefers image 0
        ([[2, 3], [1, 4]], False, True),  # image 0 prefers caption 1
        ([[1, 2], [2, 1]], False, False),
        ([[1, 1], [1, 1]], False, False),  # ties count against
        ([[math.nan, math.nan], [1, 2]], False, False),
    ],
)
def test_winoground(scores, text, image):
    """Text: s(c0,i0) > s(c1,i0) and s(c1,i1) > s(c0,i1). Image: s(c0,i0) > s(c0,i1) and s(c1,i1) > s(c1,i0)."""
    assert judge(TWO, torch.tensor(scores, dtype=torch.float64), 1e-6) == {
        "text": text,
        "image": image,
        "group": text and image,
    }


@pytest.mark.parametrize(
    ("scores", "right"), [([3, 2, 1], True), ([2, 3, 1], False), ([3, 3, 1], False), ([math.nan] * 3, False)]
)
def test_one_image(scores, right):
    assert judge(ONE, torch.tensor([scores], dtype=torch.float64), 1e-6) == {"accuracy": right}


def test_chance_of_two_by_two_is_what_random_scores_give():
    draw = torch.rand(20_000, 2, 2, generator=torch.Generator().manual_seed(0))
    judged = [judge(TWO, scores, 0) for scores in draw[:6000]]
    for name, chance in compositional.CHANCE.items():
        assert np.mean([each[name] for each in judged]) == pytest.approx(chance, abs=0.02)


def test_sugarcrepe_by_kind():
    """Of kind a 1 of 2 is right, of kind b 1 of 1: 2/3 of all, 3/4 as the mean of kinds."""
    questions = [
        Question((0,), (0, 1), (0,), "a"),
        Question((1,), (0, 1), (0,), "a"),
        Question((2,), (2, 1), (0,), "b"),
    ]
    pairs = pairs_of(questions)
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 1], [2, 2]]
    scores = torch.tensor([0.9, 0.1, 0.2, 0.8, 0.3, 0.7], dtype=torch.float64)
    rows = score_matrices(questions, pairs, scores)
    assert rows[2].tolist() == [[0.7, 0.3]]
    found = {each.part: each for each in measure(questions, rows, "itm")}
    assert {part: each.value for part, each in found.items()} == pytest.approx(
        {"a": 0.5, "b": 1, "all": 2 / 3, "mean of kinds": 0.75}
    )
    assert all(each.chance == 0.5 for each in found.values())


# --- layouts ----------------------------------------------------------------------------------------------------------


def captions_of(found, question):
    return [found.texts[caption] for caption in question.captions]


def test_aro(tmp_path):
    write_images(tmp_path / "images", ["1.jpg"], (40, 30))
    box = {"bbox_x": 10, "bbox_y": 5, "bbox_w": 20, "bbox_h": 15}
    pair = {"image_path": "1.jpg", "true_caption": CAPTIONS[0], "false_caption": CAPTIONS[1], **box}
    write_json(tmp_path / "visual_genome_relation.json", [{**pair, "relation_name": "on"}])
    write_json(tmp_path / "visual_genome_attribution.json", [{**pair, "attributes": ["red", "blue"]}])
    found = layouts.aro_relation(tmp_path)
    assert found.questions[0].group == "on" and captions_of(found, found.questions[0]) == CAPTIONS[:2]
    assert found.pictures[0].load().size == (20, 15)
    assert layouts.aro_attribution(tmp_path).questions[0].group == "red_blue"
    write_json(tmp_path / "coco_order.json", [{"image_path": "1.jpg", "image_id": 1, "caption_options": CAPTIONS[:5]}])
    found = layouts.aro_order(tmp_path / "coco_order.json")
    assert captions_of(found, found.questions[0]) == CAPTIONS[:5]


def test_vl_checklist(tmp_path):
    write_json(
        tmp_path / "data/Attribute/vg/color.json", [["VG_100K/2.jpg", {"POS": CAPTIONS[:2], "NEG": CAPTIONS[2:4]}]]
    )
    found = layouts.vl_checklist(tmp_path)
    assert [captions_of(found, each) for each in found.questions] == [CAPTIONS[0:3:2], CAPTIONS[1:4:2]]
    assert {each.kind for each in found.questions} == {"Attribute/vg/color"}
    assert found.image_files == [tmp_path / "images/VG_100K/2.jpg"]


def test_winoground_and_bivlc(tmp_path):
    suites.write_winoground(tmp_path)
    found = layouts.winoground(tmp_path / "winoground")
    assert len(found.pictures) == 8 and found.questions[1].images == (2, 3) and found.questions[1].kind == "Object"
    record = {
        "image": "a.jpg",
        "negative_image": "b.jpg",
        "caption": "a",
        "negative_caption": "b",
        "type": "Swap",
        "subtype": "Object",
    }
    write_json(tmp_path / "bivlc/test.json", [record])
    found = layouts.bivlc(tmp_path / "bivlc")
    assert found.questions == [Question((0, 1), (0, 1), (0, 1), "swap_object")]


@pytest.mark.parametrize(
    "record",
    [{}, {"filename": "../x.png", "caption": "a", "negative_caption": "b"}, {"filename": "x", "caption": 1}, 3],
)
def test_damaged_records(tmp_path, record):
    write_json(tmp_path / "swap_att.json", {"0": record})
    with pytest.raises(VLMoError, match="swap_att.json"):
        layouts.sugarcrepe(tmp_path)


def test_damaged_files(tmp_path):
    (tmp_path / "examples.jsonl").write_text(json.dumps({"image_0": "a"})[:-3])
    with pytest.raises(VLMoError, match="examples.jsonl:1"):
        layouts.winoground(tmp_path)
