"""The objectives, by the names that `loss_names` uses: the name is the file."""

import importlib
import pkgutil
from collections.abc import Iterable

from vlmo.tasks.base import Objective, ObjectiveOutput, num_samples


def objective_names() -> list[str]:
    """Names of all objectives there are."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]


def get_objective(name: str) -> Objective:
    """The objective called `name`."""
    module = importlib.import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Objective) and getattr(value, "name", None) == name:
            return value()
    raise LookupError(f"{module.__name__} has no Objective with name = {name!r}")


def get_objectives(names: Iterable[str]) -> list[Objective]:
    """The objectives called `names`, each after those that it requires."""
    waiting = [get_objective(name) for name in names]
    ordered: list[Objective] = []
    while waiting:
        ready = [o for o in waiting if set(o.requires) <= {done.name for done in ordered}]
        assert ready, f"settings let objectives through that lack what they require: {[o.name for o in waiting]}"
        ordered += ready
        waiting = [o for o in waiting if o not in ready]
    return ordered


__all__ = ["Objective", "ObjectiveOutput", "get_objective", "get_objectives", "num_samples", "objective_names"]
