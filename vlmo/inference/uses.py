"""What the registered tasks offer to users, as methods of `Predictor` and commands of `vlmo.predict`."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmo.errors import InputError, VLMoError
from vlmo.registry import TASKS

if TYPE_CHECKING:
    from vlmo.tasks.base import Use


def registered_uses() -> "dict[str, Use]":
    """Gives the uses of all tasks by name; of those with one name the first, by which the others go."""
    uses = [use for task in TASKS.values() for use in task.uses]
    return {use.name: use for use in reversed(uses)}


def find_use(model: Any, name: str) -> "Use | None":
    """Finds the use of that name whose head the model has, first among the model's own tasks.

    Where it has none of their heads, one that it lacks the head for; None if no task offers anything of that name.
    """
    uses = [use for task in [*model.tasks, *TASKS.values()] for use in task.uses if use.name == name]
    return next((use for use in uses if hasattr(model, use.head)), uses[0] if uses else None)


def uses_of(model: Any) -> "dict[str, Use]":
    """Gives the uses that a model has the heads for, by name."""
    found = {name: find_use(model, name) for name in registered_uses()}
    return {name: use for name, use in found.items() if use and hasattr(model, use.head)}


class ComputesBy:
    """A predictor whose `compute` is another function; all else is the predictor's."""

    def __init__(self, predictor: Any, compute: Callable[..., Any]) -> None:
        self._predictor, self.compute = predictor, compute

    def __getattr__(self, name: str) -> Any:
        return getattr(self._predictor, name)


def bind(use: "Use", predictor: Any) -> Callable[..., Any]:
    """Makes a method of a use: one input gives one result, lists give a list; what is one goes with each of many."""
    signature = inspect.signature(use.run)

    @functools.wraps(use.run)
    def method(*args: Any, **kwargs: Any) -> Any:
        predictor.require_head(use.head, use.purpose)
        given = signature.bind(predictor, *args, **kwargs).arguments
        columns = {name: given[name] for name in use.columns}
        columns |= {name: given[name] for name in use.optional if given.get(name) is not None}
        many = any(map(_is_many, columns.values()))
        columns = broadcast(columns)
        for name, values in columns.items():
            wrong = [value for value in values if not name.startswith("image") and not isinstance(value, str)]
            if wrong:
                raise InputError(f"{name}: a text is a str, not {type(wrong[0]).__name__}")
        results = use.run(**(given | columns))
        return results if many else results[0]

    _, *own = signature.parameters.values()
    method.__signature__ = signature.replace(parameters=own, return_annotation=Any)  # type: ignore[attr-defined]  # as help() shows it
    return method


def _is_many(value: Any) -> bool:
    return isinstance(value, list | tuple)


def broadcast(columns: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Gives lists of one length: what is one is repeated. Raises VLMoError if lists are of different lengths."""
    lengths = {name: len(value) for name, value in columns.items() if _is_many(value)}
    if len(set(lengths.values())) > 1:
        raise VLMoError("lists of different lengths: " + ", ".join(f"{n} {number}" for n, number in lengths.items()))
    number = next(iter(lengths.values()), 1)
    return {name: value if name in lengths else [value] * number for name, value in columns.items()}
