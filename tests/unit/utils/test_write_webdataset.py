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
        for name, content in files.items() if isinstance(files, dict) else files:
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


def captions_of(root, out, **options):
    report = make_arrow(str(root), str(out), name="sbu", val_share=0, **options)
    return report, [row["caption"][0] for row in read_rows(out / "sbu_0.arrow")]


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_a_dot_in_a_name_and_a_lost_image(kind, tmp_path):
    files = {}
    for number in range(3):
        files |= {f"1.2.840.{number}.jpg": image_bytes(number), f"1.2.840.{number}.txt": f"text {number}".encode()}
    del files["1.2.840.1.jpg"]
    (tmp_path / "raw").mkdir()
    if kind == "tar":
        write_tar(tmp_path / "raw" / "a.tar", files)
    else:
        for name, content in files.items():
            (tmp_path / "raw" / name).write_bytes(content)
    report, captions = captions_of(tmp_path / "raw", tmp_path / "out")
    assert captions == ["text 0", "text 2"] and report.skipped == {"no image": 1}
    rows = read_rows(tmp_path / "out" / "sbu_0.arrow")
    assert [row["image"] for row in rows] == [image_bytes(0), image_bytes(2)]
    assert rows[0]["image_id"] == "1.2.840.0"


@pytest.mark.parametrize("second", ["0001.right.jpg", "0001.jpg", "0001.png"])
def test_two_images_in_a_sample_are_left_out(second, tmp_path):
    first = "0001.left.jpg" if second == "0001.right.jpg" else "0001.jpg"
    files = [*members(0).items(), (first, image_bytes(6)), (second, image_bytes(7)), ("0001.txt", b"whose?")]
    write_tar(tmp_path / "raw" / "a.tar", files)
    report, captions = captions_of(tmp_path / "raw", tmp_path / "out")
    assert captions == ["caption 0"] and report.skipped == {"several images in one sample": 1}


def test_why_nothing_was_converted(tmp_path):
    apart = {f"{n}.jpg": image_bytes(n) for n in range(2)} | {f"{n}.txt": b"a" for n in range(2)}
    write_tar(tmp_path / "apart" / "a.tar", apart)
    with pytest.raises(VLMoError, match="0 of 4: 2 no caption .*2 files of a sample not side by side"):
        make_arrow(str(tmp_path / "apart"), str(tmp_path / "out"))
    write_tar(tmp_path / "key" / "a.tar", {"0.jpg": image_bytes(), "0.json": b'{"title": "a", "url": "u"}'})
    with pytest.raises(VLMoError, match="1 no caption .*its .json has title, url"):
        make_arrow(str(tmp_path / "key"), str(tmp_path / "out"))
    pq.write_table(pa.table({"jpg": [b""], "title": ["a"]}), tmp_path / "key" / "a.parquet")
    (tmp_path / "key" / "a.tar").unlink()
    with pytest.raises(VLMoError, match="no column of captions .it has jpg, title"):
        make_arrow(str(tmp_path / "key"), str(tmp_path / "out"))


def test_what_macos_writes_between_files_is_passed_over(tmp_path):
    files = {}
    for name, content in all_files(range(2)).items():
        files |= {f"./._{name}": b"Mac OS X", f"./{name}": content}
    write_tar(tmp_path / "raw" / "a.tar", files)
    report, captions = captions_of(tmp_path / "raw", tmp_path / "out")
    assert captions == ["caption 0", "caption 1"] and not report.skipped


def test_parquet_of_hugging_face(tmp_path):
    images = [{"bytes": image_bytes(number), "path": None} for number in range(3)]
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"image": images, "text": ["a", "b", "c"]}), tmp_path / "raw" / "0.parquet")
    _, captions = captions_of(tmp_path / "raw", tmp_path / "out", caption_key="text")
    assert captions == ["a", "b", "c"]
