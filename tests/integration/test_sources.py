"""Whole runs on the same pairs as Arrow files, tars, Parquet and saved sets, on a disk and behind servers."""

import time

import pytest
import torch

from tests import tiny
from tests.integration.test_resume import Killed, content, content_of, same
from tests.processes import run_on, start_on
from tests.servers import google_bucket, s3_bucket, serving
from tests.source_files import write_forms, write_tar
from tests.tables import png
from vlmo.doctor import examine
from vlmo.errors import VLMoError

STAGE3 = "task_mlm_itm_itc_base"
OPTIONS = {"drop_path_rate": 0.2, "batch_size": 8, "max_steps": 3, "val_check_interval": 3}


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """What `datasets` is for each form; those of a server too."""
    root = tmp_path_factory.mktemp("forms")
    found = write_forms(root, 22)
    with serving(root) as server:
        for form in ("tar", "parquet"):
            served = [name.replace(str(root), server.url) for name in found[form]]
            found[f"http {form}"] = [name.replace("*", "{0..1}") for name in served]
        yield root, found


@pytest.fixture
def train(go, forms, tmp_path):
    def trained(form, name="", **options):
        root, found = forms
        folder = {"data_root": str(root) if form == "arrow" else "", "data_cache": str(tmp_path / "cache")}
        made = OPTIONS | folder | {"datasets": found[form], "log_dir": tmp_path / f"{form}{name}"}
        return go(STAGE3, **made | options)

    return trained


def assert_same(one, other):
    assert [name for name in one if not same(one[name], other[name])] == []


def numbers(run):
    """Losses and the like, without what depends on the clock."""
    clock = ("train/", "validate/")
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in run.rows]


def test_losses_are_equal_to_the_last_bit(train):
    expected = train("arrow")
    found = train("http tar", num_workers=2)
    assert_same(content(expected), content(found))
    assert numbers(found) == numbers(expected)


@pytest.mark.slow
def test_going_on_in_the_middle_of_an_epoch(train):
    through = train("http tar", shuffle_window=8, max_steps=6, checkpoint_every_n_steps=1)
    path = (
        next((through.folder / "checkpoints").glob("*step=1*"), None)
        or sorted((through.folder / "checkpoints").glob("epoch*"))[1]
    )
    resumed = train("http tar", "again", shuffle_window=8, max_steps=6, resume_from=str(path), num_workers=2)
    assert_same(content(through), content(resumed))


@pytest.mark.slow
def test_another_window_is_another_order(train, caplog):
    first = train("parquet", shuffle_window=8, max_steps=1)
    train("parquet", "other", shuffle_window=12, max_steps=2, resume_from=str(first.last))
    assert "another order (order" in caplog.text


def test_the_doctor_looks_at_sources(forms, data, capsys, tmp_path):
    root, found = forms
    words = ["task_mlm_itm_itc_base", f"datasets={found['tar'] + found['hf']}", f"tokenizer={data / 'vocab.txt'}"]
    words += ["num_gpus=0", "model_arch=vlmo_tiny_patch16", "batch_size=4", f"log_dir={tmp_path}"]
    examine([*words, "vocab_size=64"])
    printed = capsys.readouterr().out
    assert "2 files, 22 rows, 22 texts; 16 images tried" in printed
    write_tar(tmp_path / "a.tar", [("0.png", png(0))])
    examine([*words[:1], f'datasets=["tar:{tmp_path}/a.tar"]', *words[2:]])
    assert "has no images with captions" in capsys.readouterr().out.replace("\n", " ")


def test_stage_1_takes_the_images_of_a_source(go, tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{number}.png", png(number)) for number in range(8)])  # nothing but images
    options = {"datasets": [f"tar:{tmp_path}/a.tar"], "data_root": "", "tokenizer": "there is none"}
    run = go("task_mim_base", max_steps=1, image_size=64, warmup_steps=0, **options)
    assert run.logged("mim/train/loss")


@pytest.mark.slow
def test_recall_is_measured_on_sources(train):
    expected = train("arrow", get_recall_metric=True, max_steps=1, val_check_interval=1)
    found = train("hf", get_recall_metric=True, max_steps=1, val_check_interval=1)
    recalls = {name: value for name, value in expected.metrics.items() if name.startswith("recalls/val")}
    assert recalls and recalls.items() <= found.metrics.items()


def test_too_few_or_damaged_files_end_a_run_before_it_begins(train, forms):
    root, found = forms
    with pytest.raises(VLMoError, match=r"2\.tar: is missing"):
        train("tar", datasets=[f"tar:{root}/train-{{0..2}}.tar"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tar", "parquet", "hf", "http tar", "http parquet"])
def test_any_form_workers_and_processes(train, forms, data, micro, tmp_path, form):
    expected = content(train("arrow"))
    for workers in (0, 2, 4):
        assert_same(expected, content(train(form, f"{workers}", num_workers=workers)))
    root, found = forms
    config = dict(tokenizer=str(data / "vocab.txt"), model_arch=micro)
    two = {}
    for name, datasets in (("arrow", found["arrow"]), (form, found[form])):
        two[name] = _on_two(tmp_path / f"two {name}", config, root, datasets)
    assert two["arrow"] == two[form]


def _on_two(folder, config, root, datasets):
    options = {"max_steps": 4, "max_epoch": 100, "warmup_steps": 1, "num_workers": 1, "per_gpu_batchsize": 2}
    options |= {"data_root": str(root), "data_cache": str(folder / "cache"), "log_dir": str(folder / "log")}
    return run_on(2, tiny.config(STAGE3, datasets=datasets, **config, **options), folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tar", "http tar", "http parquet"])
def test_killed_twice(go, forms, tmp_path, form):
    root, found = forms
    options = OPTIONS | {"datasets": found[form], "max_steps": 24, "num_workers": 2, "checkpoint_every_n_steps": 2}
    options |= {"shuffle_window": 8, "data_cache": str(tmp_path / "cache"), "data_root": ""}
    through = go(STAGE3, log_dir=tmp_path / "through", **options)
    killed = Killed(go, tmp_path, options)
    assert killed.attempt(0.5) and killed.attempt(0.5)
    assert not killed.attempt(600)
    last = max((tmp_path / "killed").glob("*/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    assert_same(content(through), torch.load(last, weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("service", ["s3", "gs"])
def test_from_a_bucket(train, forms, form, service):
    root, found = forms
    expected = content(train("arrow"))
    with s3_bucket(root.glob("*-[01].*")) if service == "s3" else google_bucket(root) as bucket:
        place = bucket if service == "s3" else "gs://private"
        datasets = [name.replace(str(root), place) for name in found[form]]
        for workers in (0, 2):
            assert_same(expected, content(train(form, f"{workers}", datasets=datasets, num_workers=workers)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "http parquet", "s3 tar"])
def test_two_processes_killed_in_the_middle_of_an_epoch(forms, data, micro, tmp_path, form):
    root, found = forms
    config = {"tokenizer": str(data / "vocab.txt"), "model_arch": micro, "warmup_steps": 1, "max_epoch": 100}
    config |= OPTIONS | {"max_steps": 12, "num_workers": 1, "per_gpu_batchsize": 2, "checkpoint_every_n_steps": 1}
    config |= {"shuffle_window": 8, "data_cache": str(tmp_path / "cache")}

    def last(name):
        return list((tmp_path / name / "log").glob("*/version_*/checkpoints/last.ckpt"))

    with s3_bucket(root.glob("*-[01].*")) as bucket:
        places = {**found, "s3 tar": [name.replace(str(root), bucket) for name in found["tar"]]}
        config = tiny.config(STAGE3, datasets=places[form], **config)
        run_on(2, config | {"log_dir": str(tmp_path / "through" / "log")}, tmp_path / "through" / "1")
        config |= {"log_dir": str(tmp_path / "killed" / "log"), "resume_during_training": True}
        processes = start_on(2, config, tmp_path / "killed" / "1")
        while not last("killed") and all(process.is_alive() for process in processes):
            time.sleep(0.05)
        time.sleep(0.5)
        assert all(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
            process.join()
        run_on(2, config, tmp_path / "killed" / "2")
    newest = max(last("killed"), key=lambda path: path.stat().st_mtime)
    ended = [torch.load(path, weights_only=True) for path in (*last("through"), newest)]
    assert_same(content_of(ended[0]), content_of(ended[1]))
