"""More files than a process may have open."""

import os
import resource

import pytest

from tests.source_files import sample, texts, write_tar
from tests.tables import write_table
from vlmo.checkpoints import files
from vlmo.errors import VLMoError
from vlmo.sources.arrow_tables import ArrowTables, open_table


@pytest.fixture
def limit():
    """Sets the limits of this process; the soft one comes back afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def paths(tmp_path):
    return [write_table(tmp_path / f"{number}.arrow", {"caption": [["text"]]}) for number in range(150)]


@pytest.fixture
def tars(tmp_path, read):
    """Opens a source of 60 tars of a sample each."""
    for number in range(60):
        write_tar(tmp_path / f"{number:02}.tar", sample(number, [f"text {number}"]))
    return lambda: read(f"tar:{tmp_path}")


def test_tables_are_not_kept_open(limit, paths):
    limit(len(os.listdir("/dev/fd")) + 5)  # (tests before this one may have left some open)
    tables = ArrowTables(paths, "caption")
    assert [tables.text(number).list_item("caption") for number in range(150)] == ["text"] * 150


def test_the_limit_is_raised_for_a_source(limit, tars):
    limit(len(os.listdir("/dev/fd")) + 50)
    assert texts(tars()) == [f"text {number}" for number in range(60)]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 240


def test_where_it_may_not_be_raised_some_are_closed_again(monkeypatch, tars):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (160, 160))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    data, before = tars(), len(os.listdir("/dev/fd"))
    for _ in range(2):
        assert texts(data) == [f"text {number}" for number in range(60)]
    assert len(os.listdir("/dev/fd")) <= before + 2 * 20  # of each its index too


def test_a_higher_limit_stays(limit, tars):
    highest = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit(highest)
    tars()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == highest


def test_what_may_not_be_raised_is_told_and_no_damage(limit, paths):
    limit(100)
    _opened = _as_many_as_there_may_be(paths[0])
    with pytest.raises(VLMoError, match="ulimit -n") as error:
        open_table(paths[1])
    assert "make it again" not in str(error.value)


def test_a_folder_in_place_of_a_table(tmp_path):
    with pytest.raises(VLMoError, match="directory"):
        open_table(tmp_path)


def test_a_checkpoint_is_not_damaged_either(limit, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"PK")
    limit(100)
    _opened = _as_many_as_there_may_be(path)
    with pytest.raises(VLMoError, match="Too many open files") as error:
        files.read(path)
    assert "damaged" not in str(error.value)


def _as_many_as_there_may_be(path):
    found = []
    try:
        while True:
            found.append(path.open("rb"))
    except OSError:
        return found
