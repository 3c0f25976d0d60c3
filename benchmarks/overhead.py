"""What surviving costs a training step: the time that its hooks take (place and random states kept, signals looked for,
loss and gradients checked), as a share of the step; what a checkpoint costs; and what the run's record and report do.

python -m benchmarks.overhead [--size base] [--batch 4] [--accumulate 2] [--steps 3] [--device cpu] [--ema-decay 0.9999]

Stage 3 on generated pictures. On a GPU each hook begins when the GPU has nothing left to do, so that it is its own time
that is measured, and what it makes the GPU wait for is in it.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning import Callback

from vlmo.config import resolve
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.modules import VLMo
from vlmo.settings import Settings
from vlmo.training.callbacks.ema import WeightAverages
from vlmo.training.callbacks.skipping import NonFinite
from vlmo.training.checkpointing.checkpoints import Checkpoints
from vlmo.training.environment import choose_environment
from vlmo.training.run_report import record as run_record
from vlmo.training.run_report.record import RunRecord
from vlmo.training.runner import Prepared, build_trainer
from vlmo.utils.write_own_captions import make_arrow

MEASURED = (Checkpoints, NonFinite, WeightAverages, RunRecord)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "green", "square"]
WARM_UP = 1  # steps that are not counted


def write_tables(folder: Path, pairs: int) -> None:
    """Pictures of one colour with their captions, and a vocabulary."""
    draw = np.random.default_rng(0)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    records = []
    for number in range(pairs):
        colour = tuple(int(value) for value in draw.integers(0, 256, 3))
        Image.new("RGB", (256, 256), colour).save(folder / f"{number}.png")
        caption = f"a {WORDS[6 + number % 3]} square"
        split = "train" if number else "val"
        records.append({"image": f"{number}.png", "caption": caption, "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    make_arrow(str(folder), str(folder / "tables"))


class Clock(Callback):
    """Sums up the seconds of each measured callback's hooks, of the steps, and of saving."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.once: Counter[str] = Counter()
        self.steps = 0
        self._begun = 0.0

    def watch(self, callback: Callback) -> None:
        """Times the hooks that run in every step."""
        for name in dir(callback):
            if name.startswith(("on_train_batch", "on_before")):
                key = type(callback).__name__
                setattr(callback, name, self.timed(self.seconds, key, getattr(callback, name)))

    @staticmethod
    def timed(seconds: Counter[str], key: str, function: Any) -> Any:
        """Gives the function, with what it takes added to `seconds[key]`."""

        def timed(*arguments: Any, **named: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = function(*arguments, **named)
            synchronize()
            seconds[key] += time.perf_counter() - start
            return result

        return timed

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == WARM_UP and not self._begun:
            self.seconds.clear()
            synchronize()
            self._begun = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        synchronize()
        self.steps = trainer.global_step - WARM_UP
        self.seconds["step"] = time.perf_counter() - self._begun

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        start = time.perf_counter()
        trainer.save_checkpoint(Path(trainer.log_dir) / "measured.ckpt")
        self.seconds["checkpoint"] = time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Trains for some steps and prints the table."""
    steps = options.steps + WARM_UP
    write_tables(folder, steps * options.batch * options.accumulate + 1)
    config = resolve(
        "task_mlm_itm_itc_base",
        model_arch=f"vlmo_{options.size}_patch16",
        datasets=["coco"],
        data_root=str(folder / "tables"),
        tokenizer=str(folder / "vocab.txt"),
        log_dir=str(folder / "log"),
        per_gpu_batchsize=options.batch,
        batch_size=options.batch * options.accumulate,
        max_steps=steps,
        num_workers=2,
        num_gpus=0 if options.device == "cpu" else 1,
        precision=32 if options.device == "cpu" else "bf16",
        val_check_interval=10**6,
        ema_decay=options.ema_decay,
    )
    settings = Settings.from_config(config)
    data, model = MTDataModule(settings), VLMo(config)
    environment = choose_environment(settings)
    record = RunRecord(settings, environment, data, model)
    trainer = build_trainer(Prepared(settings, environment, data, model, folder / "run"), [record])
    clock = Clock()
    record.on_train_start = clock.timed(clock.once, "begun", record.on_train_start)  # type: ignore[method-assign]
    run_record.sample_predictions = clock.timed(clock.once, "samples", run_record.sample_predictions)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MEASURED):
            clock.watch(callback)
    trainer.callbacks.insert(0, clock)  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=data)
    step = clock.seconds["step"] / clock.steps
    split = f"batch {options.batch} x {options.accumulate} accumulated"
    print(f"{options.size}, {options.device}, {split}, {torch.get_num_threads()} threads, {clock.steps} steps")
    print(f"{'':<14}{'ms a step':>12}{'share':>10}")
    names = [kind.__name__ for kind in MEASURED if kind.__name__ in clock.seconds]
    own = {name: clock.seconds[name] / clock.steps for name in names}
    for name, seconds in {"step": step, **own, "all of these": sum(own.values())}.items():
        print(f"{name:<14}{1000 * seconds:>12.2f}{seconds / step:>10.3%}")
    (size,) = (path.stat().st_size for path in folder.rglob("measured.ckpt"))
    print(f"a checkpoint of {size / 2**20:,.0f} MiB: {clock.seconds['checkpoint']:.2f} s")
    clock.timed(clock.once, "ended", record.end)(trainer, "ended", {})
    begun, ended, samples = (clock.once[name] for name in ("begun", "ended", "samples"))
    print(f"record and report: {begun:.2f} s at the start, {ended - samples:.2f} s at the end, {samples:.2f} s samples")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "base", "base_plus", "large"), default="base")
    parser.add_argument("--batch", type=int, default=4, help="pairs of a pass")
    parser.add_argument("--accumulate", type=int, default=2, help="passes of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ema-decay", type=float, default=0.0, help="also what averaging the weights takes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
