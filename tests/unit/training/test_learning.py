"""The learning doctor: what it says of data and of numbers, and what chance is."""

import math

import pytest
import torch

from tests import tiny
from tests.processes import in_processes
from tests.unit.test_no_host_reads import NoReads
from vlmo.modules import block
from vlmo.registry import TASKS
from vlmo.settings import Settings
from vlmo.training.learning import gauges
from vlmo.training.learning.data_checks import data_findings, duplicate_captions, pairing_score
from vlmo.training.learning.overfit import LossCurve, diagnosis
from vlmo.training.learning.run_checks import RunChecks, few_negatives, frozen_findings
from vlmo.training.learning.seen import Seen

WORDS = [f"word{number}" for number in range(40)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"##{word}" for word in WORDS)]
SIZE = 640


def samples(number=SIZE):
    """Images of four colours, each with texts that name its colour and three other words."""
    draw = torch.Generator().manual_seed(0)
    color = torch.randint(0, 4, (number,), generator=draw)
    words = torch.randint(9, 45, (number, 3), generator=draw)
    ends = [torch.full((number, 1), special) for special in (2, 3)]
    ids = torch.cat([ends[0], 5 + color[:, None], words, ends[1]], dim=1)
    image = (torch.rand(number, 3, 16, 16, generator=draw) - 0.5) + (color[:, None, None, None] / 3 - 0.5) * 0.9
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    numbers = torch.arange(number)
    return {
        "image": image,
        "text_ids": ids,
        "text_masks": torch.ones_like(ids),
        "text_labels_mlm": labels,
        "image_key": numbers.clone(),
        "img_index": numbers.clone(),
        "raw_index": numbers,
    }


def codes(batch, vocabulary=VOCABULARY, total=10_000):
    seen = Seen()
    for start in range(0, len(batch["raw_index"]), 64):
        seen.add({name: value[start : start + 64] for name, value in batch.items()}, 64)
    assert seen.fetch()
    return [code for code, _ in data_findings(seen, vocabulary, total, pairs_belong_together=True)]


def test_nothing_is_said_of_good_data():
    assert codes(samples()) == []


def change(name, function):
    batch = samples()
    return batch | {name: function(batch[name])}


def text(first, function):
    """Tokens after `first`, without the last."""

    def apply(ids):
        ids = ids.clone()
        ids[:, first:-1] = function(ids[:, first:-1])
        return ids

    return change("text_ids", apply) | {"text_labels_mlm": torch.full((SIZE, 6), -100)}


SABOTAGES = {
    "unrelated_pairs": lambda: text(1, lambda words: words.roll(1, dims=0)),
    "constant_images": lambda: change("image", lambda image: image.mean((1, 2, 3), keepdim=True).expand_as(image)),
    "image_range": lambda: change("image", lambda image: (image / 2 + 0.5 - 0.45) / 0.226),
    "one_caption": lambda: text(1, lambda words: words[:1].expand_as(words)),
    "unknown_words": lambda: text(1, torch.ones_like),
    "foreign_tokenizer": lambda: text(2, lambda words: words + len(WORDS)),
    "masked_labels": lambda: change("text_labels_mlm", lambda labels: labels.where(labels < 0, 9 + labels % 7)),
    "duplicates": lambda: (
        {name: torch.cat([value, value]) for name, value in samples(400).items()}
        | {"raw_index": torch.arange(800), "img_index": torch.arange(800)}
    ),
}


@pytest.mark.parametrize("code", SABOTAGES)
def test_sabotaged_data_are_named(code):
    assert code in codes(SABOTAGES[code](), total=800)


@pytest.mark.parametrize(
    "values, named",
    [((0.0, 1.0), True), ((0.0, 255.0), True), ((-1.0, 1.0), False), ((-1.0, 0.5), False)],
)
def test_range_of_the_images(values, named):
    low, high = values
    spread = torch.linspace(low, high, 256).view(1, 1, 16, 16).expand(SIZE, 3, 16, 16).clone()
    spread[::2] = spread[::2].flip(2) * 0.9 + 0.1 * low
    assert ("image_range" in codes(samples() | {"image": spread})) == named


def test_pairs_are_judged_by_images_of_their_own_and_not_by_few():
    seen = Seen()
    seen.add(samples(100), 100)
    seen.fetch()
    assert pairing_score(seen, seen.texts()) is None
    seen = Seen()
    seen.add(samples(), SIZE)
    seen.fetch()
    assert pairing_score(seen, seen.texts()) > 10


def test_a_sample_that_comes_again_is_no_copy():
    batch = samples(400)
    again = {name: torch.cat([value, value]) for name, value in batch.items()}
    assert "duplicates" not in codes(again, total=400)
    seen = Seen()
    seen.add(again, 800)
    seen.fetch()
    assert duplicate_captions(seen) < 0.2


def test_data_without_texts_or_images():
    batch = samples()
    assert codes({name: batch[name] for name in ("image", "raw_index")}) == []
    assert codes({name: batch[name] for name in ("text_ids", "text_masks", "raw_index")}) == []


def test_only_the_first_samples_are_kept():
    seen = Seen(limit=100)
    for _ in range(4):
        seen.add(samples(64), 64)
    assert seen.complete and seen.samples == 128
    seen.fetch()
    assert len(seen.batches) == 2 and not seen.fetch()


# --- chance -----------------------------------------------------------------------------------------------------------


def chance(name, batch, config="task_mlm_itm_itc_base", **updates):
    settings = Settings.from_config(tiny.config(config, **updates))
    return TASKS[name](settings).chance([batch])


def test_chance_of_the_contrast_is_that_of_the_batch_over_all_processes():
    batch = samples(6)
    sizes = {"batch_size": 12, "per_gpu_batchsize": 6, "num_gpus": 2, "accelerator": "cpu"}
    assert chance("itc", batch, **sizes)["loss"] == pytest.approx(math.log(12))
    assert chance("itc", batch, **sizes)["t2i_accuracy"] == pytest.approx(1 / 12)
    # of 11 samples, with one less in the other process
    uneven = sizes | {"batch_size": 11, "layout_invariant": True}
    assert chance("itc", batch, **uneven)["loss"] == pytest.approx(math.log(11))


def test_chance_of_matching_and_of_masked_words():
    assert chance("itm", samples(4)) == pytest.approx({"loss": 0.6365, "accuracy": 2 / 3}, abs=1e-4)
    batch = {"text_labels_mlm": torch.tensor([[-100, 5, 5, 7], [-100, 5, -100, -100]])}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert chance("mlm", batch) == pytest.approx({"loss": 0.25 * entropy, "accuracy": 0.75})
    assert chance("textmlm", batch, "task_textmlm_base")["loss"] == pytest.approx(entropy)


def test_chance_of_downstream_tasks():
    batch = tiny.batch(images=())
    found = chance("vqa", batch, "task_finetune_vqa_base_image480", image_size=32)
    targets = torch.zeros(3, 7)
    for row in range(3):
        targets[row, row % 7], targets[row, (row + 2) % 7] = 1.0, 0.3
    mean = targets.mean(0)
    assert found["score"] == pytest.approx(float(mean.max()))
    loss = torch.nn.functional.binary_cross_entropy(mean.expand(3, 7), targets, reduction="sum") / 3
    assert found["loss"] == pytest.approx(float(loss))
    assert chance("nlvr2", {"answers": torch.tensor([True, False, True, False])}, "task_finetune_nlvr2_base") == {
        "loss": pytest.approx(math.log(2)),
        "accuracy": 0.5,
    }


# --- numbers of a run -------------------------------------------------------------------------------------------------


def judge(numbers, chance=None, total=1000, **updates):
    """Codes after logged steps 10, 20, ... with those numbers."""
    model = tiny.model("task_mlm_itm_itc_base")
    settings = model.settings.model_copy(update=updates)
    checks = RunChecks(settings, model.tasks, total)
    expected = chance or {"itc": {"loss": math.log(64)}, "mlm": {"loss": 0.8}}
    return {code for i, each in enumerate(numbers, 1) for code, _ in checks.findings(10 * i, each, expected)}


HEALTHY = {
    "train/loss": 4.0,
    "itc/train/loss": 3.0,
    "mlm/train/loss": 0.6,
    "itc/train/logit_scale": 14.3,
    "itc/train/false_negatives": 0.03,
    "train/update_ratio": 1e-3,
    "train/grad_norm": 2.0,
    "train/grad_norm/text_expert": 0.01,
    "train/data_wait": 0.2,
}


@pytest.mark.parametrize(
    "code, numbers",
    [
        ("no_update", {"train/update_ratio": 1e-9}),
        ("learning_rate_high", {"train/update_ratio": 0.5}),
        ("learning_rate_high", {"itc/train/loss": math.nan}),
        ("temperature", {"itc/train/logit_scale": 1.0}),
        ("temperature", {"itc/train/logit_scale": 1e4}),
        ("false_negatives", {"itc/train/false_negatives": 0.5}),
        ("dead_part", {"train/grad_norm/text_expert": 0.0}),
        ("at_chance", {"itc/train/loss": 4.15}),
        ("data_wait", {"train/data_wait": 0.9}),
    ],
)
def test_what_is_wrong_in_training_is_named(code, numbers):
    assert judge([HEALTHY] * 30) == set()
    assert judge([HEALTHY | numbers] * 30) == {code}


def test_a_loss_that_rises_above_chance_is_the_learning_rate():
    rising = [HEALTHY | {"itc/train/loss": 4.2 + 0.4 * i} for i in range(8)]
    assert judge(rising) == {"learning_rate_high"}
    falling = [HEALTHY | {"mlm/train/loss": 2.5 - 0.2 * i} for i in range(8)]  # from a random guess to chance
    assert judge(falling) == set()


def test_a_contrast_at_chance_is_given_time():
    stuck = HEALTHY | {"itc/train/loss": 4.15}
    assert judge([stuck] * 15) == set()
    assert judge([stuck] * 30, warmup_steps=400.0) == set()


def test_learnt_by_heart():
    checks = RunChecks(tiny.model("task_mlm_itm_itc_base").settings, [], 100)
    expected = {"itc": {"loss": 4.2, "i2t_accuracy": 1 / 64}}
    train = {"itc/train/i2t_accuracy": 0.9}
    assert [code for code, _ in checks.validated(train | {"itc/val/i2t_accuracy": 0.02}, expected)] == [
        "learnt_by_heart"
    ]
    assert not list(checks.validated(train | {"itc/val/i2t_accuracy": 0.5}, expected))


def test_frozen_parts():
    model = tiny.model("task_mlm_itm_itc_base")
    parts = gauges.trained_parts(model)
    assert set(gauges.PARTS) | {"heads"} == set(parts)
    everything = {id(p) for p in model.parameters()}
    assert not list(frozen_findings(parts, everything))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp_text" not in name and "norm2_text" not in name)
    ((code, sentence),) = frozen_findings(parts, everything)
    assert code == "frozen" and "text expert" in sentence


def test_a_contrast_that_sees_one_pass_of_many():
    def said(config="task_mlm_itm_itc_base", **options):
        model = tiny.model(config, batch_size=64, **options)
        return [code for code, _ in few_negatives(model.settings, model.tasks)]

    assert said(per_gpu_batchsize=16) == ["few_negatives"]
    assert said(per_gpu_batchsize=32) == said(per_gpu_batchsize=16, contrast_cache=True) == []
    assert said("task_finetune_nlvr2_base", per_gpu_batchsize=16) == []


def test_stage_2_freezes_on_purpose():
    model = tiny.model("task_textmlm_base")
    assert not list(frozen_findings(gauges.trained_parts(model), {id(p) for p in model.parameters()}))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_effective_rank():
    torch.manual_seed(0)
    line = torch.randn(50, 1) @ torch.randn(1, 20)
    assert float(gauges.effective_rank(line)) == pytest.approx(1, abs=1e-3)
    assert 12 < float(gauges.effective_rank(torch.randn(2000, 20))) <= 20
    wide = torch.randn(10, 100)
    by_values = torch.linalg.svdvals(wide - wide.mean(0)).square()
    assert float(gauges.effective_rank(wide)) == pytest.approx(float(by_values.sum() ** 2 / by_values.square().sum()))


def test_gauges_measure_without_reading_the_device(monkeypatch):
    monkeypatch.setattr(block, "leaves_out_rows", lambda x: False)
    model = tiny.model("task_mlm_itm_itc_base").train()
    batch = tiny.batch() | {"raw_index": torch.arange(3)}
    for task in model.tasks:
        batch |= task.derive(batch)
    parts, seen = gauges.trained_parts(model), Seen()
    features = gauges.FeatureGauges({"pooler": model.pooler, "itm_score": model.itm_score})
    update = gauges.UpdateGauge(parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(output.loss for output in model(batch).values())  # (what is made once is made)
    features.on = True
    with NoReads():
        seen.add(batch, 3)
        sum(output.loss for output in model(batch).values()).backward()
        norms = gauges.gradient_norms(parts)
        update.before()
        optimizer.step()
        change = update.after()
        measured = features.measure(torch.device("cpu"))
    everything = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(torch.stack(list(norms.values())).norm()) == pytest.approx(float(everything), rel=1e-4)
    assert 0 < float(change) < 1 and update.after() is None
    assert float(measured["pooler/feature_norm"]) > 0
    assert not features.measure(torch.device("cpu"))  # (of passes since)
    features.remove()


def features_of(rows, heads):
    gauge = gauges.FeatureGauges(heads)
    gauge.on = True
    for name, each in rows.items():
        heads[name](each)
    measured = gauge.measure(torch.device("cpu"))
    gauge.remove()
    return {name: float(value) for name, value in measured.items()}


def test_two_processes_measure_as_one(tmp_path):
    """Also where one of them has no rows of a head; and they stop asking each other for samples together."""
    torch.manual_seed(0)
    rows = {"pooler": torch.randn(12, 8), "mlm_score": torch.randn(5, 6)}
    heads = {"pooler": torch.nn.Linear(8, 2), "mlm_score": torch.nn.Linear(6, 2), "itm_score": torch.nn.Linear(4, 2)}
    batch = samples(64)

    def work(rank):
        own = {"pooler": rows["pooler"][7 * rank : 7 + 7 * rank]} | ({} if rank else {"mlm_score": rows["mlm_score"]})
        seen, asked = Seen(limit=64), []
        for start in range(16 * rank, 64, 32):
            seen.add({name: value[start : start + 16] for name, value in batch.items()}, 16)
            asked.append(seen.fetch())
        return features_of(own, heads), asked, seen.fetch(), sorted(seen.column("raw_index").tolist())

    expected = features_of(rows, heads)
    assert set(expected) == {f"{head}/{key}" for head in rows for key in ("feature_norm", "effective_rank", "spread")}
    for found, asked, more, numbers in in_processes(work, tmp_path):
        assert found == pytest.approx(expected, rel=1e-5)
        assert asked == [True, True] and not more and numbers == list(range(64))


# --- one batch --------------------------------------------------------------------------------------------------------


def test_verdicts_on_one_batch():
    curves = {
        "zero": LossCurve("itc", 2.0, [2.1, 1.0, 0.01, 0.01, 0.01, 0.01, 0.01]),
        "falls": LossCurve("itc", 2.0, [2.1] + [1.0] * 5),
        "stuck": LossCurve("itc", 2.0, [2.1] + [2.0] * 5),
    }
    assert all(curve.verdict == verdict for verdict, curve in curves.items())
    assert LossCurve("mine", None, [4.0] + [0.1] * 5).verdict == "zero"
    assert diagnosis([curves["zero"], curves["falls"]]) is None
    assert "itc" in diagnosis([curves["stuck"]])
    assert "learning rate" in diagnosis([LossCurve("itc", 2.0, [2.0] + [9.0] * 5)])
    assert "--seconds" in diagnosis([])
