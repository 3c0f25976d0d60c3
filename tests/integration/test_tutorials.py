"""The tutorials' commands and code, run in order in one folder as a reader would, with a few steps of training."""

import os
import re
import subprocess
import sys

import pytest

from tests.code_blocks import REPOSITORY, blocks, is_run

pytestmark = pytest.mark.slow
TUTORIALS = REPOSITORY / "docs/tutorials"


def script(page: str) -> str:
    """Gives all blocks of a page that are run, as one shell script."""
    parts = ["set -euxo pipefail"]
    for block in blocks(TUTORIALS / page):
        if not is_run(block):
            continue
        text = re.sub(r" *\\\n *", " ", block.text)
        if block.mark == "run with":
            text = re.sub(r"^vlmo (train|doctor) with .*", rf"\g<0> {block.said}", text, flags=re.MULTILINE)
        parts.append(f"python - <<'END_OF_PYTHON'\n{text}\nEND_OF_PYTHON" if block.kind == "python" else text)
    return "\n".join(parts)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the first tutorial has been followed."""
    folder = tmp_path_factory.mktemp("tutorials")
    (folder / "bin").mkdir()
    command = folder / "bin/vlmo"  # as an installation would have it, of this checkout
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m vlmo "$@"\n')
    command.chmod(0o755)
    follow(folder, "own_pictures.md")
    return folder


def follow(folder, page: str) -> str:
    path = os.pathsep.join([str(folder / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", script(page)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{page}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_own_pictures(place):
    assert (place / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "result/mine_seed1_from_/version_0/checkpoints/last.ckpt").exists()


def test_vqa(place):
    follow(place, "vqa.md")
    assert len((place / "answers.jsonl").read_text().splitlines()) == 60


def test_zero_shot(place):
    printed = follow(place, "zero_shot.md")
    assert "winoground" in printed and (place / "measured/report.html").exists()


def test_plugin(place):
    printed = follow(place, "plugin.md")
    assert "hinge" in printed and '"ground": ' in printed.splitlines()[-1]


def test_every_tutorial_is_followed():
    assert {path.stem for path in TUTORIALS.glob("*.md")} == {"own_pictures", "vqa", "zero_shot", "plugin", "notebooks"}
