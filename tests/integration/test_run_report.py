"""The report of a run says what its files say: of one that was stopped and gone on from, too, and of several."""

import csv
import html
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytorch_lightning import Callback

from tests import tables, tiny
from tests.processes import run_on
from vlmo import report
from vlmo.errors import Stopped, VLMoError
from vlmo.training.run_report import record
from vlmo.training.run_report.history import History
from vlmo.training.run_report.process import is_alive, this_process

STAGE3 = "task_mlm_itm_itc_base"
TEXT = "task_textmlm_base"
REPOSITORY = Path(__file__).parents[2]


def points(page: str) -> dict[str, dict[int, float]]:
    """What the curves of a page say when they are pointed at, by title of the chart and name of the curve."""
    found: dict[str, dict[int, float]] = {}
    for figure in re.findall(r"<figure class=plot>(.*?)</figure>", page, re.S):
        title = html.unescape(re.search(r"<figcaption><b>(.*?)</b>", figure)[1])
        for name, step, value in re.findall(r"<title>([^<]*), step ([\d,]+): ([^<]*)</title>", figure):
            found.setdefault(f"{title}: {html.unescape(name)}", {})[int(step.replace(",", ""))] = float(value)
    return found


def read(folder: Path) -> str:
    return (folder / "report.html").read_text()


def same(curve: dict[int, float], logged: dict[int, float]) -> bool:
    return curve == {step + 1: pytest.approx(value, rel=1e-5) for step, value in logged.items()}


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def pairs(go):
    return go(STAGE3, datasets=["coco"], max_steps=4, val_check_interval=2, exp_name="pairs")


def test_numbers_samples_and_commands(pairs):
    page = read(pairs.folder)
    curves = points(page)
    assert same(curves["loss: train"], pairs.logged("train/loss"))
    assert same(curves["itc loss: val"], pairs.logged("itc/val/loss")) and len(curves["itc loss: val"]) >= 2
    assert same(curves["samples per sec: train"], pairs.logged("train/samples_per_sec"))
    rows = dict(re.findall(r"<td>([\d.]+(?: %)?)</td><td><small>([\w/]+)</small>", page))
    shown = {tag: value for value, tag in rows.items()}
    assert shown["itc/val/loss"] == f"{pairs.metrics['itc/val/loss']:.4f}"
    assert shown["mlm/val/accuracy"] == f"{100 * pairs.metrics['mlm/val/accuracy']:.2f} %"
    assert "<code>task_mlm_itm_itc_base</code>" in page and "<td>batch_size</td><td>4</td><td>1024</td>" in page
    assert page.count("<figure><img") == 8 and "a cat cat . 20" in page  # every caption of val
    assert f"--checkpoint {pairs.last}" in page and "resume_during_training=True" in page
    assert not re.search(r"(src|href)=(?!\"data:)|https?://|@import|url\(", page)
    saved = json.loads((pairs.folder / "record.json").read_text())
    assert saved["status"] == "ended" and saved["steps"] == 4 and len(saved["code"]["sha256"]) == 64
    assert {each["split"] for each in saved["data"]} == {"train", "val"} and saved["memory"]["process"] > 0


KILLED = {"datasets": ["coco"], "checkpoint_every_n_steps": 2, "val_check_interval": 3, "log_every_n_steps": 1}


def forked(go, folder, options):
    """A process with a run, and the size of its model."""

    def work():
        os.dup2(os.open(folder / "console.txt", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        go(STAGE3, log_dir=folder / "log", **options)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process.pid, {}


def by_run_py(go, folder, options):
    """The same of the command, whose models know no smaller size than tiny."""
    options = {**tiny.SMALL, **options, "max_epoch": 10_000, "log_dir": folder / "log", "loggers": ["csv"]}
    words = [f"{name}={value}" for name, value in options.items()]
    with (folder / "console.txt").open("w") as console:
        command = [sys.executable, "run.py", "with", STAGE3, *words]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=console, stderr=console)
    return process.pid, {"model_arch": tiny.SMALL["model_arch"]}


@pytest.mark.parametrize("start", [forked, pytest.param(by_run_py, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_gone_on_from(go, data, tmp_path, start):
    options = KILLED | {"data_root": str(data), "tokenizer": str(data / "vocab.txt")}
    pid, size = start(go, tmp_path, options | {"max_steps": 10_000})
    log_dir = tmp_path / "log"
    for _ in range(3000):
        if any(int(path.stem.rpartition("=")[2]) >= 4 for path in log_dir.glob("*/*/checkpoints/epoch=*.ckpt")):
            break
        time.sleep(0.02)
    (folder,) = log_dir.glob("*/version_0")
    report.main([str(folder)])
    while_it_ran = read(folder)
    os.kill(pid, signal.SIGKILL)
    while History.read(folder).status.startswith("still running"):
        time.sleep(0.02)
    report.main([str(folder)])  # nobody has waited for the process yet: it is a zombie
    page = read(folder)
    os.waitpid(pid, 0)
    assert "still running at" in while_it_ran and "did not end: its process is gone" in page
    assert "did not end: its process is gone" in (report.main([str(folder)]), read(folder))[1]
    with (folder / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    logged = {int(row["step"]): float(row["train/loss"]) for row in rows if row.get("train/loss")}
    assert same(points(page)["loss: train"], logged) and len(logged) >= 4
    saved = sorted(int(path.stem.rpartition("=")[2]) for path in folder.glob("checkpoints/epoch=*.ckpt"))
    last = max(saved[-1], max(logged) + 1)
    assert f"last step known: {last:,}" in page and "--samples" in page and "<figure><img" not in page

    assert report.main([str(folder), "--samples"]) == 0 and read(folder).count("<figure><img") == 8
    end = saved[-1] + 3
    resumed = go(STAGE3, log_dir=log_dir, resume_during_training=True, max_steps=end, **options, **size)
    page = read(resumed.folder)
    expected = {step: value for step, value in logged.items() if step < saved[-1]}
    assert same(points(page)["loss: train"], expected | resumed.logged("train/loss"))
    assert len(points(page)["loss: train"]) == end
    first, rest = page.split("version_0: did not end", 1)
    assert "<b>ended</b>" in first and "version_1: ended" in rest and f"step {saved[-1]:,}" in rest


@pytest.mark.parametrize("other", [{"boot": "another"}, {"namespace": "another"}, {"started": None}])
def test_a_run_of_another_machine(pairs, tmp_path, other):
    saved = json.loads((pairs.folder / "record.json").read_text())
    saved |= {"status": "running", "process": saved["process"] | other}
    (tmp_path / "record.json").write_text(json.dumps(saved))
    found = History.read(tmp_path).status
    assert found.startswith("unknown") and f"process {os.getpid()} on" in found


def test_a_process_with_the_number_of_another():
    own = this_process()
    assert is_alive(own) is True and is_alive(own | {"started": own["started"] - 1}) is False
    assert is_alive({}) is None


def test_without_validation(go, tmp_path):
    tables.write_captions(tmp_path, "sbu_0")
    run = go(STAGE3, datasets=["sbu"], data_root=str(tmp_path), max_steps=3)
    page = read(run.folder)
    assert same(points(page)["mlm loss: train"], run.logged("mlm/train/loss"))
    assert "mlm loss: val" not in points(page) and page.count("<figure><img") == 8


def test_runs_beside_each_other(pairs, go, tmp_path, capsys):
    other = go(STAGE3, datasets=["coco"], max_steps=4, val_check_interval=2, exp_name="pairs", learning_rate=1e-3)
    assert report.main([str(pairs.folder), str(other.last), "--out", str(tmp_path / "two.html")]) == 0
    page = (tmp_path / "two.html").read_text()
    options = re.search(r"<h2>What differs</h2>(.*?)</table>", page, re.S)[1]
    assert re.findall(r"<tr><td>(\w+)</td><td>(.*?)</td><td>(.*?)</td>", options) == [
        ("learning_rate", "0.0002", "0.001")
    ]
    curves = points(page)
    assert same(curves["loss, train: pairs version_0 (1)"], pairs.logged("train/loss"))
    assert same(curves["loss, train: pairs version_0 (2)"], other.logged("train/loss"))
    values = f"<td>{pairs.metrics['itc/val/loss']:.4f}</td><td>{other.metrics['itc/val/loss']:.4f}</td>"
    assert values in page


def test_a_run_that_was_stopped(go, tmp_path):
    with pytest.raises(Stopped):
        go(STAGE3, datasets=["coco"], log_dir=tmp_path, max_steps=6, callbacks=[Stop(2)])
    (path,) = tmp_path.glob("*/version_*/report.html")
    page = path.read_text()
    assert "stopped by SIGTERM at step 2" in page and len(points(page)["loss: train"]) == 2
    assert History.read(path.parent).steps == 2


class Break(Callback):
    def __init__(self, error: BaseException, step: int) -> None:
        self.error, self.step = error, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize(
    "error, said",
    [
        (TypeError("no <such> thing"), "failed: TypeError: no &lt;such&gt; thing"),
        (RuntimeError("Caught it:\nTraceback\nOSError: gone"), "failed: RuntimeError: Caught it: ... OSError: gone"),
        (VLMoError("too large; take less"), "failed: too large; take less"),
        (KeyboardInterrupt(), "interrupted by Ctrl-C"),
    ],
)
def test_a_run_that_failed(go, tmp_path, error, said):
    handled = signal.getsignal(signal.SIGINT)
    with pytest.raises((type(error), SystemExit)):
        go(TEXT, log_dir=tmp_path, max_steps=6, checkpoint_every_n_steps=1, callbacks=[Break(error, 2)])
    signal.signal(signal.SIGINT, handled)
    (path,) = tmp_path.glob("*/version_*/report.html")
    page = path.read_text()
    assert f"<b>{said}</b><br>2 steps done" in page and len(points(page)["loss: train"]) == 2
    assert "--samples" in page and "resume_during_training=True" in page and "made of" in page


def test_a_run_that_failed_before_its_first_step(go, tmp_path):
    class Refuse(Callback):
        def setup(self, *_, **__):
            raise KeyError("no room")

    with pytest.raises(KeyError):
        go(TEXT, log_dir=tmp_path, max_steps=6, callbacks=[Refuse()])
    (path,) = tmp_path.glob("*/version_*/report.html")
    assert "failed: KeyError: &#x27;no room&#x27;</b><br>0 steps done" in path.read_text()


@pytest.mark.slow
def test_samples_of_a_sharded_run(data, micro, tmp_path):
    options = {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "log_dir": str(tmp_path / "log")}
    options |= {"model_arch": micro, "datasets": ["coco"], "strategy": "fsdp2", "max_steps": 2, "per_gpu_batchsize": 2}
    run_on(2, tiny.config(STAGE3, **options), tmp_path / "processes")
    (path,) = tmp_path.glob("log/*/version_*/report.html")
    assert "no process has the whole model under strategy=fsdp2" in path.read_text()
    assert report.main([str(path.parent), "--samples"]) == 0 and path.read_text().count("<figure><img") == 8


def test_what_goes_wrong_with_the_report_is_one_line(go, monkeypatch, caplog):
    def refuse(*_):
        raise OSError("no room")

    monkeypatch.setattr(record, "write_report", refuse)
    with caplog.at_level(logging.ERROR):
        run = go(TEXT, max_steps=2)
    assert run.last.exists()
    assert {each.getMessage() for each in caplog.records} == {
        "the report of this run is not complete: OSError: no room"
    }


def test_warnings_and_what_was_left_out(go, caplog):
    run = go(TEXT, max_steps=2, max_epoch=None, callbacks=[Warns()])
    assert "<td>careful &lt;now&gt;</td><td>2 times</td>" in read(run.folder)


class Warns(Callback):
    def on_train_batch_end(self, *_):
        logging.getLogger("vlmo.test").warning("careful <now>")


def test_what_is_no_run(tmp_path):
    with pytest.raises(VLMoError, match="is no run"):
        report.report([tmp_path])
    assert report.main([str(tmp_path), "--out", str(tmp_path)]) == 2


def test_samples_that_cannot_be_made(pairs, tmp_path, capsys):
    (tmp_path / "record.json").write_text((pairs.folder / "record.json").read_text())
    assert report.main([str(tmp_path), "--samples"]) == 2 and "no checkpoint" in capsys.readouterr().err
    assert report.main([str(tmp_path), str(pairs.folder), "--samples"]) == 2
