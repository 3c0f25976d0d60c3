"""Untrusted annotations: whatever is wrong is named with its file and line."""

import pytest

from vlmo.errors import VLMoError
from vlmo.utils.annotations import column, field, inside, integer, listed, raise_problems, read_records, require_files


def test_paths_stay_inside(tmp_path):
    root = str(tmp_path)
    assert inside(root, "a/b.jpg", "x") == f"{root}/a/b.jpg"
    assert inside(root, "a/../b..jpg", "x") == f"{root}/a/../b..jpg"
    assert inside(root, f"{root}/a.jpg", "x") == f"{root}/a.jpg"
    for path in ("../a.jpg", "a/../../a.jpg", "/etc/passwd", f"{root}-other/a.jpg"):
        with pytest.raises(VLMoError, match="list.json:3: .*leads out of"):
            inside(root, path, "list.json:3")
    with pytest.raises(VLMoError, match="is no path"):
        inside(root, "a\0b", "x")


def test_fields():
    assert field({"a": "b"}, "a", str, "x") == "b"
    assert field({"a": True}, "a", bool, "x") is True
    for record, message in (
        ({"b": 1}, "f:1: 'a' is missing .found: 'b'"),
        ({"a": None}, "f:1: 'a' must be str or int, found None"),
        ({"a": True}, "must be str or int, found True"),
        ([1], "expected an object"),
        ({"a": [0] * 100}, r"found \[0, 0.*\.\.\.$"),
    ):
        with pytest.raises(VLMoError, match=message):
            field(record, "a", (str, int), "f:1")


def test_columns():
    assert column([{"a": "b"}, {"a": "c"}], "a", str, "x") == ["b", "c"]
    for records in ([{"a": "b"}, {"a": 1}], [{"a": "b"}, {}], [{"a": "b"}, None]):
        with pytest.raises(VLMoError, match="f:1: "):
            column(records, "a", str, "f:1")


def test_integers():
    assert [integer({"a": value}, "a", "x") for value in (3, -3.0, 2**63 - 1)] == [3, -3, 2**63 - 1]
    for value in (True, "3", None, 1.5, float("nan"), float("inf"), 2**63, 1e300):
        with pytest.raises(VLMoError, match="'a' must be"):
            integer({"a": value}, "a", "x")


def test_required_files_are_all_named(tmp_path):
    (tmp_path / "there.json").write_text("")
    with pytest.raises(VLMoError, match=r"missing in .*: a.json, b\nExpected there:\n  a layout"):
        require_files(str(tmp_path), ("a.json", "there.json", "b"), "\n  a layout\n")
    with pytest.raises(VLMoError, match="is not a folder"):
        require_files(str(tmp_path / "no"), (), "")


def test_many_problems_are_shortened():
    raise_problems([])
    with pytest.raises(VLMoError, match=r"(?s)^p0\n.*p9\n... and 5 more$"):
        raise_problems([f"p{number}" for number in range(15)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"a": "1, \\"2\\"", "b": "é"}\n\n{"a": "3"}\n'),
        ("a.json", '{"a": "1, \\"2\\"", "b": "é"}\n{"a": "3"}'),
        ("a.csv", 'a,b\n"1, ""2""",é\n3,\n'),
        ("a.tsv", 'a\tb\n1, "2"\té\n3\n'),
    ],
)
def test_records(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    records = list(read_records(str(tmp_path / name)))
    assert [record for _, record in records] == [{"a": '1, "2"', "b": "é"}, {"a": "3"}]
    assert records[0][0] == f"{tmp_path / name}:{1 if 'json' in name else 2}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8"),
        ("a.csv", b'a,b\n1,"2\n', "not a valid table"),
        ("a.csv", b"a,b\n1,2,3\n", "more columns"),
        ("a.xml", b"", "unknown kind"),
    ],
)
def test_wrong_records(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VLMoError, match=message):
        list(read_records(str(tmp_path / name)))
    with pytest.raises(VLMoError, match="cannot be read"):
        list(read_records(str(tmp_path / "missing.csv")))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a cat', \"it's\"]", ["a cat", "it's"]),
        ('["a cat"]', ["a cat"]),
        ("('a', 'b')", ["a", "b"]),
        ("[2, 2]", [2, 2]),
        ("[]", []),
        ("[laughs]", None),
        ("a cat ['x']", None),
        ("(a cat)", None),
        ("", None),
    ],
)
def test_lists_in_texts(text, value):
    assert listed(text) == value


@pytest.mark.parametrize("text", ["['a' 'b']", "['a', nan]", "['a', 'b'", "['a', b']"])
def test_lists_that_cannot_be_read(text):
    if text.endswith("]"):
        with pytest.raises(VLMoError, match="looks like a list"):
            listed(text)
    else:
        assert listed(text) is None


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}]', '[\n {"a": 1},\n {"a": 2}\n]'])
def test_one_list_of_records(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    assert [record for _, record in read_records(str(tmp_path / "a.json"))] == [{"a": 1}, {"a": 2}]


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption,caption\n1,2,3\n")
    with pytest.raises(VLMoError, match="two columns 'caption'"):
        list(read_records(str(tmp_path / "a.csv")))
