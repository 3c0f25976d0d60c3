"""Places of texts and rows in Arrow tables of any shape."""

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tables import write_table
from vlmo.errors import VLMoError
from vlmo.sources.arrow_tables import ArrowTables

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(["same", "日本語 🙂", ""])
row = st.lists(text, max_size=3) | st.none()
table = st.tuples(st.lists(row, max_size=7), st.lists(st.integers(0, 3), max_size=4))  # rows, sizes of record batches


@given(st.lists(table, min_size=1, max_size=3), st.sampled_from([pa.list_(pa.string()), pa.large_list(pa.string())]))
def test_every_table_comes_back_exactly(tables, kind):
    rows = [row or [] for rows, _ in tables for row in rows]
    with TemporaryDirectory() as folder:
        paths = [
            write_table(
                Path(folder) / f"{number}.arrow",
                {"caption": pa.array(rows, kind), "name": pa.array([str(index) for index in range(len(rows))])},
                batches,
            )
            for number, (rows, batches) in enumerate(tables)
        ]
        opened = ArrowTables(paths, "caption")
        assert opened.num_rows == len(rows)
        found = [opened.text(index) for index in range(opened.num_texts)]
        wanted = [(image, item, text) for image, row in enumerate(rows) for item, text in enumerate(row)]
        assert [(place.image, place.item, place.list_item("caption")) for place in found] == wanted
        names = [opened.row(image).scalar("name").as_py() for image in range(opened.num_rows)]
        assert names == [str(index) for rows, _ in tables for index in range(len(rows))]
        draw = np.random.default_rng(0).permutation(len(wanted))
        assert opened.text_sizes(draw).tolist() == [len(wanted[index][2].encode()) for index in draw]
        for outside in (-1, opened.num_texts):
            with pytest.raises(IndexError):
                opened.text(outside)


def test_bytes_are_a_view_into_the_file(tmp_path):
    path = write_table(tmp_path / "t.arrow", {"image": [b"x" * 1000, b"y" * 1000], "caption": [["a"], ["b"]]})
    before = pa.total_allocated_bytes()
    buffer = ArrowTables([path], "caption").text(1).scalar("image").as_buffer()
    assert buffer.to_pybytes() == b"y" * 1000
    assert pa.total_allocated_bytes() == before


def test_pickled_tables_are_small_and_open_the_files_again(tmp_path):
    rows = 2000
    path = write_table(tmp_path / "t.arrow", {"caption": [["text"]] * rows}, batches=[rows // 2])
    tables = ArrowTables([path], "caption")
    assert tables.text(0).list_item("caption") == "text"
    pickled = pickle.dumps(tables)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert copy.text(rows - 1).image == rows - 1


def test_absent_columns_and_short_lists_give_none(tmp_path):
    path = write_table(tmp_path / "t.arrow", {"caption": [["a", "b"]], "x": [[1]], "empty": pa.array([None])})
    place = ArrowTables([path], "caption").text(1)
    assert [place.list_item(name) for name in ("x", "empty", "absent")] == [None, None, None]


def test_empty_table_with_columns_of_type_null(tmp_path):
    path = write_table(tmp_path / "t.arrow", {"image": pa.nulls(0), "caption": pa.nulls(0)})
    assert ArrowTables([path], "caption").num_rows == 0


def test_unreadable_files(tmp_path):
    whole = write_table(tmp_path / "whole.arrow", {"caption": [["text"]] * 100}).read_bytes()
    for number, content in enumerate((b"", b"no table", whole[:-20], whole[: len(whole) // 2])):
        path = tmp_path / f"{number}.arrow"
        path.write_bytes(content)
        with pytest.raises(VLMoError, match=f"{number}.arrow: is not a complete Arrow file"):
            ArrowTables([path], "caption")
    with pytest.raises(VLMoError, match="is missing"):
        ArrowTables([tmp_path / "none.arrow"], "caption")
    with pytest.raises(VLMoError, match="has no column 'questions'"):
        ArrowTables([tmp_path / "whole.arrow"], "questions")
