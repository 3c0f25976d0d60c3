"""The data sets: each registers itself in `DATASETS`, in the file of its class.

To add one: a file here with a class, unless one that is here does, and a `DatasetSpec`; or a module of your own that
registers one, loaded with `plugins`.
"""

import importlib
import pkgutil

from vlmo.registry import DATASETS

__all__ = ["DATASETS"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
