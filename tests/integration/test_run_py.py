"""The command line: what a person types, and what they read when it is wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch

import run
from tests import tables
from vlmo.errors import VLMoError
from vlmo.training import runner

REPOSITORY = Path(run.__file__).parent
TASK = "task_mlm_itm_itc_base"


@pytest.fixture
def options(data, micro, tmp_path):
    """A command line that works, as a dict."""
    return {
        "data_root": data,
        "tokenizer": data / "vocab.txt",
        "model_arch": micro,
        "datasets": "['coco']",
        "image_size": 32,
        "vocab_size": 64,
        "max_text_len": 16,
        "batch_size": 4,
        "per_gpu_batchsize": 4,
        "num_workers": 0,
        "num_gpus": 0,
        "precision": 32,
        "max_steps": 1,
        "log_dir": tmp_path / "result",
    }


def words(named, options):
    return ["with", *named, *(f"{name}={value}" for name, value in options.items())]


@pytest.fixture
def mistake(options, capsys, monkeypatch):
    """The lines that a mistaken command line is answered with; it exits with 2, writes and shows nothing else."""

    def too_late(config):
        pytest.fail("a model is built before the mistake is found")

    monkeypatch.setattr(runner, "VLMo", too_late)

    def lines(*named, **updates):
        assert run.command_line(["run.py", *words(named or (TASK,), options | updates)]) == 2
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        assert shown.out == ""
        assert not (options["log_dir"]).exists()
        found = shown.err.splitlines()
        assert all(line.startswith("error: ") for line in found)
        return [line.removeprefix("error: ") for line in found]

    return lines


def test_a_run(options, capsys):
    assert run.command_line(["run.py", *words([TASK, "step3k"], options | {"loss_names.mlm": 0.5})]) == 0
    out = capsys.readouterr().out
    assert "step 1/1  loss " not in out  # every 50 steps
    assert "itm/val/accuracy" in out
    assert list(options["log_dir"].glob("mlm_itm_itc_base_seed1_from_/version_0/checkpoints/last.ckpt"))


def test_print_config(capfd):
    assert run.command_line(["run.py", "print_config", "with", TASK, "seed=7"]) == 0
    out = capfd.readouterr().out
    assert "seed = " in out and "7" in out and "mlm_itm_itc_base" in out


# --- names and values -------------------------------------------------------------------------------------------------


def test_misspelt_names(mistake):
    assert mistake("task_mlm_itm_itc_bas") == [
        "task_mlm_itm_itc_bas: there is no such named config; did you mean task_mlm_itm_itc_base or "
        "task_mlm_itm_itc_base_plus or task_mlm_itm_itc_large?"
    ]
    assert mistake(batchsize=4) == ["batchsize: there is no such option; did you mean batch_size?"]
    assert mistake(**{"loss_names.mmlm": 1}) == [
        "loss_names.mmlm: there is no such option; did you mean loss_names.mlm?"
    ]
    (line,) = mistake(datasets="['cocoo']")
    assert line.startswith("datasets: 'cocoo' is unknown; did you mean coco")
    (line,) = mistake(model_arch="vlmo_bas_patch16")
    assert "did you mean vlmo_base_patch16" in line


def test_values(mistake):
    assert mistake(batch_size="abc") == ["batch_size='abc': must be a whole number"]
    assert mistake(batch_size="True") == ["batch_size=True: must be a whole number"]
    (line,) = mistake(batch_size=6)
    assert line.endswith("= 4 x 1 x 1 = 4; the nearest that is: batch_size=8")
    lines = mistake(batch_size="abc", image_size=100, learning_rate=-1)
    assert [line.split("=")[0] for line in lines] == ["batch_size", "learning_rate", "image_size"]
    assert mistake(seed=-1) == ["seed=-1: must be a whole number from 0 on"]
    assert mistake(seed="abc") == ["seed='abc': must be a whole number from 0 on"]
    (line,) = mistake(strategy="dpp")
    assert line.startswith("strategy='dpp': ")


def test_transforms(mistake):
    (line,) = mistake(val_transform_keys="['pixelbert']")
    assert line.startswith("val_transform_keys: 'pixelbert' was dropped: ")
    (line,) = mistake(train_transform_keys="['square']")
    assert line.startswith("train_transform_keys: 'square' is unknown") and "square_transform" in line


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="this machine has them")
def test_more_gpus_than_there_are(mistake):
    (line,) = mistake(num_gpus=2, batch_size=8)
    assert line.startswith(f"num_gpus=2: this machine has {torch.cuda.device_count()}; ask for that many")


# --- files ------------------------------------------------------------------------------------------------------------


def test_data_root(mistake, tmp_path):
    assert mistake(data_root="''") == ["data_root: is empty; pass data_root=FOLDER, the folder of the .arrow files"]
    (line,) = mistake(data_root=tmp_path / "absent")
    assert line == f"data_root: {tmp_path / 'absent'} is not a folder; pass the folder of the .arrow files"


def test_missing_and_damaged_tables_are_all_named(mistake, data, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(data / "coco_caption_karpathy_train.arrow", root)
    whole = (data / "coco_caption_karpathy_val.arrow").read_bytes()
    (root / "coco_caption_karpathy_val.arrow").write_bytes(whole[: len(whole) // 2])
    tables.write_table(root / "f30k_caption_karpathy_train.arrow", {"image": [b"x"], "captions": [["a"]]})
    lines = mistake(data_root=root, datasets="['coco', 'f30k', 'vg']", get_recall_metric=True)
    expected = {
        "coco_caption_karpathy_val.arrow": "make it again",
        "coco_caption_karpathy_test.arrow is missing": "",
        "f30k_caption_karpathy_train.arrow: has no column 'caption'": "it has image, captions",
        "f30k_caption_karpathy_val.arrow is missing": "",
        "f30k_caption_karpathy_test.arrow is missing": "",
        "vg.arrow is missing": "",
        "from vlmo.utils.write_coco_karpathy import make_arrow": "make_arrow(root, data_root)",
        "from vlmo.utils.write_f30k_karpathy import make_arrow": "",
        "from vlmo.utils.write_vg import make_arrow": "",
    }
    for part, more in expected.items():
        assert len([line for line in lines if part in line and more in line]) == 1, (part, lines)
    assert len(lines) == len(expected)


def test_tables_that_are_no_tables(mistake, data, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for split in ("train", "val"):
        (root / f"coco_caption_karpathy_{split}.arrow").write_bytes(b"")
    lines = mistake(data_root=root)
    assert len([line for line in lines if "coco_caption_karpathy_" in line]) == 2
    columns = {"image": ["a path"], "caption": [["a"]]}
    for split in ("train", "val"):
        tables.write_table(root / f"coco_caption_karpathy_{split}.arrow", columns)
    lines = mistake(data_root=root)
    assert [f"column 'image' is {pa.string()}, not binary" in line for line in lines] == [True, True]


def test_tokenizer(mistake, data, tmp_path):
    (line,) = mistake(tokenizer="''")
    assert line.startswith("tokenizer=''")
    (tmp_path / "empty").mkdir()
    (line,) = mistake(tokenizer=tmp_path / "empty")
    assert line.startswith(f"tokenizer={tmp_path / 'empty'}: ")
    (tmp_path / "vocab.txt").write_text("")
    (line,) = mistake(tokenizer=tmp_path / "vocab.txt")
    assert line.startswith(f"tokenizer={tmp_path / 'vocab.txt'} is not a BERT WordPiece vocabulary: it lacks [PAD]")
    (line,) = mistake(tokenizer="bert-base-never-heard-of")
    assert "point tokenizer= to a local vocab.txt" in line
    (line,) = mistake(vocab_size=20)
    assert "pass vocab_size=" in line


def test_checkpoints(mistake, tmp_path):
    assert mistake(load_path=tmp_path / "absent.pt") == [f"{tmp_path / 'absent.pt'}: no such file; check load_path"]
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "foreign.pt")
    (line,) = mistake(load_path=tmp_path / "foreign.pt")
    assert line.startswith(f"{tmp_path / 'foreign.pt'}: ") and line.endswith("give another load_path")
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "foreign.pt").read_bytes()[:200])
    (line,) = mistake(load_path=tmp_path / "damaged.pt")
    assert "truncated, damaged or no checkpoint" in line
    assert mistake(test_only=True) == ["test_only=True: evaluates a checkpoint; give it with load_path=FILE"]
    (line,) = mistake(resume_from=tmp_path / "absent.ckpt")
    assert line == f"resume_from={tmp_path / 'absent.ckpt'}: there is no such file"


def test_a_checkpoint_of_another_size(options, capsys, tmp_path):
    torch.save({"transformer.blocks.0.mlp_text.fc1.weight": torch.zeros(8, 2)}, tmp_path / "other.pt")
    assert run.command_line(["run.py", *words([TASK], options | {"load_path": tmp_path / "other.pt"})]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith(f"error: {tmp_path / 'other.pt'}: ") for line in lines)
    assert not options["log_dir"].exists()


# --- tracebacks -------------------------------------------------------------------------------------------------------


def test_with_d_errors_are_not_caught(options):
    with pytest.raises(VLMoError, match="batch_size='abc'"):
        run.command_line(["run.py", "-d", *words([TASK], options | {"batch_size": "abc"})])


def test_other_errors_are_not_hidden(options, monkeypatch):
    def broken(config):
        raise ZeroDivisionError

    monkeypatch.setattr(runner, "run", broken)
    with pytest.raises(ZeroDivisionError):
        run.command_line(["run.py", *words([TASK], options)])


# --- as a process of its own ------------------------------------------------------------------------------------------


def process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "run.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_process_of_a_run(options):
    done = process(*words([TASK], options | {"model_arch": "vlmo_tiny_patch16", "log_every_n_steps": 1, "num_gpus": 1}))
    assert done.returncode == 0, done.stderr
    assert "step 1/1  loss " in done.stdout
    assert "Traceback" not in done.stderr
    if not torch.cuda.is_available():
        assert done.stderr.splitlines() == [
            "WARNING: no GPU on this machine: running on the CPU (num_gpus=0 says so without this notice)"
        ]


def test_process_of_a_mistake(options):
    done = process(*words([TASK], {"batch_sise": 4}))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: batch_sise: there is no such option; did you mean batch_size?\n"


def test_process_of_a_mistake_with_d(options):
    done = process("-d", *words([TASK], {"batch_sise": 4}))
    assert done.returncode not in (0, 2)
    assert "Traceback" in done.stderr
    assert "batch_sise" in done.stderr
