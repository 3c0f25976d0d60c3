"""The benchmarks: each is a command; their oracle, the published way of a step, gives the same losses and gradients."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step, workload
from benchmarks.flops import StepFlops
from benchmarks.reference import Reference, adamw_step
from benchmarks.step import hardest
from tests import tiny
from tests.unit.modules.test_attention import plain
from vlmo.modules import attention
from vlmo.tasks import itm
from vlmo.training import optimizer as optim

TASKS = (
    "task_mlm_itm_itc_base",
    "task_textmlm_base",
    "task_finetune_vqa_base_image480",
    "task_finetune_nlvr2_base",
    "task_finetune_irtr_coco_base_image384",
)


ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("name", COMMANDS)
def test_is_called_as_a_module_and_says_what_it_does(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert ended.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out


@pytest.mark.parametrize("options, ways", [((), 2), (("--alone",), 1)])
def test_a_step_of_both_ways_or_one_is_measured(options, ways, monkeypatch, capsys):
    words = ["task_textmlm_base", "model_arch=vlmo_tiny_patch16", "vocab_size=2000", "num_gpus=0", "precision=32"]
    words += ["per_gpu_batchsize=2", "--texts", "passages", "--steps", "1", "--warm-up", "0", "--no-memory", *options]
    monkeypatch.setattr("sys.argv", ["step", *words])
    step.main()
    printed = capsys.readouterr().out
    assert "passages" in printed
    assert ("losses published / here" in printed) == (ways == 2)


def batch_of(task, **options):
    return tiny.batch(images=("image_0", "image_1") if "nlvr2" in task else ("image",), **options)


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_gradients_of_both_ways(task, monkeypatch):
    monkeypatch.setattr(itm, "draw_negatives", hardest)
    model, batch = tiny.model(task), batch_of(task)
    published = Reference(model, hardest=True).losses(batch)
    here = {name: output.loss for name, output in model(batch).items()}
    assert set(here) == set(published)
    for name, loss in published.items():
        assert here[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    names, parameters = zip(*model.trained_parameters(), strict=True)
    gradients = [torch.autograd.grad(sum(losses.values()), parameters) for losses in (published, here)]
    for name, expected, found in zip(names, *gradients, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-8), name


def test_the_published_optimizer_is_ours():
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2)]
    ours, published = (
        optim.build_optimizer("adamw", [{"params": [p], "lr": 1e-4, "weight_decay": 0.1}], 1e-4) for p in parameters
    )
    for update in range(1, 4):
        for parameter in parameters:
            parameter.grad = torch.arange(6.0) / update
        ours.step()
        adamw_step(published, update)
    assert torch.allclose(*parameters, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_operations_are_those_that_are_done(task, monkeypatch):
    monkeypatch.setattr(attention, "attend", plain)  # (of matrix products, which the counter knows)
    model = tiny.model(task, image_size=64)
    batch = batch_of(task, image_size=64, lengths=(16, 16, 16))  # without padding, which is no useful work
    with FlopCounterMode(display=False) as counter:
        sum(output.loss for output in model(batch).values()).backward()
    done = counter.get_total_flops()
    assert 0.9 * done < StepFlops(model)(batch) < 1.01 * done  # stage 3 embeds a picture for each pass
    assert len({StepFlops(model)(batch_of(task, image_size=64, padded=padded)) for padded in (12, 16)}) == 1


def test_batches_have_the_asked_lengths_and_are_the_same_in_every_run():
    settings = tiny.model("task_mlm_itm_itc_base").settings.model_copy(update={"vocab_size": 2000})
    first, again = (next(workload.batches(settings, [5, 9], workers=0)) for _ in range(2))
    assert set(first["text_masks"].sum(1).tolist()) <= {5, 9}
    assert first["image"].shape == (4, 3, 32, 32)
    assert ((first["text_labels_mlm"] != -100).sum(1) == 1).all()
    assert torch.equal(first["text_ids"], again["text_ids"])


def test_lengths_from_texts(tmp_path):
    from tests import tables

    tables.write_vocabulary(tmp_path)
    (tmp_path / "lines.txt").write_text("a\n\na a a\n")
    settings = tiny.model("task_mlm_itm_itc_base").settings.model_copy(
        update={"tokenizer": str(tmp_path / "vocab.txt")}
    )
    lengths, source = workload.text_lengths(settings, str(tmp_path / "lines.txt"))
    assert len(lengths) == 2 and lengths[0] < lengths[1]
    assert source.startswith("lines.txt, mean ")
