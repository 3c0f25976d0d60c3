"""Parquet files and saved Hugging Face sets that are read in place, whole and broken ones."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import tables
from tests.servers import serving
from tests.source_files import images, save_stream, texts
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS
from vlmo.sources.options import SourceOptions

PNG = [tables.png(number) for number in range(6)]


def write(path, rows=2, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def test_layouts(tmp_path, read):
    write(tmp_path / "img2dataset.parquet", jpg=PNG, caption=[f"text {n}" for n in range(6)], status=["success"] * 6)
    write(
        tmp_path / "hub.parquet", 6, image=[{"bytes": data, "path": "a.jpg"} for data in PNG], text=[["one", "two"]] * 6
    )
    large = pa.array([b"x", *PNG], pa.large_binary())[1:]
    write(tmp_path / "large.parquet", image=large, TEXT=pa.array([f"text {n}" for n in range(6)], pa.large_string()))
    for name in ("img2dataset", "large"):
        data = read(f"parquet:{tmp_path}/{name}.parquet")
        assert images(data) == PNG and texts(data) == [f"text {n}" for n in range(6)] and not data.summary()
    data = read(f"parquet:{tmp_path}/hub.parquet")
    assert images(data) == PNG and texts(data) == ["one", "two"] * 6
    assert [data.text(number).image for number in (0, 1, 2, 11)] == [0, 0, 1, 5]


def test_rows_without_image_or_caption(tmp_path, read):
    columns = {"jpg": [PNG[0], None, b"", PNG[3], PNG[4], PNG[5]], "caption": ["a", "b", "c", None, " \r\n", "d\r\n"]}
    data = read(f"parquet:{write(tmp_path / 'a.parquet', **columns)}")
    assert images(data) == [PNG[0], PNG[5]] and texts(data) == ["a", "d"]
    assert data.summary() == [
        "4 of 6 samples are left out (2 no image, 2 no caption), such as row 1 of a.parquet: no image"
    ]
    alone = read(f"parquet:{tmp_path}/a.parquet", images_alone=True)
    assert sorted(images(alone)) == sorted([PNG[0], *PNG[3:]])


def test_captions_that_are_no_utf8(tmp_path, read):
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"cat"]).buffers())
    data = read(f"parquet:{write(tmp_path / 'a.parquet', jpg=PNG[:2], caption=broken)}")
    assert texts(data) == ["caf\ufffd", "cat"]
    assert "1 captions are no UTF-8" in data.summary()[0]


def test_columns_by_name(tmp_path, read):
    path = write(tmp_path / "a.parquet", picture=PNG, jpg=PNG[::-1], words=["a"] * 6, caption=["b"] * 6)
    assert images(read(f"parquet:{path}")) == PNG[::-1] and texts(read(f"parquet:{path}"))[0] == "b"
    data = read(f"parquet:{path}", image_column="picture", text_column="words")
    assert images(data) == PNG and texts(data)[0] == "a"
    with pytest.raises(VLMoError, match="has no column 'none' of texts; it has picture .binary.*words .string"):
        read(f"parquet:{path}", text_column="none")
    with pytest.raises(VLMoError, match="has no column 'words' of images"):
        read(f"parquet:{path}", image_column="words")
    lists = write(tmp_path / "b.parquet", url=["u"], caption=["a"])
    with pytest.raises(VLMoError, match="no column of images .*url .string"):
        read(f"parquet:{lists}")
    nothing = write(tmp_path / "c.parquet", jpg=PNG, words=["a"] * 6)
    assert read(f"parquet:{nothing}").num_texts == 0
    assert "words (string)" in read(f"parquet:{nothing}").summary()[0]


def test_damaged_files(tmp_path, read):
    path = write(tmp_path / "a.parquet", jpg=PNG, caption=["a"] * 6)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(VLMoError, match=r"a\.parquet: is no complete Parquet file"):
        read(f"parquet:{path}")
    file = save_stream(tmp_path / "saved", pa.table({"image": PNG, "text": ["a"] * 6}))
    file.write_bytes(file.read_bytes()[:-700])
    with pytest.raises(VLMoError, match="is no complete Arrow stream"):
        read(f"hf:{tmp_path}/saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(VLMoError, match=r"state\.json: is damaged"):
        read(f"hf:{tmp_path}/saved")
    with pytest.raises(VLMoError, match="is neither a folder"):
        read(f"hf:{tmp_path}/nothing")


def test_folders_of_hugging_face(tmp_path, read):
    table = pa.table(
        {"image": [{"bytes": data, "path": None} for data in PNG], "text": [f"text {n}" for n in range(6)]}
    )
    save_stream(tmp_path / "set" / "train", table)
    save_stream(tmp_path / "set" / "validation", table.slice(0, 2))
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    data = read(f"hf:{tmp_path}/set")
    assert images(data) == PNG and texts(data)[5] == "text 5" and not data.reads_on
    assert read(f"hf:{tmp_path}/set@val", "val").num_texts == 2
    with pytest.raises(VLMoError, match="has no part test"):
        read(f"hf:{tmp_path}/set@test", "test")
    repository = tmp_path / "repository" / "data"
    repository.mkdir(parents=True)
    pq.write_table(table, repository / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 3), repository / "validation-00000-of-00001.parquet")
    assert read(f"hf:{tmp_path}/repository").num_texts == 6
    assert read(f"hf:{tmp_path}/repository@val", "val").num_texts == 3


def test_pieces_are_whole_row_groups(tmp_path, read):
    columns = {"jpg": [PNG[n % 6] for n in range(40)], "caption": [["a", "b"][: 1 + n % 2] for n in range(40)]}
    columns["caption"][3] = []
    data = read(f"parquet:{write(tmp_path / 'a.parquet', 5, **columns)}")
    assert data.reads_on
    groups = np.cumsum([0] + [sum(map(len, columns["caption"][n : n + 5])) for n in range(0, 40, 5)])
    assert data.pieces(1).tolist() == groups.tolist()
    assert set(data.pieces(12)) < set(groups) and data.pieces(12)[[0, -1]].tolist() == [0, groups[-1]]
    assert data.units(np.arange(groups[1], groups[3]), False) == [(0, 1), (0, 2)]


def test_a_row_group_is_unpacked_once_and_bounded(tmp_path, read):
    write(tmp_path / "a.parquet", 1, jpg=PNG, caption=["a"] * 6)
    assert images(read(f"parquet:{tmp_path}/a.parquet")) == PNG
    blocks = [path for path in (tmp_path / "cache").rglob("*") if path.parent.parent.name == "blocks"]
    assert len(blocks) == 6
    options = SourceOptions(cache=tmp_path / "small", cache_bytes=3 * blocks[0].stat().st_size)
    assert images(DATASETS[f"parquet:{tmp_path}/a.parquet"].open("train", options)) == PNG


def test_a_row_group_from_a_server_is_cached_once(tmp_path, read):
    files = tmp_path / "files"
    files.mkdir()
    large = [bytes(np.random.default_rng(n).integers(0, 256, 3 << 20, np.uint8)) for n in range(8)]
    write(files / "a.parquet", 2, jpg=large, caption=["a"] * 8)
    with serving(files) as server:
        read(f"parquet:{server.url}/a.parquet")  # (makes the index, for which it reads all)
        options = SourceOptions(cache=tmp_path / "other")
        shutil.copytree(tmp_path / "cache" / "index", options.cache / "index")
        server.fetched.clear()
        assert images(DATASETS[f"parquet:{server.url}/a.parquet"].open("train", options)) == large
    size, fetched = sum(map(len, large)), sum(last + 1 - first for _, first, last in server.fetched)
    cached = sum(path.stat().st_size for path in (options.cache / "blocks").rglob("*") if path.is_file())
    assert size <= cached < 1.5 * size and fetched < 1.5 * size  # (the footer's blocks are kept too)
