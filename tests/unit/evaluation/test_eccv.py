"""ECCV Caption on a small table: captions are found by image and text, and judged by all that fits."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import suites
from vlmo.errors import VLMoError
from vlmo.evaluation.pair_scores import Scorer
from vlmo.evaluation.rankings import Sides
from vlmo.evaluation.suites import eccv
from vlmo.evaluation.suites.base import Context
from vlmo.evaluation.suites.eccv import EccvCaption, Numbers, Truth, image_number, measure_truth
from vlmo.evaluation.suites.retrieval import read_captions, recalls_of_folds


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


@pytest.mark.parametrize("seed", range(3))
def test_all_figures_are_those_of_the_package(seed):
    """Features, and what fits, are drawn; its own class gets the full rankings. One caption that fits is not ranked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = pytest.importorskip("eccv_caption").Metrics()
    draw, torch_draw = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    image_ids, caption_ids = [1000 + 7 * row for row in range(25)], [5000 + 3 * row for row in range(100)]
    sides = Sides(*(F.normalize(torch.randn(n, 6, generator=torch_draw), dim=1) for n in (25, 100)))

    def drawn(share):
        fits = draw.random((25, 100)) < share
        fits[np.arange(100) % 25, np.arange(100)] = True
        i2t = {image_ids[row]: [caption_ids[at] for at in np.flatnonzero(fits[row])] for row in range(25)}
        t2i = {caption_ids[at]: [image_ids[row] for row in np.flatnonzero(fits[:, at])] for at in range(100)}
        return i2t, t2i

    truth = Truth(drawn(0.1), drawn(0.05), drawn(0.3), caption_ids)
    truth.eccv[0][image_ids[3]].append(9999)
    coco = drawn(0)
    for name, (i2t, t2i) in (("eccv", truth.eccv), ("cxc", truth.cxc), ("pm", truth.plausible), ("coco", coco)):
        setattr(metrics, f"{name}_gts", {"i2t": i2t, "t2i": t2i})
    order = draw.permutation(25).reshape(5, 5)  # folds of five images
    metrics.coco_ids = np.array([caption_ids[at] for fold in order for at in range(100) if at % 25 in fold])
    scores = sides.images.double() @ sides.texts.double().t()
    i2t = {image_ids[row]: [caption_ids[at] for at in scores[row].argsort(descending=True)] for row in range(25)}
    t2i = {caption_ids[at]: [image_ids[row] for row in scores[:, at].argsort(descending=True)] for at in range(100)}
    names = ("coco_1k_recalls", "cxc_recalls", "eccv_r1", "eccv_map_at_r", "eccv_rprecision", "pmrp")
    theirs = metrics.compute_all_metrics(i2t, t2i, names) | {"pmrp": metrics.pmrp({"i2t": i2t, "t2i": t2i}, "all")}
    theirs |= metrics.eccv_metrics({"i2t": i2t, "t2i": t2i}, "all")

    rows = Numbers({own: row for row, own in enumerate(image_ids)}, {own: row for row, own in enumerate(caption_ids)})
    found = {(each.part, each.metric): each.value for each in measure_truth(sides, truth, rows, "cosine")}
    owner = np.arange(100) % 25
    split = SimpleNamespace(
        sides=lambda images, texts: {"cosine": Sides(sides.images[images], sides.texts[texts])},
    )
    folds = [np.sort(fold) for fold in order]
    texts = [np.flatnonzero(np.isin(owner, fold)) for fold in folds]
    coco_1k = recalls_of_folds(split, folds, texts, owner, "COCO 1K")
    found |= {(each.part, each.metric): each.value for each in coco_1k}
    ours = {"PM": {"R-Precision": "pmrp"}, "ECCV": {"R@1": "eccv_r1", "mAP@R": "eccv_map_at_r"}}
    ours["ECCV"] |= {"R-Precision": "eccv_rprecision"}
    for part, name in (("CxC", "cxc"), ("COCO 1K", "coco_1k")):
        ours[part] = {f"R@{k}": f"{name}_r{k}" for k in (1, 5, 10)}
    for part, metrics_of in ours.items():
        for metric, name in metrics_of.items():
            for direction, key in (("image to text", "i2t"), ("text to image", "t2i")):
                assert found[f"{part} {direction}", metric] == pytest.approx(theirs[name][key], abs=1e-6), name


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
