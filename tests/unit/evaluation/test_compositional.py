"""Which caption is right: the definitions worked out by hand, and the official layouts."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests import suites, tables
from tests.suites import CAPTIONS, write_images, write_json
from vlmo.errors import VLMoError
from vlmo.evaluation.suites import compositional, layouts
from vlmo.evaluation.suites.compositional import judge, measure, pairs_of, score_matrices
from vlmo.evaluation.suites.layouts import Question
from vlmo.registry import SUITES

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


@pytest.mark.parametrize("seed", range(3))
def test_random_scores_of_two_by_two(seed):
    """Winoground's and BiVLC's definitions, item by item (rows images, columns captions)."""
    scores = torch.rand(50, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s = scores.numpy()
    text = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    image = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    found = {each.metric: each.value for each in measure([TWO] * 50, list(scores), "cosine")}
    expected = {"text": text.mean(), "image": image.mean(), "group": (text & image).mean()}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_random_scores_of_groups(seed):
    """SugarCrepe and VL-CheckList count by kind; ARO by group, of attributes only those with 25 items."""
    draw = np.random.default_rng(seed)
    groups, scores = draw.choice(["on", "under", "in"], 90, p=[0.6, 0.3, 0.1]), draw.random((90, 2))
    right = scores.argmax(1) == 0
    rows = [torch.tensor(row[None]) for row in scores]
    for least in (1, 25):
        kept = [name for name in np.unique(groups) if (groups == name).sum() >= least]
        assert len(kept) == (3 if least == 1 else 2)
        for place in ("group", "kind"):
            questions = [ONE._replace(captions=(0, 1), **{place: str(name)}) for name in groups]
            found = {each.part: each.value for each in measure(questions, rows, "cosine", least)}
            assert found["all"] == pytest.approx(right.mean(), abs=1e-6)
            if place == "group":
                macro = np.mean([right[groups == name].mean() for name in kept])
                assert found["mean of groups"] == pytest.approx(macro, abs=1e-6)
            else:
                for name in np.unique(groups):
                    assert found[name] == pytest.approx(right[groups == name].mean(), abs=1e-6)


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
    (tmp_path / "symmetric_relations.txt").write_text("near\non\n")
    assert layouts.aro_relation(tmp_path).questions[0].group == ""
    assert found.questions[0].group == "on" and captions_of(found, found.questions[0]) == CAPTIONS[:2]
    assert found.pictures[0].load().size == (20, 15)
    assert layouts.aro_attribution(tmp_path).questions[0].group == "red_blue"
    write_json(tmp_path / "coco_order.json", [{"image": "1.jpg", "caption_options": CAPTIONS[:5]}])
    found = layouts.aro_order(tmp_path / "coco_order.json")
    assert captions_of(found, found.questions[0]) == CAPTIONS[:5]


def test_vl_checklist(tmp_path):
    write_json(
        tmp_path / "data/Attribute/vg/color.json", [["VG_100K/2.jpg", {"POS": CAPTIONS[:2], "NEG": CAPTIONS[2:4]}]]
    )
    write_json(tmp_path / "data/Relation/swig_action.json", [["dialing_8.jpg", {"POS": ["a"], "NEG": ["b"]}]])
    write_json(tmp_path / "data/Attribute/vaw/size.json", [["VG_100K/2.jpg", {"POS": ["a"], "NEG": ["b"]}]])
    found = layouts.vl_checklist(tmp_path)
    kinds = {each.kind: captions_of(found, each) for each in found.questions}
    assert kinds == {"Attribute/vg/color": CAPTIONS[0:3:2]} | dict.fromkeys(
        ("Attribute/vaw/size", "Relation/swig_action"), ["a", "b"]
    )
    images = {path.relative_to(tmp_path / "images").as_posix() for path in found.image_files}
    assert images == {"vg/VG_100K/2.jpg", "swig/dialing_8.jpg"}


def test_winoground_by_lines(tmp_path):
    suites.write_winoground(tmp_path)
    found = layouts.winoground(tmp_path / "winoground")
    assert len(found.pictures) == 8 and found.questions[1].images == (2, 3) and found.questions[1].kind == "Object"


def write_parquet(path, rows, images):
    """As the hub has them: images are structures of bytes and path; two row groups."""
    path.parent.mkdir(parents=True)
    content = [row | {name: {"bytes": tables.png(row[name]), "path": None} for name in images} for row in rows]
    pq.write_table(pa.Table.from_pylist(content), path, row_group_size=2)


def test_winoground_and_bivlc_in_parquet(tmp_path):
    captions = {"caption_0": CAPTIONS[0], "caption_1": CAPTIONS[1], "tag": "Noun", "collapsed_tag": "Object"}
    rows = [captions | {"id": row, "image_0": 2 * row, "image_1": 2 * row + 1} for row in range(3)]
    write_parquet(tmp_path / "winoground/data/test-00000-of-00001.parquet", rows, ("image_0", "image_1"))
    found = layouts.winoground(tmp_path / "winoground")
    assert [each.images for each in found.questions] == [(0, 1), (2, 3), (4, 5)] and len(found.texts) == 2
    for number, image in enumerate(found.pictures):
        assert image.load().tobytes() == tables.picture(number).tobytes()
    row = {
        "image": 0,
        "negative_image": 1,
        "caption": "a",
        "negative_caption": "b",
        "type": "Swap",
        "subtype": "Object",
    }
    write_parquet(tmp_path / "bivlc/data/test.parquet", [row], ("image", "negative_image"))
    found = layouts.bivlc(tmp_path / "bivlc")
    assert found.questions == [Question((0, 1), (0, 1), (0, 1), "swap_object")]
    for name in ("winoground", "bivlc"):
        SUITES[name].check(name, tmp_path)


def test_damaged_parquet(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(VLMoError, match="test.parquet: cannot be read as Parquet"):
        layouts.bivlc(tmp_path)


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
