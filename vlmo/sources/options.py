"""What the options of a run say about sources."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SourceOptions:
    """Columns ("": the first that looks like it), and the cache on the disk with its size in bytes."""

    image_column: str = ""
    text_column: str = ""
    cache: Path = Path("~/.cache/vlmo").expanduser()
    cache_bytes: int = 50_000_000_000

    @classmethod
    def from_settings(cls, settings: Any) -> "SourceOptions":
        cache = Path(settings.data_cache or cls.cache).expanduser()
        return cls(settings.image_column, settings.text_column, cache, int(settings.data_cache_gb * 1e9))
