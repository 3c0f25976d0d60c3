"""`python -m benchmarks.stages`: every row runs, and is not run again."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import stages_emoji
from tests import tables
from vlmo.errors import VLMoError

SPLITS = ("train", "val", "test")
ROOT = Path(__file__).parents[2]


def stages(tmp_path, *options):
    command = [sys.executable, "-m", "benchmarks.stages", "--quick", "--seeds", "1", *options]
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    done = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_all_rows_on_the_demo_world(tmp_path):
    first = stages(tmp_path)
    assert first.count("$ python run.py with") == 12 + 10 + 9  # pre-training, VQA, retrieval
    again = stages(tmp_path)
    assert "$ python run.py with" not in again
    table = (tmp_path / "results/stages_demo.md").read_text()
    assert table in first and table in again
    assert table.count("\n|") == 10 + 2  # rows, a line below the head, what needs no model
    assert (tmp_path / "results/stages_demo.png").read_bytes().startswith(b"\x89PNG")
    assert "1+2+3,1,VQA score,0." in (tmp_path / "results/stages_demo.csv").read_text()
    assert "3 local,1,2,itc/train/i2t_accuracy," in (tmp_path / "results/stages_demo_curves.csv").read_text()


def test_emoji_packages_become_tables(tmp_path):
    codes = [f"1F{number:03X}" for number in range(100)]
    listed = [
        {"image": f"{code.lower()}.png", "unified": code, "category": "Symbols", "short_name": f"name_{code.lower()}"}
        for code in codes
    ]
    texts = [{"hexcode": code, "label": f"label {code}", "tags": ["red", "round", "sign"]} for code in codes[1:]]
    for style in ("google", "twitter"):
        pictures = [(f"package/img/{style}/64/{each['image']}", tables.png(1)) for each in listed]
        write_gz(tmp_path / f"emoji-datasource-{style}-1.0.tgz", [("package/emoji.json", listed), *pictures])
    with pytest.raises(VLMoError, match="npm pack emojibase-data"):
        stages_emoji.make_arrow(tmp_path, tmp_path / "raw", tmp_path / "arrow")
    write_gz(tmp_path / "emojibase-data-1.0.tgz", [("package/en/data.json", texts)])
    captions = stages_emoji.make_arrow(tmp_path, tmp_path / "raw", tmp_path / "arrow")
    records = [json.loads(line) for line in (tmp_path / "raw/captions.jsonl").open()]
    held_out = {split: {Path(each["image"]).name for each in records if each["split"] == split} for split in SPLITS}
    assert held_out["val"] == held_out["test"] and not held_out["val"] & held_out["train"]
    assert {each["image"].split("/")[0] for each in records if each["split"] == "test"} == {"twitter"}
    assert len(held_out["train"] | held_out["val"]) == 99 and len(captions) == 5 * len(held_out["train"])
    assert captions[:5] == ["label 1F001", "name 1f001", "red, round, sign", "red", "round, sign"]


def write_gz(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
