"""Data that are read where they lie: each kind of source registers itself in `SOURCES`, in its own file."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
