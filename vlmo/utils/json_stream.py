"""The elements of a long JSON list, one after the other: annotation files of gigabytes in the memory of one element."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from vlmo.errors import VLMoError

READ_CHARACTERS = 1 << 20
BLANKS = re.compile(r"[ \t\r\n]*")


def stream_list(path: str, key: str | None = None) -> Iterator[Any]:
    """Yields the elements of the list that the file holds, or with a `key`, that the file's object holds under it.

    What follows the list is not read. Raises VLMoError if the file cannot be read or is not such JSON.
    """
    with _opened(path) as text:
        if key is not None:
            _enter_object(text, key)
        text.expect("[", "a list")
        yield from _elements(text)


def stream_entries(path: str) -> Iterator[tuple[str, Any]]:
    """Yields the entries of the object that the file holds, each a name and a value.

    Raises VLMoError if the file cannot be read or is not such JSON.
    """
    with _opened(path) as text:
        text.expect("{", "an object")
        yield from _entries(text)


@contextmanager
def _opened(path: str) -> Iterator["_Text"]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield _Text(file)
    except OSError as error:
        raise VLMoError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise VLMoError(f"{where}: not the JSON expected ({error.msg}); is the download complete?") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise VLMoError(f"{path}: not valid JSON ({error})") from error


class _Text:
    """A window that moves over the file's text; it holds at least the value that is being read."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at = file, "", 0
        self._lines_before = 0
        self._decode = json.JSONDecoder().raw_decode

    def _read_on(self, size: int = READ_CHARACTERS) -> bool:
        """Drops what has been used and appends more; False at the end of the file."""
        more = self._file.read(size)
        self._lines_before += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def next_character(self) -> str:
        """The next character that is no blank, "" at the end; it stays the next one."""
        while True:
            self._at = BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches anything
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def expect(self, character: str, meaning: str) -> None:
        """Moves past the character; an error if another one comes."""
        if self.next_character() != character:
            raise self.error(f"expected {meaning}")
        self._at += 1

    def value(self) -> Any:
        """The next value. Reads on for as long as it is incomplete: twice as much each time, so linear in all."""
        size = READ_CHARACTERS
        self.next_character()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._read_on(size):
                    raise self.error(error.msg, error.pos) from None
            else:
                if end < len(self._text) or not self._read_on(size):  # a number may go on behind the window
                    self._at = end
                    return value
            size *= 2

    def error(self, message: str, position: int | None = None) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, self._text, self._at if position is None else position)
        error.lineno += self._lines_before
        return error


def _enter_object(text: _Text, key: str) -> None:
    """Moves to the value of `key` in the object that begins here."""
    text.expect("{", f"an object with {key!r}")
    while text.next_character() == '"':
        name = text.value()
        text.expect(":", "':' after a name")
        if name == key:
            return
        text.value()
        if text.next_character() != "}":
            text.expect(",", "',' between the entries of an object")
    raise text.error(f"an object without {key!r}")


def _elements(text: _Text) -> Iterator[Any]:
    """The elements of the list whose bracket has been passed."""
    if text.next_character() == "]":
        return
    while True:
        yield text.value()
        if text.next_character() == "]":
            return
        text.expect(",", "',' or ']' after an element of the list")


def _entries(text: _Text) -> Iterator[tuple[str, Any]]:
    """The entries of the object whose brace has been passed."""
    if text.next_character() == "}":
        return
    while True:
        if text.next_character() != '"':
            raise text.error("expected a name")
        name = text.value()
        text.expect(":", "':' after a name")
        yield name, text.value()
        if text.next_character() == "}":
            return
        text.expect(",", "',' or '}' after an entry of the object")
