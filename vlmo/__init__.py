"""VLMo: vision-language pre-training with a mixture of modality experts (arXiv 2111.02358).

    from vlmo import Predictor, VLMoModel, resolve, run

Importing the package imports nothing else; these are looked up when they are first used.
"""

import importlib
import os
from typing import Any

# Lightning imports gcsfs where it is installed: with its support of zonal buckets it says so at every start, and warns
# at every read without a login
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

__version__ = "1.0.0"
__all__ = ["Predictor", "VLMoModel", "resolve", "run"]  # noqa: F822  (looked up below)

_HOMES = {
    "Predictor": "vlmo.inference",
    "VLMoModel": "vlmo.modules.model",
    "resolve": "vlmo.config",
    "run": "vlmo.training.runner",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
