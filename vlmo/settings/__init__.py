"""The resolved config, typed, checked and frozen: what all code below the entry points sees.

`Settings.from_config` reports all problems of a config at once, each with its remedy, before anything is built.
"""

import copy
import difflib
import functools
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pydantic

from vlmo import plugins
from vlmo.errors import VLMoError
from vlmo.registry import TASKS
from vlmo.settings.option import RULES, NamesOf, OptionGroup
from vlmo.settings.options import PATCH_SIZE, Options, active_tasks

__all__ = ["PATCH_SIZE", "Settings"]


class Settings(Options):
    """All options of a run. What `from_config` returns also has the options of the tasks there are (`Task.Options`)."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Checks `config` as a whole, once its plugins are imported; what it lacks has the default.

        Raises:
            VLMoError: with one line for each problem found.
        """
        settings, problems = cls.examine(config)
        if problems:
            raise VLMoError("\n".join(problems))
        return settings

    @classmethod
    def examine(cls, config: Mapping[str, Any]) -> tuple["Settings", list[str]]:
        """As `from_config`, for those who go on looking: the settings, defaults for what is wrong, and the problems.

        Raises:
            VLMoError: if a plugin cannot be imported: what there is to check against is unknown.
        """
        if config.get("plugins"):
            plugins.load(config["plugins"])
        plugins.load_installed()
        model = _composed()
        problems: dict[str, str] = {}
        try:
            settings = model.model_validate(config)
        except pydantic.ValidationError as error:
            problems = _describe(error, config, model)
            settings = model.model_validate({name: value for name, value in config.items() if name not in problems})
        right = _Right(settings, set(problems)) if problems else settings
        lines = list(problems.values())
        for rule in (_unknown_names, *RULES):
            with suppress(WrongOption):
                lines.extend(rule(right))
        for task in active_tasks(settings).values() if "loss_names" not in problems else ():
            with suppress(WrongOption):
                lines.extend(task.check(right))
        return settings, lines

    @staticmethod
    def defaults() -> dict[str, Any]:
        """The default of every option, those of tasks included, as plain values: a config that can be changed."""
        fields = _composed().model_fields
        return {name: _plain(field.get_default(call_default_factory=True)) for name, field in fields.items()}

    @staticmethod
    def meanings() -> dict[str, str]:
        """What every option means."""
        return {name: field.description or "" for name, field in _composed().model_fields.items()}

    @staticmethod
    def groups() -> tuple[type[OptionGroup], ...]:
        """The groups of options, general ones first, then those of tasks."""
        return (*reversed(Options.__bases__), *_task_groups())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (dict(self),)  # (the class is made at run time: pickle would not find it)


def _unpickled(values: dict[str, Any]) -> Settings:
    plugins.load(values["plugins"])
    return _composed().model_construct(**values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


# --- the options of tasks ---------------------------------------------------------------------------------------------


def _task_groups() -> tuple[type[OptionGroup], ...]:
    groups = dict.fromkeys(task.Options for task in TASKS.values() if task.Options)
    return tuple(group for group in groups if not any(group in other.__mro__[1:] for other in groups))


def _composed() -> type[Settings]:
    return _compose(_task_groups())


@functools.cache
def _compose(groups: tuple[type[OptionGroup], ...]) -> type[Settings]:
    """`Settings` with the options of the groups.

    Raises:
        VLMoError: if two of them declare one option.
    """
    declared: dict[str, type] = dict.fromkeys(Settings.model_fields, Options)
    for owner in dict.fromkeys(
        owner for group in groups for owner in group.__mro__ if owner not in OptionGroup.__mro__
    ):
        for name in inspect.get_annotations(owner):
            if name in declared or hasattr(Options, name):
                other = declared.get(name, Options)
                raise VLMoError(
                    f"option {name}: {owner.__module__}.{owner.__qualname__} declares what "
                    f"{other.__module__}.{other.__qualname__} has; take another name, or share one class of options"
                )
            declared[name] = owner
    bases: tuple[Any, ...] = (*reversed(groups), Settings)
    return pydantic.create_model("Settings", __base__=bases)


# --- checking ---------------------------------------------------------------------------------------------------------


class WrongOption(Exception):
    """A rule has read an option that is wrong in itself: it has nothing to say."""


class _Right:
    """The settings for a rule: whatever is wrong in itself, or derived from that, cannot be read."""

    def __init__(self, settings: Settings, wrong: set[str]) -> None:
        self._settings, self._wrong = settings, wrong

    def __getattr__(self, name: str) -> Any:
        if name in self._wrong:
            raise WrongOption(name)
        derived = getattr(type(self._settings), name, None)
        if isinstance(derived, property) and derived.fget:
            return derived.fget(self)
        return getattr(self._settings, name)


def _describe(error: pydantic.ValidationError, config: Mapping[str, Any], model: type[Settings]) -> dict[str, str]:
    """A line for each option that is wrong."""
    lines: dict[str, str] = {}
    for item in error.errors():
        name = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, model.model_fields, 1)
            lines[name] = f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else "")
        else:
            what = item["msg"].removeprefix("Value error, ")
            if item["type"] == "tuple_type":
                what = f"is a list; write {_as_list(name, config[name])}"
            text = f"{name}={config[name]!r}: {what[0].lower()}{what[1:]}"
            lines[name] = text if name not in lines else f"{lines[name]}; or {what[0].lower()}{what[1:]}"
    return lines


def _as_list(name: str, value: Any) -> str:
    """How a list is typed, from one whose brackets or quotes are missing (a shell takes the quotes)."""
    given = [part.strip(" '\"") for part in str(value).strip("[]()").split(",")]
    entries = [part if part.replace(".", "").isdecimal() else json.dumps(part) for part in given if part]
    return f"'{name}=[{', '.join(entries)}]'"


def _unknown_names(right: Any) -> list[str]:
    """Of the options whose values are names in a registry. Defaults are not looked up, which would import a lot."""
    lines = []
    for option, field in _composed().model_fields.items():
        for registry in (annotation.registry for annotation in field.metadata if isinstance(annotation, NamesOf)):
            with suppress(WrongOption):
                default = _names(field.get_default(call_default_factory=True))
                asked = [name for name in _names(getattr(right, option)) if name not in default]
                lines += [f"{option}: {registry.near(name)}" for name in asked if name not in registry]
    return lines


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
