"""The head-to-head: what stands beside VLMo is what it says, and costs as many operations; the table's intervals."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import head_to_head_contest as contest_module
from benchmarks import head_to_head_report as report
from benchmarks.head_to_head import next_rate
from benchmarks.head_to_head_contest import Contest
from benchmarks.head_to_head_models import OfOpenCLIP, OfViLT, OfVLMo, makers, matched_width, step_flops
from tests import tiny
from vlmo.distributed.wire_format import from_bytes, to_bytes
from vlmo.registry import ARCHITECTURES

PRETRAINING = "task_mlm_itm_itc_base"
SEPARATOR = 3  # that ends the texts of tests/tiny.py


@pytest.fixture(autouse=True)
def _architectures():
    """Takes back those that a width registers."""
    known = set(ARCHITECTURES)
    yield
    for name in set(ARCHITECTURES) - known:
        del ARCHITECTURES[name]


def pairs(lengths=(5, 9, 12, 7), padded=12):
    return tiny.batch(lengths, padded)


def config(task=PRETRAINING, **updates):
    return tiny.config(task, **updates)


def test_separate_attention_of_equal_weights_is_the_shared_one():
    torch.manual_seed(0)
    shared = OfVLMo(config())
    torch.manual_seed(0)
    separate = OfVLMo(config(), separate=True)
    batch = pairs()
    for model in (shared, separate):
        torch.manual_seed(1)
        model.loss(batch).backward()
    torch.testing.assert_close(separate.image_features(batch["image"]), shared.image_features(batch["image"]))
    texts = batch["text_ids"], batch["text_masks"]
    torch.testing.assert_close(separate.text_features(*texts), shared.text_features(*texts))
    for one, two in zip(shared.model.transformer.blocks, separate.model.transformer.blocks, strict=True):
        both = two.attn.text.qkv.weight.grad + two.attn.image.qkv.weight.grad
        torch.testing.assert_close(both, one.attn.qkv.weight.grad, atol=1e-5, rtol=1e-4)
        assert two.attn.text.qkv.weight.grad.any() and two.attn.image.qkv.weight.grad.any()


def test_the_attention_of_the_other_modality_has_no_say():
    model = OfVLMo(config(), separate=True).eval()
    batch = pairs()
    image, text = model.image_features(batch["image"]), model.text_features(batch["text_ids"], batch["text_masks"])
    with torch.no_grad():
        for block in model.model.transformer.blocks:
            block.attn.image.qkv.weight.mul_(2)
    assert torch.equal(model.text_features(batch["text_ids"], batch["text_masks"]), text)
    assert not torch.allclose(model.image_features(batch["image"]), image)


def test_open_clip_reads_texts_as_it_would_filled_up():
    pytest.importorskip("open_clip")
    model = OfOpenCLIP(config(), 32, SEPARATOR).eval()
    batch = pairs()
    ids = batch["text_ids"]
    filled = torch.nn.functional.pad(ids, (0, tiny.SMALL["max_text_len"] - ids.shape[1]))
    own = model.clip.encode_text(filled, normalize=True)
    torch.testing.assert_close(model.text_features(ids, batch["text_masks"]), own)


def test_vilt_reads_images_as_its_own_way_does():
    model = OfViLT(config("task_finetune_vqa_base_image480"), 32, "vqa").eval()
    batch = pairs()
    own = model.vilt(
        input_ids=batch["text_ids"], attention_mask=batch["text_masks"], pixel_values=batch["image"]
    ).pooler_output
    torch.testing.assert_close(model.logits(batch), model.head(own))


@pytest.mark.parametrize(
    "row", ["shared", *(pytest.param(row, marks=pytest.mark.slow) for row in ("open_clip", "itc", "vilt"))]
)
def test_a_width_costs_as_many_operations(row):
    if row == "open_clip":
        pytest.importorskip("open_clip")
    kind, task = ("vqa", "task_finetune_vqa_base_image480") if row == "vilt" else ("retrieval", PRETRAINING)
    build = makers(config(task), kind, SEPARATOR)
    batches = [pairs() | {"vqa_labels": torch.zeros(4, 1).long(), "vqa_scores": torch.ones(4, 1)}]
    before = torch.get_rng_state()
    flops = step_flops(build["vlmo"](), batches)
    width = matched_width(build[row], flops, batches, 4)
    assert 0.93 < step_flops(build[row](width), batches) / flops < 1.07
    torch.set_rng_state(before)


def test_the_table_compares_seed_by_seed(tmp_path, capsys):
    about = {"flops": 1e9, "parameters": 1000, "rate": 1e-3, "samples": 64, "tokens": 640}
    for seed, (own, other) in enumerate([(0.5, 0.6), (0.3, 0.4), (0.7, 0.8)], 1):
        folder = tmp_path / "demo_tiny_32px" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "vqa_vlmo.json").write_text(json.dumps({"accuracy": own} | about))
        (folder / "vqa_vilt.json").write_text(json.dumps({"accuracy": other} | about | {"flops": 1.1e9}))
    report.write(tmp_path, tmp_path / "results")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ViLT")]
    # the models differ by 10 points in every seed, whatever the seeds differ by
    assert "60.0 (40.0 to 80.0) [**+10.0: +10.0 to +10.0**] | 1.10 |" in row
    lines = (tmp_path / "results" / "head_to_head.csv").read_text().splitlines()
    assert "demo_tiny_32px,vqa,vilt,2,accuracy,0.4" in lines


def test_two_seeds_have_no_interval():
    assert report._cell({1: {"accuracy": 0.5}, 2: {"accuracy": 0.6}}, {}, "accuracy", "vlmo") == "55.0"


@pytest.mark.parametrize(
    "found, rate",
    [
        ({}, 1.0),
        ({"1.0": 0.5}, 2.0),
        ({"1.0": 0.5, "2.0": 0.7, "4.0": 0.6}, None),
        ({"1.0": 0.8, "2.0": 0.7, "4.0": 0.6}, 0.5),
        ({"1.0": 0.5, "2.0": 0.6, "4.0": 0.7}, 8.0),
        ({"0.5": 0.6, "1.0": 0.8, "2.0": 0.7, "4.0": 0.6}, None),
        ({"1.0": 0.1, "2.0": 0.2, "4.0": 0.3, "8.0": 0.4, "16.0": 0.5, "32.0": 0.6}, None),
    ],
)
def test_learning_rates_are_tried_until_the_best_has_neighbours(found, rate):
    assert next_rate(found, (1.0, 2.0, 4.0)) == rate


def test_images_of_training_and_of_evaluation_reach_a_model_alike(tmp_path):
    contest = Contest("demo", "vqa", 1, "val", {}, {}, tmp_path, torch.device("cpu"))
    image = from_bytes(torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2))
    for given in (image, to_bytes(image)):
        assert torch.equal(contest.to_device({"image": given, "qid": [1]})["image"], image)


def test_rows_that_are_wide_are_given_their_width(tmp_path, monkeypatch):
    monkeypatch.setattr(Contest, "batches", lambda *_: iter(()))
    monkeypatch.setattr(Contest, "separator", SEPARATOR)
    monkeypatch.setattr(Contest, "made", lambda *_: lambda: SimpleNamespace(model=tiny_model))
    tiny_model = SimpleNamespace(transformer=SimpleNamespace(num_heads=2))
    monkeypatch.setattr(contest_module, "step_flops", lambda *_: 1.0)
    monkeypatch.setattr(contest_module, "matched_width", lambda *_: 8)
    for world in ("demo", "emoji"):
        contest = Contest(world, "retrieval", 1, "val", {}, {}, tmp_path / world, torch.device("cpu"))
        assert set(contest.widths) == set(contest.rows) & set(contest_module.WIDENED)
