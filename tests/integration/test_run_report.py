"""The report of a run says what its files say: of one that was stopped and gone on from, too, and of several."""

import html
import json
import logging
import os
import re
import signal
from pathlib import Path

import pytest
from pytorch_lightning import Callback

from tests import tables
from vlmo import report
from vlmo.errors import Stopped, VLMoError
from vlmo.training.run_report import record
from vlmo.training.run_report.history import History

STAGE3 = "task_mlm_itm_itc_base"
TEXT = "task_textmlm_base"


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


def test_a_run_that_was_killed_and_gone_on_from(go, tmp_path):
    options = {"datasets": ["coco"], "val_check_interval": 2, "checkpoint_every_n_steps": 1}
    killed = go(STAGE3, log_dir=tmp_path, max_steps=6, **options)
    saved = json.loads((killed.folder / "record.json").read_text())
    begun = {name: saved[name] for name in ("started", "resumed_from", "resumed_at", "settings")}
    (killed.folder / "record.json").write_text(json.dumps({"status": "running", **begun}))
    (killed.folder / "report.html").unlink()
    with (killed.folder / "metrics.csv").open("a") as file:
        file.write("5,0.1")  # half of a line
    report.main([str(killed.folder)])
    assert "killed, or still running" in read(killed.folder)
    (path,) = (killed.folder / "checkpoints").glob("*-step=3.ckpt")
    first = killed.rows
    resumed = go(STAGE3, log_dir=tmp_path, max_steps=6, resume_from=str(path), **options)
    page = read(resumed.folder)
    expected = {int(row["step"]): row["train/loss"] for row in first if "train/loss" in row and row["step"] < 3}
    curves = points(page)
    assert same(curves["loss: train"], expected | resumed.logged("train/loss")) and len(curves["loss: train"]) == 6
    assert "version_0, then version_1" in re.sub(r"/\S*/", "", page) and "step 3" in page


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
