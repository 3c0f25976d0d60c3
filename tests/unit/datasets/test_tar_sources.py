"""Tars that are read in place, whole and broken ones."""

import gzip
import json
import os
import tarfile

import pyarrow as pa
import pytest

from tests import tables
from tests.source_files import images, sample, texts, write_tar
from vlmo.datasets.base_dataset import Skipped, read_images
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS
from vlmo.sources.names import expand_braces, parse
from vlmo.sources.storage import LocalFile
from vlmo.sources.tar_members import TarWalk
from vlmo.utils.write_webdataset import make_arrow


def found(path):
    file = LocalFile(str(path))
    return [tuple(member) for member in TarWalk(str(path), file.read, file.size)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them(tmp_path, form):
    names = ["a.png", "b/" * 40 + "c.txt", "empty.txt", "x" * 99, "./._a.png", "f/" + "y" * 90 + ".json"]
    names += [] if form == tarfile.USTAR_FORMAT else ["long/" + "z" * 300 + ".jpg", "ü" * 90 + ".png"]
    path = write_tar(tmp_path / "a.tar", [(name, os.urandom(37 * number)) for number, name in enumerate(names)], form)
    with tarfile.open(path, "a", format=form) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
        (tmp_path / "last").write_bytes(b"last" * 300)
        tar.add(tmp_path / "last", "last.txt")
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert found(path) == expected and len(expected) == len(names) + 1


def test_names():
    assert parse("tar:/a/{0..1}.tar") == ("tar", "/a/{0..1}.tar", ("train",))
    assert parse("parquet:s3://me@b/x@val@test") == ("parquet", "s3://me@b/x", ("val", "test"))
    assert expand_braces("a{08..11}{x,y}") == [f"a{n}{c}" for n in ("08", "09", "10", "11") for c in "xy"]
    with pytest.raises(VLMoError, match="'tra:/x' is unknown.*tar:"):
        DATASETS.require(["tra:/x"], "datasets")


def test_the_same_samples_as_of_the_converter(tmp_path, read):
    files = [file for number in range(4) for file in sample(number)] + sample(4, ["one", " two ", "", "three\r\n"])
    files += [("1.2.jpg", tables.png(1)), ("1.2.txt", b"first"), ("1.3.jpg", tables.png(2)), ("1.3.txt", b"second")]
    write_tar(tmp_path / "a.tar", files)
    data = read(f"tar:{tmp_path}")
    make_arrow(str(tmp_path), str(tmp_path / "out"), val_share=0)
    table = pa.ipc.open_file(str(tmp_path / "out" / "conceptual_caption_train_0.arrow")).read_all()
    captions = table["caption"].to_pylist()
    assert texts(data) == [text for each in captions for text in each]
    assert texts(data)[4:7] == ["one", "two", "three"]
    assert images(data) == table["image"].to_pylist()
    assert [data.text(number).image for number in range(4, 8)] == [4, 4, 4, 5]


def test_what_is_incomplete_is_left_out_and_counted(tmp_path, read):
    files = [*sample(0), ("00001.png", tables.png(1)), ("00002.txt", b"no image"), ("00003.json", b"{broken")]
    files += [("00003.png", tables.png(3)), *sample(4), *sample(4), *sample(5), ("00006.png", b""), ("00006.txt", b"a")]
    write_tar(tmp_path / "a.tar", [*files, *sample(0)])
    data = read(f"tar:{tmp_path}/a.tar")
    assert images(data) == [tables.png(number) for number in (0, 5, 0)]
    left_out, twice = data.summary()
    for reason in ("2 no caption", "1 no image", "1 several texts in one sample", "1 empty"):
        assert reason in left_out
    assert left_out.startswith("5 of 8 samples")
    assert twice.startswith("1 samples have the name of another")
    assert len(images(read(f"tar:{tmp_path}/a.tar", images_alone=True))) == 5  # stage 1 reads no captions


def test_captions_of_windows_and_of_other_encodings(tmp_path, read):
    files = [("a.png", tables.png(0)), ("a.txt", "\ufeffa café\r\n".encode()), ("b.png", tables.png(1))]
    files += [("b.txt", "a café".encode("latin-1")), ("c.png", tables.png(1)), ("c.txt", b"\r\n")]
    write_tar(tmp_path / "a.tar", files)
    data = read(f"tar:{tmp_path}/a.tar")
    assert texts(data) == ["a café", "a caf\ufffd"]
    assert any("1 captions are no UTF-8" in line for line in data.summary())


def test_a_damaged_tar_is_an_error_that_names_it(tmp_path, read):
    whole = write_tar(tmp_path / "whole.tar", [file for number in range(3) for file in sample(number)]).read_bytes()
    last = found(tmp_path / "whole.tar")[-1]
    ends = {"in a member": last[1] + 5, "in a header": last[1] - 100}
    for name, end in ends.items():
        (tmp_path / "a.tar").write_bytes(whole[:end])
        with pytest.raises(VLMoError, match=r"a\.tar: is cut off"):
            read(f"tar:{tmp_path}/a.tar"), name
    (tmp_path / "a.tar").write_bytes(whole[: last[1] + 512])  # whole samples, but no end
    data = read(f"tar:{tmp_path}/a.tar")
    assert data.num_texts == 3 and any("no end mark" in line for line in data.summary())
    (tmp_path / "a.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(VLMoError, match="is compressed .gzip"):
        read(f"tar:{tmp_path}/a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: last[1] - 512] + b"x" * 2000)
    with pytest.raises(VLMoError, match="is damaged at byte"):
        read(f"tar:{tmp_path}/a.tar")
    (tmp_path / "b.tar").write_bytes(b"<html>" * 500)
    with pytest.raises(VLMoError) as caught:  # all at once
        read(f"tar:{tmp_path}/{{a,b}}.tar")
    assert "a.tar: is damaged" in str(caught.value) and "b.tar: is no tar" in str(caught.value)
    with pytest.raises(VLMoError, match=r"c\.tar: is missing"):
        read(f"tar:{tmp_path}/c.tar")
    with pytest.raises(VLMoError, match="no such files"):
        read(f"tar:{tmp_path}/x*.tar")


def test_an_index_is_made_anew_for_another_file_or_when_it_is_broken(tmp_path, read):
    path = write_tar(tmp_path / "a.tar", [*sample(0), *sample(1)])
    assert read(f"tar:{path}").num_texts == 2
    index = tmp_path / "a.tar.index"
    written = index.stat().st_mtime_ns
    assert read(f"tar:{path}").num_texts == 2 and index.stat().st_mtime_ns == written
    write_tar(path, [*sample(7), *sample(8), *sample(9)])
    assert images(read(f"tar:{path}")) == [tables.png(number) for number in (7, 8, 9)]
    content = index.read_bytes()
    for broken in (content[:-1], content[:30], b"", b"VLMOIDX1" + b"\xff" * 100):
        index.write_bytes(broken)
        assert read(f"tar:{path}").num_texts == 3
    assert index.read_bytes() == content
    index.write_bytes(content.replace(b", 3]", b",99]"))
    with pytest.raises(VLMoError, match="is damaged .*remove it"):
        texts(read(f"tar:{path}"))


def test_where_nothing_can_be_written_the_index_is_in_the_cache(tmp_path, read):
    path = write_tar(tmp_path / "a.tar", sample(0))
    (tmp_path / "a.tar.index").mkdir()  # (the superuser may write into any folder)
    assert read(f"tar:{path}").num_texts == 1
    assert read(f"tar:{path}").indices[0].startswith(str(tmp_path / "cache"))


def test_another_caption_of_the_json(tmp_path, read):
    about = json.dumps({"caption": "short", "long": ["a longer one", "and another"]}).encode()
    path = write_tar(tmp_path / "a.tar", [("0.png", tables.png(0)), ("0.json", about), ("0.txt", b"short")])
    assert texts(read(f"tar:{path}")) == ["short"]
    assert texts(read(f"tar:{path}", text_column="long")) == ["a longer one", "and another"]
    assert texts(read(f"tar:{path}")) == ["short"]  # each has an index of its own
    assert "its .json has caption, long" in read(f"tar:{path}", text_column="none").summary()[0]


def test_an_image_that_cannot_be_decoded_is_skipped_with_its_place(tmp_path, read):
    path = write_tar(tmp_path / "a.tar", [*sample(0), ("1.png", b"no image"), ("1.txt", b"a cat")])
    data = read(f"tar:{path}")
    found = read_images(data, data.row(1), ["image"], lambda image: image, 0)
    assert isinstance(found, Skipped) and "a: image row 1" in found.reason
