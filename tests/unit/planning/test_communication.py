"""The ledger of communication: its numbers are those worked out by hand; what it does not know, it refuses."""

import json

import pytest
import torch
import torch.distributed as dist

from benchmarks import collectives as command
from benchmarks.collectives import published, total
from tests import tiny
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.planning.communication import laid_out, ledger
from vlmo.planning.recording import Collective, Recorder
from vlmo.registry import TASKS
from vlmo.settings import Settings
from vlmo.training.unused_parameters import unused_parameters

STAGE3, STAGE2, VQA = "task_mlm_itm_itc_base", "task_textmlm_base", "task_finetune_vqa_base_image480"
RETRIEVAL = "task_finetune_irtr_coco_base_image384"
WORLD, PAIRS, PIXELS, WIDTH = 8, 4, 3 * 32 * 32, 96


def settings(name, **options):
    return Settings.from_config(tiny.config(name, **options))


def trained(run):
    return sum(parameter.numel() for _, parameter in VLMo(run).trained_parameters())


@pytest.fixture(scope="module")
def stage3():
    return ledger(settings(STAGE3), WORLD)


def of(found, what):
    return next(each for each in found if each.what == what)


def test_ddp_sums_the_gradients_of_what_is_trained_once_a_step(stage3):
    gradients = of(stage3, "gradients")
    # 2 (w - 1) / w of the buffer, float32
    assert gradients.sent == gradients.received == 2 * 7 * 4 * trained(settings(STAGE3)) // 8
    assert gradients.operation == "all-reduce" and gradients.count >= 1


def test_a_pass_gathers_features_texts_and_images_in_the_form_they_travel_in(stage3):
    features = of(stage3, "contrast features")  # of both branches, image and text together, float32
    assert features == Collective("all-gather", "contrast features", 2, *[2 * 7 * PAIRS * 2 * WIDTH * 4] * 2)
    assert of(stage3, "ITM texts").sent == 7 * PAIRS * 24 * 2  # two bytes a token
    assert of(stage3, "ITM images").sent == 7 * PAIRS * PIXELS  # a byte a colour
    assert of(stage3, "sizes (CPU)").sent == 7 * 3 * 8  # three int64


def test_metrics_travel_together_once_a_step(stage3):
    ratios = sum(len(TASKS[name].metrics) for name in ("itc", "itm", "mlm"))
    assert of(stage3, "metrics") == Collective("all-reduce", "metrics", 1, *[2 * 7 * ratios * 16 // 8] * 2)


def test_every_collective_of_a_step_has_a_purpose(stage3):
    losses = {"gradients", "contrast features", "which images are the same", "ITM images", "ITM texts", "sizes (CPU)"}
    run = {"metrics", "finite check", "shall it stop", "shall it stop (Lightning)"}
    assert {each.what for each in stage3} == losses | run


def test_a_single_process_sends_nothing():
    assert ledger(settings(STAGE3), 1) == published(settings(STAGE3), 1) == []


def test_accumulated_passes_exchange_features_each_and_gradients_once():
    run = settings(RETRIEVAL)
    one, three = ledger(run, WORLD), ledger(run.model_copy(update={"batch_size": 3 * WORLD * PAIRS}), WORLD)
    assert of(three, "contrast features").sent == 3 * of(one, "contrast features").sent
    assert of(three, "gradients") == of(one, "gradients")
    assert of(three, "metrics") == of(one, "metrics")


def test_what_a_task_sends_is_in_the_ledger_by_itself(monkeypatch):
    loss = TASKS["vqa"].loss

    def loss_of_all(task, step, encoded):
        dist.all_reduce(torch.zeros(1000))
        return loss(task, step, encoded)

    monkeypatch.setattr(TASKS["vqa"], "loss", loss_of_all)
    found = of(ledger(settings(VQA), WORLD), "test_communication.loss_of_all")
    assert found == Collective("all-reduce", "test_communication.loss_of_all", 1, 7000, 7000)


def test_fsdp2_gathers_weights_and_scatters_gradients():
    run = settings(STAGE2)
    model, found = VLMo(run), ledger(run, WORLD, "fsdp2")
    used = {name: each.numel() for name, each in model.named_parameters() if name not in unused_parameters(model)}
    blocks = sum(size for name, size in used.items() if ".blocks." in name)
    part = 7 * 4 / 8
    gradients, weights = of(found, "gradients"), of(found, "weights")
    assert (gradients.operation, weights.operation) == ("reduce-scatter", "all-gather")
    # (rows are padded to a multiple of the processes)
    assert part * trained(run) <= gradients.sent < 1.02 * part * trained(run)
    # frozen weights too; those of a block once more for the backward pass
    gathered = part * (sum(used.values()) + blocks)
    assert gathered <= weights.sent < 1.02 * gathered


@pytest.mark.parametrize(("stage", "sums"), [(1, 1), (2, 3)])
def test_zero_is_computed_from_the_trained_weights(stage, sums):
    run = settings(RETRIEVAL, precision=16).model_copy(update={"batch_size": 3 * WORLD * PAIRS})
    found = ledger(run, WORLD, f"deepspeed_stage_{stage}")
    part = 7 * 2 * trained(run) // 8
    gradients, weights = of(found, "gradients"), of(found, "weights")
    assert gradients.sent == pytest.approx(sums * 2 * part, abs=sums) and gradients.operation.endswith("(computed)")
    assert weights.sent == pytest.approx(part, abs=WORLD) and weights.operation.endswith("(computed)")


@pytest.mark.parametrize(
    ("world", "devices", "nodes", "batch"), [(4, 4, 1, 1024), (128, 8, 16, 1024), (1024, 8, 128, 4096)]
)
def test_worlds_are_nodes_of_eight_devices(world, devices, nodes, batch):
    run = laid_out(settings(STAGE3).model_copy(update={"batch_size": 1024}), world)
    assert (run.num_gpus, run.num_nodes, run.batch_size) == (devices, nodes, batch)


def test_what_is_not_known_is_refused():
    with pytest.raises(VLMoError, match="multiple"):
        laid_out(settings(STAGE3), 12)
    with pytest.raises(VLMoError, match="deepspeed_stage_2"):
        ledger(settings(STAGE3), WORLD, "horovod")


def test_a_collective_whose_bytes_are_not_known_is_refused(monkeypatch):
    def loss(task, step, encoded):
        dist.gather(torch.zeros(2), [torch.zeros(2) for _ in range(WORLD)])

    monkeypatch.setattr(TASKS["vqa"], "loss", loss)
    with pytest.raises(VLMoError, match="c10d::gather_"):
        ledger(settings(VQA), WORLD)
    assert not dist.is_initialized()


def test_large_new_tensors_have_no_data():
    with Recorder():
        assert type(torch.empty(2**10)) is torch.Tensor
        assert torch.empty(2**40).nbytes == 2**42


def test_the_published_way_gathers_all_images_in_float32():
    run = settings(STAGE3, image_size=224, per_gpu_batchsize=8, batch_size=1024)
    found = published(run, 128)
    assert of(found, "ITM images").sent == 127 * 8 * 3 * 224**2 * 4
    assert of(found, "ITM texts").sent == 2 * 127 * 8 * 24 * 8
    assert of(found, "contrast features").sent == 4 * 127 * 8 * WIDTH * 4
    assert total(found).sent == sum(each.sent for each in found)


def test_the_command_prints_and_writes_all_of_it(tmp_path, monkeypatch, capsys):
    options = [f"{name}={value}" for name, value in tiny.SMALL.items()]
    file = tmp_path / "ledger.json"
    monkeypatch.setattr("sys.argv", ["", VQA, *options, "--world", "8", "--json", str(file)])
    command.main()
    (result,) = json.loads(file.read_text())
    assert result["world"] == 8 and result["strategy"] == "ddp" and result["batch_size"] == 32
    shown = capsys.readouterr().out
    assert all(each["what"] in shown for each in result["here"]) and "batch 32 (for 4" in shown
