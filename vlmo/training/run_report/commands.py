"""The command lines that a run is repeated, gone on from and used with."""

import json
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vlmo.config import ex, resolve
from vlmo.registry import TASKS


@cache
def _named_configs() -> dict[str, dict[str, Any]]:
    return {name: resolve(name) for name in ex.named_configs if name.startswith("task_")}


def nearest_config(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Gives the named config of a task that differs from a run's settings in the fewest options, and its values."""
    configs = _named_configs()
    name = min(configs, key=lambda each: len(differences(settings, configs[each])))
    return name, configs[name]


def differences(settings: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the options that have another value than in `base`; of one that is several values, those that differ."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        other = base.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found |= {f"{name}.{key}": own for key, own in value.items() if own != other.get(key, 0)}
        elif value != (list(other) if isinstance(other, tuple) else other):
            found[name] = value
    return found


def command_line(named: str, options: Mapping[str, Any]) -> str:
    """Gives the call of run.py."""
    words = [f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in options.items()]
    return "python run.py with " + " ".join([named, *map(shlex.quote, words)])


def next_steps(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Gives by purpose what can be done with a run now."""
    named, config = nearest_config(settings)
    options = differences(settings, config)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    found = {}
    if not settings["test_only"]:
        again = {
            name: value for name, value in options.items() if name not in ("resume_from", "resume_during_training")
        }
        found["go on"] = command_line(named, again | {"resume_during_training": True})
        found["evaluate"] = command_line(named, again | {"load_path": str(checkpoint), "test_only": True})
    elif settings["load_path"]:
        checkpoint = Path(settings["load_path"])
        found["run again"] = command_line(named, options)
    else:
        return {"run again": command_line(named, options)}
    path = shlex.quote(str(checkpoint))
    active = [name for name, weight in settings["loss_names"].items() if weight and name in TASKS]
    for use in {use.name: use for name in active for use in TASKS[name].uses}.values():
        columns = " ".join(f"--{column.replace('_', '-')} {_example(column)}" for column in use.columns)
        found[use.purpose] = f"python -m vlmo.predict {use.command or use.name} --checkpoint {path} {columns}"
    if any(TASKS[name].provides == "contrast" for name in active):
        found["rank images"] = f'python -m vlmo.predict rank --checkpoint {path} --image FOLDER --text "a red cat"'
    found["report again"] = report_command(folder)
    return found


def report_command(folder: Path, *options: str) -> str:
    """Gives the call of `vlmo report` for a run."""
    return " ".join(["python -m vlmo.report", shlex.quote(str(folder)), *options])


def _example(column: str) -> str:
    if column.startswith("image"):
        return f"{column.removeprefix('image').strip('_') or 'a'}.jpg"
    return '"what is it?"' if column == "question" else '"a red cat"'
