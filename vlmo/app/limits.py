"""What a visitor of the page may ask for: size of an image, length of a text, number of requests."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from vlmo.errors import InputError
from vlmo.images import FORMATS
from vlmo.inference.io import load_image

MOST_BYTES = 20 * 2**20  # of a file
MOST_PIXELS = 50_000_000  # of an image
MOST_CHARACTERS = 1000  # of a text
MOST_CLASSES = 1000  # of a classification
PER_MINUTE = 60  # requests of one visitor
WINDOW = 60.0  # seconds
MOST_VISITORS = 10_000  # that are remembered


def checked_image(path: str | None, what: str = "an image") -> Image.Image:
    """Reads an image that a visitor gave.

    Raises:
        InputError: if there is none, it is too large, or no image that can be decoded.
    """
    if not path:
        raise InputError(f"Give {what} first: upload, paste or photograph one, or pick an example.")
    size = Path(path).stat().st_size
    if size > MOST_BYTES:
        raise InputError(f"This file has {size / 2**20:.0f} MiB; {MOST_BYTES // 2**20} MiB are taken.")
    try:
        with Image.open(path, formats=FORMATS) as opened:  # (reads the header alone)
            width, height = opened.size
    except Exception as error:  # Pillow's plugins raise almost anything on damaged bytes
        raise InputError("This file is no image that can be read; JPEG, PNG, WebP and GIF are.") from error
    if width * height > MOST_PIXELS:
        raise InputError(
            f"This image has {width * height / 1e6:.0f} megapixels ({width} x {height}); up to "
            f"{MOST_PIXELS / 1e6:.0f} are taken: make it smaller."
        )
    try:
        return load_image(Path(path))
    except InputError as error:
        raise InputError("This image is damaged: it cannot be decoded to its end.") from error


def checked_text(text: str | None, what: str = "text") -> str:
    """Gives a text without blanks around it. Raises InputError if there is none, or it is too long."""
    text = (text or "").strip()
    if not text:
        raise InputError(f"The {what} is empty: type one.")
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"The {what} has {len(text):,} characters; {MOST_CHARACTERS:,} are taken.")
    return text


class Requests:
    """Counts the requests of each visitor over the last minute."""

    def __init__(self, per_minute: int = PER_MINUTE, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self._times: dict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def count(self, visitor: str) -> None:
        """Counts one. Raises InputError if there were too many."""
        now = self.clock()
        with self._lock:
            if len(self._times) > MOST_VISITORS:
                self._times.clear()
            times = self._times[visitor]
            while times and now - times[0] >= WINDOW:
                times.popleft()
            if len(times) >= self.per_minute:
                wait = WINDOW - (now - times[0])
                raise InputError(f"More than {self.per_minute} requests in a minute: wait {wait:.0f} seconds.")
            times.append(now)
