"""The command that indexes sources."""

import json

import pytest

from tests.source_files import sample, write_tar
from vlmo.utils.convert import main


def test_it_indexes_prints_and_goes_on(tmp_path, capsys):
    for shard in range(3):
        files = [file for number in range(4) for file in sample(4 * shard + number)]
        write_tar(tmp_path / f"{shard}.tar", [*files, ("9.json", b"{}")])
        (tmp_path / f"{shard}_stats.json").write_text(json.dumps({"count": 10, "successes": 5}))
    names = ["index", f"tar:{tmp_path}/{{0..2}}.tar", "--data-cache", str(tmp_path / "cache")]
    assert main([*names, "--num-workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "3 files, 12 images with 12 captions" in printed and "3 of 15 samples are left out (3 no image)" in printed
    assert "img2dataset got an image from 15 of 30 addresses" in printed
    made = {path: path.read_bytes() for path in tmp_path.glob("*.index")}
    (tmp_path / "1.tar.index").unlink()
    before = (tmp_path / "0.tar.index").stat().st_mtime_ns
    assert main([*names, "--num-workers", "2"]) == 0  # and with other processes
    assert {path: path.read_bytes() for path in tmp_path.glob("*.index")} == made and len(made) == 3
    assert (tmp_path / "0.tar.index").stat().st_mtime_ns == before


@pytest.mark.parametrize("name, message", [("coco", "is not a source"), ("tar:/nowhere/0.tar", "is missing")])
def test_what_it_refuses(name, message, capsys):
    assert main(["index", name]) == 2
    assert message in capsys.readouterr().err
