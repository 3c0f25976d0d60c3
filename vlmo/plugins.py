"""Plugins: modules from elsewhere that register tasks, data sets, architectures, transforms, loggers or named configs.

    from vlmo.config import named
    from vlmo.registry import TASKS

    @TASKS.register("my_task")  # likewise DATASETS, ARCHITECTURES, TRANSFORMS, LOGGERS
    class MyTask(Task): ...

    named("task_my_task_base", loss_names={"itm": 0, "itc": 0, "mlm": 0, "my_task": 1})

A run names them with `plugins='["my_package.my_task"]'`; an installed package can name its own as entry points of the
group "vlmo.plugins". They are imported before a config is resolved, and in every other process that meets the config.
"""

import functools
import importlib
import importlib.metadata
import os
import sys
from typing import Any

from vlmo.errors import VLMoError

GROUP = "vlmo.plugins"


def load(names: Any = ()) -> None:
    """Imports the installed plugins, and the modules called `names`: the value of the option `plugins`.

    Modules are also looked for in the working directory.

    Raises:
        VLMoError: one line, from the plugin's own error.
    """
    load_installed()
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise VLMoError(
            f"""plugins={names!r}: give a list of modules, such as plugins='["my_package.my_task"]'""", "plugins"
        )
    for name in names:
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                what = f"there is no module {error.name}; install it, or start in the folder that it lies in"
            else:
                what = f"cannot be imported ({_one_line(error)}); correct it (run.py -d shows where)"
            raise VLMoError(f"plugins: {name}: {what}", "plugins") from error


@functools.cache
def load_installed() -> None:
    """Imports what installed packages name, once. Raises VLMoError from the error of one that fails."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else "an installed package"
            raise VLMoError(
                f"plugin {entry.name} of {package}: {entry.value} cannot be imported ({_one_line(error)}); repair, "
                "upgrade or uninstall that package"
            ) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
