"""A streamed list is what `json.load` gives, whatever the window; what is wrong is found and placed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmo.errors import VLMoError
from vlmo.utils import json_stream
from vlmo.utils.json_stream import stream_entries, stream_list

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "a.json"


@given(values=st.lists(VALUES, max_size=8), window=st.integers(1, 9), indent=st.none() | st.integers(0, 2))
def test_lists(values, window, indent, path):
    path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "READ_CHARACTERS", window)
        assert list(stream_list(str(path))) == values


@given(content=st.dictionaries(st.text(), VALUES, max_size=8), window=st.integers(1, 9), indent=st.none() | st.just(1))
def test_objects(content, window, indent, path):
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "READ_CHARACTERS", window)
        assert dict(stream_entries(str(path))) == content


@pytest.mark.parametrize("text", ["", "[]", '{"a"', '{"a" 1}', '{"a": 1', '{"a": 1 "b": 2}', '{"a": 1,}', "{1: 2}"])
def test_what_is_no_object(text, path):
    path.write_text(text)
    with pytest.raises(VLMoError, match="not the JSON expected"):
        list(stream_entries(str(path)))


@given(
    values=st.lists(VALUES, max_size=4), others=st.dictionaries(st.text(), VALUES, max_size=3), window=st.integers(1, 9)
)
def test_lists_in_objects(values, others, window, path):
    content = {name: value for name, value in others.items() if name != "images"} | {"images": values, "last": 1}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "READ_CHARACTERS", window)
        assert list(stream_list(str(path), "images")) == values


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("[1,\n2,", None, r"a\.json:2: .*is the download complete"),
        ('[1,\n{"a": \n1', None, r"a\.json:[23]: "),
        ("[1 2]", None, "',' or ']'"),
        ("[1,]", None, "Expecting value"),
        ("", None, "expected a list"),
        ("{}", None, "expected a list"),
        ("[]", "images", "expected an object with 'images'"),
        ('{"a": 1}', "images", "an object without 'images'"),
        ('{"images": {"a": 1}}', "images", "expected a list"),
        ('{"a" 1}', "images", "':' after a name"),
        ("[" * 100_000, None, "not"),
    ],
)
def test_mistakes(text, key, message, path):
    path.write_text(text)
    with pytest.raises(VLMoError, match=message):
        list(stream_list(str(path), key))


def test_unreadable_files(tmp_path):
    with pytest.raises(VLMoError, match="cannot be read"):
        list(stream_list(str(tmp_path / "missing.json")))
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(VLMoError, match="not valid JSON"):
        list(stream_list(str(tmp_path / "latin.json")))
