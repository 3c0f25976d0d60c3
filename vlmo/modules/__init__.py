"""The networks; `from vlmo.modules import VLMo` gives the Lightning module, imported when it is asked for."""

import importlib
from typing import Any

__all__ = ["VLMo", "VLMoModel"]  # noqa: F822  (looked up below)

_HOMES = {"VLMo": "vlmo.modules.vlmo_module", "VLMoModel": "vlmo.modules.model"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
