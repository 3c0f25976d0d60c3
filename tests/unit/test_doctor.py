"""The checklist: everything is looked at, nothing hides anything, and what it says is what the runner would say."""

import importlib.metadata
import shutil

import pytest
import torch

from tests import tables
from vlmo import doctor
from vlmo.config import resolve
from vlmo.modules import VLMo

TASK = "task_mlm_itm_itc_base"


@pytest.fixture
def diagnose(tmp_path, capsys):
    """Exit status and lines for a command line that is in order but for what is changed."""
    tables.write_coco(tmp_path)
    vocabulary = tables.write_vocabulary(tmp_path)
    good = {
        "data_root": tmp_path,
        "tokenizer": vocabulary,
        "vocab_size": 64,
        "model_arch": "vlmo_tiny_patch16",
        "datasets": ["coco"],
        "image_size": 32,
        "batch_size": 4,
        "per_gpu_batchsize": 4,
        "num_gpus": 0,
        "precision": 32,
        "max_steps": 3,
        "log_dir": tmp_path / "result",
    }

    def run(*named, **updates):
        words = [f"{name}={value}" for name, value in (good | updates).items()]
        status = doctor.main(["with", *(named or (TASK,)), *words])
        out = capsys.readouterr().out
        return status, out.splitlines()

    return run


def to_do(lines):
    """The texts of the list at the end."""
    return [line.split(". ", 1)[1] for line in lines[lines.index("what to do:") + 1 :]]


def test_ready(diagnose, tmp_path):
    status, lines = diagnose()
    assert (status, lines[-1]) == (0, "ready")
    assert {line[:4] for line in lines[:-1]} == {"[ok]"}
    text = "\n".join(lines)
    assert "coco train: 2 files, 8 rows, 16 texts; 8 images tried" in text
    assert "coco val: 1 file, 4 rows, 8 texts; 4 images tried" in text
    assert "51 tokens" in text
    assert "the run will write about 2 checkpoints of 0." in text
    assert "tensorboard, csv" in text
    assert not (tmp_path / "result").exists()


def test_no_problem_hides_another(diagnose, tmp_path):
    (tmp_path / "coco_caption_karpathy_restval.arrow").unlink()  # a warning
    train = tmp_path / "coco_caption_karpathy_train.arrow"
    train.write_bytes(train.read_bytes()[:-20])
    columns = {"image": [b"no image"] * 4, "caption": [["a"]] * 4}
    tables.write_table(tmp_path / "coco_caption_karpathy_val.arrow", columns)
    (tmp_path / "file").write_text("")
    status, lines = diagnose(
        batchsize=3,
        seed="abc",
        batch_size=6,
        tokenizer=tmp_path / "absent.txt",
        load_path=tmp_path / "absent.pt",
        resume_from=tmp_path / "absent.ckpt",
        log_dir=tmp_path / "file",
        strategy="dpp",
    )
    assert status == 2
    beginnings = [
        "batchsize: there is no such option; did you mean batch_size?",
        "seed='abc': must be a whole number",
        "batch_size=6: is not a multiple",
        "strategy='dpp': ",
        f"{train}: is not a complete Arrow file",
        f"tokenizer='{tmp_path}/absent.txt'",
        f"coco val: 4 of 4 sampled images cannot be decoded, such as {tmp_path}/coco_caption_karpathy_val.arrow: row 0",
        f"{tmp_path}/absent.pt: no such file",
        f"resume_from={tmp_path}/absent.ckpt: there is no such file",
        f"log_dir={tmp_path}/file: ",
    ]
    found = to_do(lines)
    assert len(found) == len(beginnings), found
    for beginning in beginnings:
        assert sum(line.startswith(beginning) for line in found) == 1, (beginning, found)


def test_an_unknown_task_is_all_that_is_said_of_the_run(diagnose):
    status, lines = diagnose("task_mlm_itm_itc_bas")
    assert status == 2
    (line,) = to_do(lines)
    assert "did you mean task_mlm_itm_itc_base" in line


def test_names_that_do_not_exist(diagnose):
    status, lines = diagnose(model_arch="vlmo_bas_patch16", datasets=["coco", "cocoo"])
    assert status == 2
    unknown = [line.split(" is unknown")[0] for line in to_do(lines)]
    assert sorted(unknown) == ["datasets: 'cocoo'", "model_arch: 'vlmo_bas_patch16'"]
    assert any("coco train: 2 files" in line for line in lines)
    assert sum(line.startswith("[--]") for line in lines) == 1  # the model


def test_damaged_images_are_a_warning_while_they_are_few(diagnose, tmp_path):
    images = [tables.png(row) for row in range(7)] + [tables.png(7)[:50]]
    columns = {"image": images, "caption": [["a"]] * 8}
    tables.write_table(tmp_path / "coco_caption_karpathy_train.arrow", columns)
    status, lines = diagnose()
    assert (status, lines[-1]) == (0, "ready")
    assert any(line.startswith("[!!]") and "1 of 12 sampled images cannot be decoded" in line for line in lines)


def test_fit_of_a_checkpoint(diagnose, tmp_path):
    options = {"model_arch": "vlmo_tiny_patch16", "vocab_size": 64, "datasets": ["coco"]}
    torch.save(VLMo(resolve(TASK, image_size=48, **options)).state_dict(), tmp_path / "stage3.pt")
    status, lines = diagnose(load_path=tmp_path / "stage3.pt")
    assert status == 0
    text = "\n".join(lines)
    assert "relative_position_bias_table: window 3 -> 2" in text
    status, lines = diagnose(load_path=tmp_path / "stage3.pt", model_arch="vlmo_base_patch16")
    (line,) = to_do(lines)
    assert line.endswith("set model_arch=vlmo_tiny_patch16 or give another load_path")
    tables.write_nlvr2(tmp_path)
    updates = {"load_path": tmp_path / "stage3.pt", "datasets": ["nlvr2"], "test_only": True}
    status, lines = diagnose("task_finetune_nlvr2_base", **updates)
    (line,) = to_do(lines)
    assert "lacks nlvr2_classifier" in line


def test_disk(diagnose, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**8, 0, 10**7))
    status, lines = diagnose()
    (line,) = to_do(lines)
    assert "has 0.0 GB free; give another log_dir" in line
    assert diagnose(fast_dev_run=True)[0] == 0  # writes nothing


def test_the_estimate_follows_the_optimizer(diagnose):
    def size(**updates):
        (line,) = (line for line in diagnose(model_arch="vlmo_base_patch16", **updates)[1] if "checkpoints of" in line)
        return float(line.split("checkpoints of ")[1].split()[0])

    assert size(optim_type="adan") > size() > size(optim_type="sgd")


def test_optimizers_and_loggers_that_do_not_exist(diagnose):
    status, lines = diagnose(optim_type="lionn", loggers=["csv", "wanbd"])
    assert status == 2
    assert sorted(line.split(":")[0] for line in to_do(lines)) == ["loggers", "optim_type"]


def test_packages(diagnose, monkeypatch):
    versions = {"torch": "1.8.0", "timm": None}
    installed = importlib.metadata.version

    def version(name):
        found = versions.get(name, installed(name))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, lines = diagnose()
    assert status == 2
    assert [line.split(":")[0] for line in to_do(lines)] == ["torch 1.8.0", "timm"]
    del versions["timm"]  # with everything there, the rest is looked at too
    status, lines = diagnose(batch_size=6)
    assert [line.split(":")[0] for line in to_do(lines)] == ["torch 1.8.0", "batch_size=6"]
    monkeypatch.setattr(doctor, "REQUIREMENTS", doctor.REQUIREMENTS / "absent")  # installed without the repository
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2", "pytest>=99; extra == 'test'"])
    assert to_do(diagnose()[1]) == ["torch 1.8.0: >=2 is needed: pip install -r requirements.txt"]


def test_usage(capsys):
    assert doctor.main(["--help"]) == 0
    assert doctor.main(["task_mlm_itm_itc_base"]) == 2
    assert "python -m vlmo.doctor with" in capsys.readouterr().out
