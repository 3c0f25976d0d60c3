"""How a command prints."""

import io
import json
import sys

import pytest

from vlmo.errors import print_anything
from vlmo.files import append_lines
from vlmo.inference.io import write_jsonl


@pytest.fixture
def stdout(monkeypatch):
    """The bytes that are printed to an output of this encoding."""

    def of(encoding):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
        return lambda: (sys.stdout.flush(), raw.getvalue())[1]

    return of


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_character_can_be_printed(stdout, encoding):
    printed = stdout(encoding)
    print_anything()
    print("größe 日本 \udcfc")  # the last is a byte of a file's name that is no UTF-8
    assert b"gr" in printed() and b"\\udcfc" in printed()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_results_stay_json(stdout, encoding):
    printed = stdout(encoding)
    print_anything()
    write_jsonl([{"text": "größe 日本 🙂", "image": "\udcfc.jpg"}], None)
    assert json.loads(printed().decode(encoding)) == {"text": "größe 日本 🙂", "image": "\udcfc.jpg"}


def test_names_that_are_no_text_in_files(tmp_path):
    write_jsonl([{"image": "ö \udcfc.jpg"}], str(tmp_path / "a.jsonl"))
    assert json.loads((tmp_path / "a.jsonl").read_text("utf-8")) == {"image": "ö \udcfc.jpg"}
    append_lines(tmp_path / "a.txt", ["ö \udcfc.jpg"])
    assert "ö" in (tmp_path / "a.txt").read_text("utf-8")


def test_outputs_without_an_encoding_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_anything()
    write_jsonl([{"text": "ö"}], None)
    assert json.loads(sys.stdout.getvalue()) == {"text": "ö"}
