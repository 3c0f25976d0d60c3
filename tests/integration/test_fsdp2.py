"""strategy=fsdp2 on CPU processes: DDP's numbers, and checkpoints that any strategy and number of processes goes on
from."""

import csv
import time
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.processes import TIMEOUT, run_on, start_on
from vlmo import checkpoint
from vlmo.checkpoints import files, sharded
from vlmo.settings import Settings
from vlmo.training.checkpointing.atomic_io import AtomicCheckpointIO
from vlmo.training.checkpointing.checkpoints import Checkpoints
from vlmo.training.checkpointing.files import newest_intact

STAGE3, RETRIEVAL, TEXT = "task_mlm_itm_itc_base", "task_finetune_irtr_coco_base_image384", "task_textmlm_base"


@pytest.fixture
def configured(data, micro, tmp_path):
    """The config of a run on so many processes."""

    def made(name, world, strategy, named=RETRIEVAL, **options):
        defaults = {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "log_dir": str(tmp_path / name)}
        defaults |= {"datasets": ["wikibk" if named == TEXT else "coco"], "model_arch": micro, "max_text_len": 16}
        defaults |= {"batch_size": 12, "max_steps": 2, "max_epoch": 100}
        defaults |= {"learning_rate": 1e-3, "warmup_steps": 0, "val_check_interval": 100, "get_recall_metric": False}
        defaults |= {"contrast_gradient": "exact", "log_every_n_steps": 1, "loggers": ["csv"], "strategy": strategy}
        return tiny.config(
            named, **({"per_gpu_batchsize": options.get("batch_size", 12) // world} | defaults | options)
        )

    return made


@pytest.fixture
def train(configured, tmp_path):
    """Trains on so many processes; gives the folder of the run."""

    def trained(name, world, strategy, named=RETRIEVAL, **options):
        run_on(world, configured(name, world, strategy, named, **options), tmp_path / f"{name} processes")
        (folder,) = (tmp_path / name).glob("*/version_*")
        return folder

    return trained


def logged(folder, tag="train/loss"):
    with (folder / "metrics.csv").open() as file:
        return [float(row[tag]) for row in csv.DictReader(file) if row[tag]]


def content(path):
    """Weights and state of the optimizer by place, whatever form they are in."""
    saved = AtomicCheckpointIO().load_checkpoint(path)
    return sharded.take_apart(saved)[1]


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def difference(one, other):
    """The largest of any tensor, by the largest value in it."""
    assert one.keys() == other.keys()
    assert all(one[key].shape == other[key].shape for key in one)
    pairs = [(one[key].double(), other[key].double()) for key in one]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """Has the state that a run goes on from kept, as it is in all its processes together; gives it."""
    path, begin = tmp_path / "loaded.pt", Checkpoints.on_train_start

    def on_train_start(callback, trainer, model):
        begin(callback, trainer, model)
        state = {"state_dict": trainer.strategy.lightning_module_state_dict()}
        state["optimizer_states"] = [trainer.strategy.optimizer_state(each) for each in trainer.optimizers]
        tensors = {key: sharded_whole(tensor) for key, tensor in sharded.take_apart(state)[1].items()}
        if trainer.is_global_zero:
            torch.save(tensors, path)

    monkeypatch.setattr(Checkpoints, "on_train_start", on_train_start)
    return lambda: torch.load(path)


def sharded_whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_trains_evaluates_and_saves_as_ddp_and_one_process_goes_on(train, loaded, data, tmp_path):
    options = {"val_check_interval": 1, "get_recall_metric": True, "gradient_clip_val": 1.0, "drop_path_rate": 0.1}
    expected, found = (train(strategy, 2, strategy, **options) for strategy in ("ddp", "fsdp2"))
    for tag in ("train/loss", "train/grad_norm", "irtr/val/loss", "recalls/val_avg"):
        assert logged(found, tag) == pytest.approx(logged(expected, tag), rel=1e-5), tag
    assert len(logged(found, "recalls/val_avg")) == 2  # gathered for an evaluation and shared out again, twice
    assert difference(content(last(found)), content(last(expected))) < 1e-3
    train("one", 1, "auto", resume_from=str(last(found)), max_steps=3)
    assert difference(loaded(), content(last(found))) == 0
    checkpoint.convert(str(last(found)), str(tmp_path / "one.ckpt"))
    assert difference(content(tmp_path / "one.ckpt"), content(last(found))) == 0
    checkpoint.convert(str(last(found)), str(tmp_path / "plain.pt"))
    assert files.read(tmp_path / "plain.pt").tensors.keys() == files.read(last(found)).tensors.keys()


@pytest.mark.slow
@pytest.mark.parametrize("before", ["ddp", "fsdp2"])
def test_any_number_of_processes_and_strategy_goes_on(train, loaded, before):
    options = {"drop_path_rate": 0.0, "max_steps": 4}
    through = train("through", 2, before, checkpoint_every_n_steps=2, **options)
    (start,) = through.glob("checkpoints/*-step=2.ckpt")
    for world in (1, 2, 3):
        for strategy in ("ddp", "fsdp2"):
            after = "auto" if (world, strategy) == (1, "ddp") else strategy
            end = train(f"{after} {world}", world, after, resume_from=str(start), **options)
            assert difference(loaded(), content(start)) == 0, (strategy, world)
            curve = max(abs(a - b) / b for a, b in zip(logged(end), logged(through)[2:], strict=True))
            final = difference(content(last(end)), content(last(through)))
            print(f"{before} on 2 -> {after} on {world}: loaded alike, losses {curve:.1e}, state {final:.1e}")
            assert curve < 1e-5
            assert final < 1e-4


@pytest.mark.slow
def test_a_layout_invariant_curve_is_the_same_sharded(train):
    options = {
        "layout_invariant": True,
        "drop_path_rate": 0.2,
        "batch_size": 10,
        "per_gpu_batchsize": 3,
        "max_steps": 6,
    }
    expected = train("one", 1, "auto", STAGE3, **options)
    for world in (2, 3):  # (of three processes, one has a sample and a chunk more)
        found = train(f"sharded {world}", world, "fsdp2", STAGE3, checkpoint_every_n_steps=3, **options)
        assert logged(found) == pytest.approx(logged(expected), rel=1e-5)
        assert difference(content(last(found)), content(last(expected))) < 1e-2
        (middle,) = found.glob("checkpoints/*-step=3.ckpt")
        other = train(f"from {world}", 5 - world, "fsdp2", STAGE3, resume_from=str(middle), **options)
        assert logged(other) == pytest.approx(logged(expected)[3:], rel=1e-5)


WAYS = {
    "stage 3": (STAGE3, {}),
    "accumulated": (STAGE3, {"per_gpu_batchsize": 2}),
    "contrast cache": (STAGE3, {"contrast_cache": True, "per_gpu_batchsize": 2}),
    "layout invariant": (STAGE3, {"layout_invariant": True, "per_gpu_batchsize": 2}),
    "activation checkpoints": (STAGE3, {"activation_checkpointing": True, "drop_path_rate": 0.2}),
    "stage 2": (TEXT, {"drop_path_rate": 0.2, "val_check_interval": 1, "batch_size": 4, "per_gpu_batchsize": 2}),
    "cpu offload": (STAGE3, {"strategy": "fsdp2_cpu_offload"}),
    "bf16": (STAGE3, {"precision": "bf16"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_gives_the_numbers_of_ddp(train, way):
    named, options = WAYS[way]
    expected = train("ddp", 2, named=named, **options | {"strategy": "ddp"})
    found = train("fsdp2", 2, named=named, **{"strategy": "fsdp2"} | options)
    assert logged(found) == pytest.approx(logged(expected), rel=1e-5 if way != "bf16" else 1e-2)
    assert difference(content(last(found)), content(last(expected))) < (1e-2 if way != "bf16" else 0.5)


def kill_while_it_writes(config, folder, writes, seconds):
    """Starts a run on two processes that writes after every step, and kills both so long after it began to write its
    checkpoint of such a number; whether something half written is left."""
    log_dir, seen = Path(config["log_dir"]), set()
    before = set(log_dir.glob(UNFINISHED))
    processes = start_on(2, config, folder)
    end = time.monotonic() + TIMEOUT
    while len(seen) < writes and time.monotonic() < end and all(process.is_alive() for process in processes):
        seen |= set(log_dir.glob(UNFINISHED)) - before
        time.sleep(0.001)
    time.sleep(seconds)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert len(seen) >= writes, [path.read_text()[-2000:] for path in folder.glob("*.txt")]
    return any(log_dir.glob(UNFINISHED))


UNFINISHED = "*/version_*/checkpoints/*.part"


def kills(configured, folder, strategy, number):
    """Kills a run so often; gives how many of the kills left something half written."""
    options = {"resume_during_training": True, "checkpoint_every_n_steps": 1, "keep_last": 3, "batch_size": 4}
    config = configured("run", 2, strategy, STAGE3, max_steps=100_000, max_epoch=100_000, **options)
    halfway, steps = 0, [0]
    for attempt in range(number):
        halfway += kill_while_it_writes(config, folder / str(attempt), writes=2, seconds=0.002 * attempt)
        found = sorted((folder / "run").glob("*/version_*/checkpoints/*.ckpt"))
        contents = [AtomicCheckpointIO().load_checkpoint(path) for path in found]  # whatever has its name is whole
        steps.append(max(saved["global_step"] for saved in contents))
        assert steps[-1] > steps[-2]  # it went on from there
        assert newest_intact(Settings.from_config(config), "")
    return halfway


def test_killed_while_it_writes_in_the_background(configured, tmp_path, caplog):
    kills(configured, tmp_path, "fsdp2", 1)
    assert "damaged" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_killed_twenty_times_while_it_writes_in_the_background(configured, tmp_path, caplog, strategy):
    halfway = kills(configured, tmp_path, strategy, 20)
    print(f"{strategy}: {halfway} of 20 kills left something half written")
    assert "damaged" not in caplog.text
    assert halfway >= 5


@pytest.mark.slow
def test_siglip_frozen_parts_and_a_limited_scale(train):
    options = {"contrast_loss": "siglip", "freeze": ["text_embeddings.*"], "logit_scale_max": 10.02, "max_steps": 3}
    expected, found = (train(strategy, 2, strategy, learning_rate=1e-2, **options) for strategy in ("ddp", "fsdp2"))
    for tag in ("train/loss", "irtr/train/logit_scale"):
        assert logged(found, tag) == pytest.approx(logged(expected, tag), rel=1e-4), tag
    assert max(logged(found, "irtr/train/logit_scale")) <= 10.02 * (1 + 1e-6)
