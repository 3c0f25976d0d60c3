"""Texts: every line once, validation held out evenly, whatever the lines look like."""

import pytest

from tests.unit.utils.raw import read_rows
from vlmo.errors import VLMoError
from vlmo.utils import write_wikibk
from vlmo.utils.write_wikibk import make_arrow


def captions(path):
    rows = read_rows(path)
    assert all(row["image"] == "None" and row["source"] == "wikibk" for row in rows)
    return [caption for row in rows for caption in row["caption"]]


def test_files_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        (tmp_path / f"wikibk.{number}.txt").write_text(f"text {number}\nanother\n")
    (tmp_path / "notes.md").write_text("not a text file")
    report = make_arrow(str(tmp_path), str(tmp_path / "out"))
    assert [captions(tmp_path / "out" / f"wikibk_train_{n}.arrow")[0] for n in range(3)] == [
        "text 1",
        "text 2",
        "text 10",
    ]
    assert report.rows == {
        f"wikibk_{name}.arrow": n for name, n in (("train_0", 2), ("train_1", 1), ("train_2", 2), ("val_0", 1))
    }


def test_validation_lines_are_evenly_spaced(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{number}\n" for number in range(60)))
    (tmp_path / "b.txt").write_text("".join(f"{number}\n" for number in range(60, 100)))
    make_arrow(str(tmp_path), str(tmp_path / "out"), val_share=0.1)
    val = captions(tmp_path / "out" / "wikibk_val_0.arrow")
    assert val == [str(number) for number in range(5, 100, 10)]
    train = captions(tmp_path / "out" / "wikibk_train_0.arrow") + captions(tmp_path / "out" / "wikibk_train_1.arrow")
    assert sorted(map(int, train + val)) == list(range(100))


def test_validation_files(tmp_path):
    (tmp_path / "wikibk.0.txt").write_text("a\nb\n")
    (tmp_path / "wikibk.val.txt").write_text("c\n")
    (tmp_path / "valley.txt").write_text("d\n")
    report = make_arrow(str(tmp_path), str(tmp_path / "out"))
    assert captions(tmp_path / "out" / "wikibk_val_0.arrow") == ["c"]
    assert report.rows == {"wikibk_train_0.arrow": 1, "wikibk_train_1.arrow": 2, "wikibk_val_0.arrow": 1}


def test_empty_long_and_odd_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(write_wikibk, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(write_wikibk, "BATCH_CHARACTERS", 100)
    words = [f"word{number}" for number in range(40)]
    content = "\n \r\n" + " ".join(words) + "\r\n" + "x" * 120 + "\nlast é line without an end"
    (tmp_path / "a.txt").write_bytes(content.encode() + b" \xff")
    report = make_arrow(str(tmp_path), str(tmp_path / "out"))
    val = captions(tmp_path / "out" / "wikibk_val_0.arrow")
    train = captions(tmp_path / "out" / "wikibk_train_0.arrow")
    texts = sorted(val + train)
    assert all(text and len(text) <= 50 for text in texts)
    assert sorted(word for text in texts for word in text.split() if word.startswith("word")) == sorted(words)
    assert sum(text.count("x") for text in texts) == 120
    assert "last é line without an end \ufffd" in texts
    assert "2 empty lines left out" in report.notes


def test_mistakes(tmp_path):
    with pytest.raises(VLMoError, match="is not a folder"):
        make_arrow(str(tmp_path / "no"), str(tmp_path / "out"))
    with pytest.raises(VLMoError, match="no text files to train on"):
        make_arrow(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "a.txt").write_text("one line\n")
    with pytest.raises(VLMoError, match="at least 2"):
        make_arrow(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(VLMoError, match="val_share=1"):
        make_arrow(str(tmp_path), str(tmp_path / "out"), val_share=1)


def test_a_document_a_line_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 1000 + "\n" + "short\n" * 9)
    report = make_arrow(str(tmp_path), str(tmp_path / "out"))
    assert any("1 of 10 lines" in note for note in report.notes)
