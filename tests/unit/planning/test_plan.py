"""The planner: its parts add up; operations are torch's count, bytes the ledger's; the largest batch is the largest."""

import pytest
import torch

from tests import tiny
from vlmo import doctor
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.planning import DEVICES, Planner, plan_run
from vlmo.planning.communication import STRATEGIES, ledger
from vlmo.planning.compute import counter, hours
from vlmo.planning.devices import device
from vlmo.planning.memory import memory_of, strategy_of
from vlmo.planning.step import LiveMemory, step_cost, synthetic_batch
from vlmo.settings import Settings

STAGE1, STAGE2, STAGE3 = "task_mim_base", "task_textmlm_base", "task_mlm_itm_itc_base"
VQA, NLVR2 = "task_finetune_vqa_base_image480", "task_finetune_nlvr2_base_image384"
RETRIEVAL = "task_finetune_irtr_coco_base_image384"


def settings(name, **options):
    return Settings.from_config(tiny.config(name, **options))


def on_gpus(name, **options):
    return settings(name, num_gpus=8, batch_size=64, precision="bf16", **options)


@pytest.fixture(scope="module")
def plan():
    return plan_run(on_gpus(STAGE3), [DEVICES["H100"]], mfu=0.5, samples=640)


def test_weights_gradients_and_optimizer_are_those_of_the_model(plan):
    model = VLMo(settings(STAGE3))
    trained = 4 * sum(parameter.numel() for _, parameter in model.trained_parameters())
    memory = plan.memory[plan.own]
    held = [*model.parameters(), *model.buffers()]
    assert memory.weights == sum(each.nbytes for each in held)
    assert (memory.gradients, memory.optimizer) == (trained, 2 * trained)
    assert memory.total == sum(memory.parts.values()) and min(memory.parts.values()) > 0


def test_variants_need_less_in_what_they_share_out_or_compute_again(plan):
    by_name = {(each.strategy, each.checkpointing): memory for each, memory in plan.memory.items()}
    assert set(by_name) == {(strategy, again) for strategy in STRATEGIES for again in (False, True)}
    whole, parts, zero1, zero2 = (by_name[strategy, False] for strategy in STRATEGIES)
    assert parts.gradients == whole.gradients // 8 and parts.optimizer == whole.optimizer // 8
    assert whole.weights / 8 < parts.weights < whole.weights / 2
    assert zero1.gradients == whole.gradients // 2 and zero2.gradients == zero1.gradients // 8
    # in 16 bits whole; in 32 bits, with Adam's two numbers, in parts
    assert zero1.optimizer == 3 * whole.gradients // 8
    assert by_name["ddp", True].activations < whole.activations
    found = {(each.strategy, each.checkpointing): number for each, number in plan.largest["H100"].items()}
    assert found["ddp", True] > found["ddp", False] > found["deepspeed_stage_1", False] > 0


@pytest.mark.parametrize("name", [STAGE3, STAGE1, RETRIEVAL])
def test_operations_are_those_that_torch_counts_in_a_real_step(name):
    run = settings(name)
    model = VLMo(run).train()
    with counter() as counted:
        sum(output.loss for output in model(synthetic_batch(model, 4)).values()).backward()
    assert step_cost(run, 4).flops == counted.get_total_flops() > 0


def test_accumulated_passes_are_all_counted():
    one, three = (step_cost(settings(VQA, batch_size=4 * passes), 4) for passes in (1, 3))
    assert three.flops == 3 * one.flops


def test_bytes_are_the_ledgers(plan):
    assert plan.collectives == ledger(on_gpus(STAGE3), 8)
    assert plan.bytes_sent == sum(each.sent for each in plan.collectives)
    # 3 nodes of 4 devices are planned as they are
    assert plan_run(settings(VQA, num_gpus=4, num_nodes=3, batch_size=48), []).bytes_sent > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_batch_is_the_largest(checkpointing):
    planner = Planner(settings(STAGE3, num_gpus=1, precision="bf16"))
    room = 60e6
    largest = planner.largest(room, checkpointing, "ddp")
    fits, too_many = (planner.memory(each, checkpointing, "ddp").total for each in (largest, largest + 1))
    assert largest > 8 and fits <= room < too_many
    assert planner.largest(1e6, checkpointing, "ddp") == 0  # the weights alone take more


def test_steps_hours_and_disk_of_the_run(plan):
    assert plan.steps == plan.settings.max_steps
    assert plan.hours["H100"] == hours(plan.steps, plan.flops, 989e12, 0.5)
    assert plan.checkpoints == 1 + -(-plan.steps // 10)  # one an epoch of 640 samples, and the last
    assert plan.checkpoint > 2.5 * plan.weights_file
    unknown = plan_run(settings(VQA, max_steps=None), [])
    assert (unknown.steps, unknown.hours, unknown.checkpoints) == (None, {}, None)
    assert "--samples" in str(unknown)


def test_every_task_and_way_can_be_planned():
    for name in (STAGE2, VQA, NLVR2):
        assert memory_of(settings(name)).activations > 0
    for options in ({"layout_invariant": True}, {"contrast_cache": True, "batch_size": 8}, {"compile": True}):
        assert memory_of(settings(STAGE3, **options)).activations > 0


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "base_plus", "large"])
def test_every_size_can_be_planned(size):
    run = on_gpus(STAGE3, model_arch=f"vlmo_{size}_patch16")
    again, whole = (Planner(run).memory(4, checkpointing) for checkpointing in (True, False))
    assert 1e9 < again.total < whole.total


def test_live_memory_is_what_lives_at_the_same_time():
    with LiveMemory() as memory:
        a = torch.ones(1000)
        b = a.view(10, 100)
        del a
        assert memory.live == 4000
        c = b + 1
        del b
        assert (memory.live, memory.peak) == (4000, 8000)
        del c
    assert memory.live == 0


def test_strategies():
    assert strategy_of(settings(VQA)) == "ddp"
    assert strategy_of(settings(VQA, use_sharded_training=True, num_gpus=1)) == "deepspeed_stage_1"
    assert strategy_of(settings(VQA, strategy="deepspeed_stage_2", num_gpus=1)) == "deepspeed_stage_2"
    with pytest.raises(VLMoError, match="dp2"):
        strategy_of(settings(VQA).model_copy(update={"strategy": "ddp2"}))


def test_every_device_has_a_source():
    assert all(each.source and each.memory and each.teraflops for each in DEVICES.values())
    assert device("h100") is DEVICES["H100"]


def words(**options):
    return [f"{name}={value}" for name, value in (tiny.SMALL | {"num_gpus": 1} | options).items()]


def test_the_command_prints_the_plan(capsys):
    options = ["--device", "l40s", "--memory", "6", "--mfu", "0.4"]
    status = doctor.main(["plan", *options, "with", VQA, *words(max_steps=9)])
    out = capsys.readouterr().out
    assert status == 0
    for shown in ("weights", "activations", "L40S", "6 GB", "at 40% of the peak", "9 steps", "TFLOP a device"):
        assert shown in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--device", "H1000", "with", VQA], "H100"),
        (["--mfu", "35", "with", VQA], "share"),
        (["--memory", "-1", "with", VQA], "--memory -1"),
        (["--memory", "much", "with", VQA], "much"),
        (["--samples", "0", "with", VQA], "--samples 0"),
        (["--gpus", "8", "with", VQA], "--gpus"),
        (["task_mlm_itm_itc_base"], "plan with"),
        (["with", VQA, "per_gpu_batchsiz=3"], "per_gpu_batchsize"),
        (["with", "task_vqa"], "no such named config"),
        (["with", VQA, "num_gpus=3"], "batch_size"),
        (["with", VQA, "test_only=True", "load_path=x"], "test_only"),
        (["with", VQA, "strategy=horovod"], "horovod"),
    ],
)
def test_a_mistake_gets_one_line(line, said, capsys):
    assert doctor.main(["plan", *line]) == 2
    captured = capsys.readouterr()
    (message,) = captured.err.splitlines()
    assert said in message and not captured.out
