"""A checklist on the console: what is in order, what is worth knowing, and at the end what to do."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from vlmo.errors import VLMoError

MARKS = {"problem": "[XX]", "note": "[!!]", "good": "[ok]", "blocked": "[--]"}


class Checklist:
    """Runs checks, prints what each finds, and remembers the problems (each once, whoever found it)."""

    def __init__(self) -> None:
        self.problems: dict[str, None] = {}

    def look(self, name: str, check: Callable[[], Iterable[str]]) -> None:
        """`check` yields lines to read, warns through the log, and raises VLMoError with a line for each problem."""
        good: list[str] = []
        problems: list[str] = []
        with _warnings() as notes:
            try:
                good.extend(check())
            except VLMoError as error:
                problems = str(error).splitlines()
        new = [line for line in problems if line not in self.problems]
        self.problems |= dict.fromkeys(problems)
        lines = [*(("problem", line) for line in new), *(("note", line) for line in notes)]
        lines += [("good", line) for line in good]
        if not lines and problems:
            lines = [("blocked", "not looked at: a problem above stands in the way")]
        for number, (kind, line) in enumerate(lines):
            print(f"{MARKS[kind]} {name if not number else '':<12} {line}", flush=True)

    def conclude(self) -> int:
        """Prints the end of the list; returns the exit status."""
        if not self.problems:
            print("ready")
            return 0
        print("\nwhat to do:")
        for number, problem in enumerate(self.problems, 1):
            print(f"{number:>3}. {problem}")
        return 2


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What this package warns of meanwhile."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vlmo")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
