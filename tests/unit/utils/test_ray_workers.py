"""Ray does what the project's own workers do, byte for byte, also when one of its processes is killed."""

import importlib.util
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.tables import VOCABULARY
from tests.unit.utils.raw import write_karpathy
from vlmo import predict
from vlmo.errors import VLMoError
from vlmo.utils import arrow_writer, convert, ray_workers
from vlmo.utils.ray_workers import RayWorkers
from vlmo.utils.record_batches import convert_chunk

ROWS = 3 * arrow_writer.CHUNK_ROWS
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (vlmo[ray])")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def converted(tmp_path, name, *options):
    assert convert.main(["own_karpathy", str(tmp_path / "raw"), str(tmp_path / name), *options]) == 0
    return files(tmp_path / name)


def killed_once(flag, *arguments):
    """Ends its process the first time that it is called."""
    if not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return convert_chunk(*arguments)


def test_without_ray_the_message_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_workers, "find_spec", lambda name: None)
    write_karpathy(tmp_path / "raw", 3)
    command = ["own_karpathy", str(tmp_path / "raw"), str(tmp_path / "out"), "--engine", "ray"]
    assert convert.main(command) == 2
    assert "pip install" in capsys.readouterr().err


@needs_ray
def test_a_number_of_processes():
    with pytest.raises(VLMoError, match="num_workers=0"):
        RayWorkers(0)


@needs_ray
@pytest.mark.slow
def test_a_conversion_is_the_same(tmp_path, monkeypatch):
    write_karpathy(tmp_path / "raw", ROWS)
    expected = converted(tmp_path, "here", "--num-workers", "1")
    for workers in ("1", "2"):
        assert converted(tmp_path, f"ray{workers}", "--engine", "ray", "--num-workers", workers) == expected
    calls = RayWorkers.map

    def killing(self, function, arguments, is_far_ahead=None):
        flag = str(tmp_path / "killed")
        return calls(self, killed_once, ((flag, *each) for each in arguments), is_far_ahead)

    monkeypatch.setattr(RayWorkers, "map", killing)
    assert converted(tmp_path, "killed-on-the-way", "--engine", "ray", "--num-workers", "2") == expected
    assert (tmp_path / "killed").exists()


@needs_ray
@pytest.mark.slow
def test_features_are_the_same(tmp_path):
    torch.manual_seed(0)
    model = tiny.model("task_mlm_itm_itc_base")
    model.vocabulary = list(dict.fromkeys(VOCABULARY))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    for number in range(7):
        pixels = draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    command = ["embed", "--checkpoint", str(tmp_path / "model"), "--image", str(tmp_path / "images")]
    command += ["--batch-size", "2", "--device", "cpu"]
    assert predict.main([*command, "--output", str(tmp_path / "here.jsonl")]) == 1
    for workers in ("1", "2"):
        output = tmp_path / f"ray{workers}.jsonl"
        ray = ["--output", str(output), "--engine", "ray", "--num-workers", workers]
        assert predict.main([*command, *ray]) == 1
        assert output.read_bytes() == (tmp_path / "here.jsonl").read_bytes()
