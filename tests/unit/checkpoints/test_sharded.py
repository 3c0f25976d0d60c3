"""Checkpoints in folders: what is in which file, and what becomes of damaged and hostile ones."""

import enum
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from vlmo.checkpoints import files, sharded
from vlmo.errors import VLMoError

CHECKPOINT = {
    "global_step": 3,
    "state_dict": {"transformer.norm.weight": torch.arange(6.0).reshape(2, 3), "logit_scale": torch.tensor(2.0)},
    "optimizer_states": [
        {
            "state": {0: {"exp_avg": torch.ones(2, 3), "step": torch.tensor(3.0), "kind": "a"}, 1: {}},
            "param_groups": [{"lr": 0.1, "params": [0, 1], "names": ["transformer.norm.weight", "logit_scale"]}],
        }
    ],
    "vlmo_resume": {"random": torch.arange(3)},
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as a single process writes it."""
    rest, tensors = sharded.take_apart(CHECKPOINT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(tmp_path / "last.ckpt"), no_dist=True)
    torch.save(rest, tmp_path / "last.ckpt" / sharded.REST)
    return tmp_path / "last.ckpt"


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_what_is_taken_apart_comes_together_again(folder):
    rest, tensors = sharded.take_apart(CHECKPOINT)
    assert set(tensors) == {
        "state_dict/transformer.norm.weight",
        "state_dict/logit_scale",
        "optimizer_states/0/state/0/exp_avg",
        "optimizer_states/0/state/0/step",
    }
    assert same(sharded.put_together(rest, tensors), CHECKPOINT)
    assert same(sharded.put_together(sharded.read_rest(folder), sharded.read_whole(folder)), CHECKPOINT)


def test_weights_are_read_alone(folder):
    assert sharded.read_whole(folder, sharded.WEIGHTS).keys() == {
        "state_dict/transformer.norm.weight",
        "state_dict/logit_scale",
    }
    found = files.read(folder)
    assert found.container == "state_dict" and same(found.tensors, CHECKPOINT["state_dict"])


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_damaged(folder, name, damage):
    file = folder / name
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            os.truncate(file, file.stat().st_size - 20)
        case "empty":
            file.write_bytes(b"")
    with pytest.raises(
        VLMoError, match="last.ckpt: cannot be read, a file of it is missing, truncated or damaged"
    ) as e:
        files.read(folder)
    assert "\n" not in str(e.value)


class Hostile:
    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_code_in_the_metadata_does_not_run(folder, tmp_path):
    hostile = Hostile()
    hostile.path = str(tmp_path / "harmed")
    (folder / ".metadata").write_bytes(pickle.dumps(hostile))
    with pytest.raises(VLMoError, match="which is not of the format"):
        files.read(folder)
    assert not (tmp_path / "harmed").exists()


class ByName(pickle._Pickler):
    """Pickles enums by the names of their members, as some Pythons and packages do; or asks for something else so."""

    def __init__(self, file, kind, name):
        super().__init__(file, 4)
        self.asked = (kind, name)

    def save(self, value, save_persistent_id=True):
        if isinstance(value, enum.Enum):
            kind, name = self.asked[0] or type(value), self.asked[1] or value.name
            return self.save_reduce(getattr, (kind, name), obj=value)
        return super().save(value, save_persistent_id)


@pytest.mark.parametrize("kind, name", [(None, ""), (dcp.metadata.Metadata, "__init__")])
def test_enums_by_name(folder, kind, name):
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    with (folder / ".metadata").open("wb") as file:
        ByName(file, kind, name).dump(metadata)
    if kind is None:
        assert sharded.listing(folder)
    else:
        with pytest.raises(VLMoError, match="not of the format"):
            sharded.listing(folder)


def test_nothing_outside_of_the_folder_is_read(folder):
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for stored in metadata.storage_data.values():
        object.__setattr__(stored, "relative_path", "../last.ckpt/__0_0.distcp")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(VLMoError, match="is not in it"):
        sharded.listing(folder)


def test_a_folder_of_something_else_is_none(tmp_path):
    assert not sharded.is_sharded(tmp_path) and not sharded.is_sharded(Path("no such folder"))
