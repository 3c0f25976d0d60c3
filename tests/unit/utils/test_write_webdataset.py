"""Webdataset tars and what img2dataset makes."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.utils.raw import image_bytes, read_rows
from vlmo.errors import VLMoError
from vlmo.utils.write_webdataset import make_arrow

NUMBER = 6


def members(number):
    """The files of one sample, as img2dataset makes them."""
    about = {
        "caption": f"caption {number}",
        "long": f"long caption {number}",
        "status": "success",
        "key": f"{number:04d}",
    }
    return {
        f"{number:04d}.jpg": image_bytes(number),
        f"{number:04d}.json": json.dumps(about).encode(),
        f"{number:04d}.txt": f"caption {number}\n".encode(),
    }


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def all_files(numbers):
    return {name: content for number in numbers for name, content in members(number).items()}


@pytest.fixture(params=["tar", "files", "parquet"])
def root(request, tmp_path):
    root = tmp_path / "raw"
    if request.param == "tar":
        write_tar(root / "00000.tar", all_files(range(4)))
        write_tar(root / "00001.tar", all_files(range(4, NUMBER)))
        pq.write_table(pa.table({"url": ["u"], "key": ["0000"]}), root / "00000.parquet")  # img2dataset's list
    elif request.param == "files":
        for name, content in all_files(range(NUMBER)).items():
            path = root / "00000" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (root / "00000_stats.json").write_text("{}")
    else:
        root.mkdir()
        about = [json.loads(members(number)[f"{number:04d}.json"]) for number in range(NUMBER)]
        table = {column: [each[column] for each in about] for column in about[0]}
        pq.write_table(pa.table(table | {"jpg": [image_bytes(n) for n in range(NUMBER)]}), root / "00000.parquet")
    return root


def test_all_samples(root, tmp_path):
    report = make_arrow(str(root), str(tmp_path / "out"), val_share=0.2)
    assert report.rows == {"conceptual_caption_train_0.arrow": 4, "conceptual_caption_val_0.arrow": 2}
    train = read_rows(tmp_path / "out" / "conceptual_caption_train_0.arrow")
    assert [row["caption"] for row in train] == [[f"caption {number}"] for number in (1, 2, 3, 4)]
    assert [row["image"] for row in train] == [image_bytes(number) for number in (1, 2, 3, 4)]
    assert train[0]["image_id"] == "0001"


def test_other_caption_and_name(root, tmp_path):
    report = make_arrow(str(root), str(tmp_path / "out"), caption_key="long", name="mine", val_share=0)
    assert report.rows["mine_caption_karpathy_train.arrow"] == NUMBER
    assert read_rows(tmp_path / "out" / "mine_caption_karpathy_train.arrow")[2]["caption"] == ["long caption 2"]


def test_workers_read_parts_of_tars(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmo.utils.arrow_writer.CHUNK_ROWS", 2)
    write_tar(tmp_path / "raw" / "a.tar", all_files(range(NUMBER)))
    for workers in (1, 2):
        make_arrow(str(tmp_path / "raw"), str(tmp_path / str(workers)), num_workers=workers, val_share=0, name="sbu")
    assert (tmp_path / "1" / "sbu_0.arrow").read_bytes() == (tmp_path / "2" / "sbu_0.arrow").read_bytes()


def test_incomplete_samples_are_counted(tmp_path):
    files = all_files(range(4))
    del files["0000.jpg"], files["0001.txt"], files["0001.json"]
    files["0002.jpg"] = b"<html>not found</html>"
    files["0003.txt"], files["0003.json"] = b" ", b"{broken"
    write_tar(tmp_path / "raw" / "a.tar", files | members(4))
    report = make_arrow(str(tmp_path / "raw"), str(tmp_path / "out"), val_share=0, name="sbu")
    assert report.skipped == {"no image": 1, "no caption": 2, "not an image": 1}
    assert report.rows == {"sbu_0.arrow": 1}


def test_mistakes(tmp_path):
    raw = tmp_path / "raw"
    with pytest.raises(VLMoError, match="no samples"):
        make_arrow(str(raw), str(tmp_path / "out"))
    write_tar(raw / "a.tar", all_files(range(3)))
    content = (raw / "a.tar").read_bytes()
    (raw / "a.tar").write_bytes(content[:1500])
    with pytest.raises(VLMoError, match=r"a\.tar: not a complete, uncompressed tar"):
        make_arrow(str(raw), str(tmp_path / "out"))
    (raw / "a.tar").unlink()
    (raw / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(VLMoError, match=r"a\.parquet: not a complete parquet file"):
        make_arrow(str(raw), str(tmp_path / "out"))
    with pytest.raises(VLMoError, match="val_share=-1"):
        make_arrow(str(raw), str(tmp_path / "out"), val_share=-1)
