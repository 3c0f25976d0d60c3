"""How an option is declared: one typed field with its default and its meaning, in a group of options.

    class ImageOptions(OptionGroup):
        image_size: PositiveInt = option(224, "pixels a side")

Config, validation, `print_config` and the reference page derive from the fields.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import pydantic
from pydantic import ConfigDict, Field

from vlmo.registry import Registry


def option(default: Any, meaning: str) -> Any:
    """The default of an option (or a function that makes it), and what it means, as users read it."""
    if callable(default):
        return Field(default_factory=default, description=meaning)
    return Field(default, description=meaning)


class OptionGroup(pydantic.BaseModel):
    """Options that belong together; the docstring's first line is their heading."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class NamesOf:
    """Among the annotations of a field: its value, or each of its entries, is a name in the registry."""

    registry: Registry[Any]


# Rules among several options: each gives the problems that it finds, one line each with its remedy.
RULES: list[Callable[[Any], Iterable[str]]] = []

Rule = TypeVar("Rule", bound=Callable[[Any], Iterable[str]])


def rule(check: Rule) -> Rule:
    """Makes a function of the settings one of the rules; one that reads a wrong option is left at that point."""
    RULES.append(check)
    return check
