"""Files appear whole or not at all."""

import pytest

from vlmo.files import append_lines, atomic_write


def test_a_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_what_fails_leaves_the_older_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"older")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"half of")
        raise KeyError
    assert path.read_bytes() == b"older"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_lines_that_cannot_be_written_are_told(tmp_path, caplog):
    append_lines(tmp_path / "a" / "list", ["one", "two"])
    append_lines(tmp_path / "a" / "list", ["three"])
    assert (tmp_path / "a" / "list").read_text() == "one\ntwo\nthree\n"
    append_lines(tmp_path / "a", ["one"])
    assert "could not be written" in caplog.text
