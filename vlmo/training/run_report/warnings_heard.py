"""What a run warned of, kept for its report."""

import logging
import warnings
from collections import Counter
from types import TracebackType
from typing import Any

MOST = 100  # different ones that are kept


class WarningsHeard(logging.Handler):
    """While it is entered, keeps each different line of a log or a library's warning, and how often it came.

    Nothing is kept from anybody: logs and warnings go where they went before.

    Attributes:
        counts: by line.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[str] = Counter()
        self._show: Any = None

    def __enter__(self) -> "WarningsHeard":
        logging.getLogger().addHandler(self)
        self._show, warnings.showwarning = warnings.showwarning, self._heard
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        logging.getLogger().removeHandler(self)
        warnings.showwarning = self._show

    def emit(self, record: logging.LogRecord) -> None:
        self._keep(record.getMessage())

    def _heard(self, message: Any, category: type[Warning], *place: Any, **named: Any) -> None:
        self._keep(f"{category.__name__}: {message}")
        self._show(message, category, *place, **named)

    def _keep(self, line: str) -> None:
        line = " ".join(line.split())
        if line in self.counts or len(self.counts) < MOST:
            self.counts[line] += 1
