"""The tasks: each file of this folder registers its own, by the names that `loss_names` uses."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
