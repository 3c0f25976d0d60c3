"""Names that people type and what they stand for. Built-in entries and those of plugins are registered alike.

A registry imports the package of its built-in entries when it is first looked into: so settings and configs can ask for
the names of tasks without importing them, and imports point down.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, Generic, TypeVar

from vlmo.errors import VLMoError

Entry = TypeVar("Entry")


class Registry(MutableMapping[str, Entry], Generic[Entry]):
    """Entries by name, in the order in which they were registered.

    Args:
        what: one entry, as messages call it.
        home: the package or module that registers the built-in entries when it is imported.
    """

    def __init__(self, what: str, home: str) -> None:
        self.what, self.home = what, home
        self.dropped: dict[str, str] = {}  # names of earlier entries that users may still have: why they are gone
        self._entries: dict[str, Entry] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Registers what it decorates (or is called with) under `name`.

        Raises:
            VLMoError: if another entry has the name.
        """

        def add(entry: Entry) -> Entry:
            known = self._entries.get(name)
            if known is not None and not _same(known, entry):
                raise VLMoError(f"{self.what} {name!r}: is registered already, by {_origin(known)}; take another name")
            self._entries[name] = entry
            return entry

        return add

    def near(self, name: str) -> str:
        """What to say of a name that is not registered: near ones, and all there are."""
        known = sorted(self)
        if name in self.dropped:
            return f"{name!r} was dropped: {self.dropped[name]}. Known: {', '.join(known)}"
        close = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        return f"{name!r} is unknown{hint} Known: {', '.join(known)}"

    def require(self, names: Iterable[str], option: str) -> None:
        """Raises VLMoError with a line for each of the names that is not registered."""
        problems = [f"{option}: {self.near(name)}" for name in names if name not in self]
        if problems:
            raise VLMoError("\n".join(problems))

    def _load(self) -> dict[str, Entry]:
        if not self._complete:
            self._complete = True  # (before: what is imported may look into it)
            importlib.import_module(self.home)
        return self._entries

    def __getitem__(self, name: str) -> Entry:
        return self._load()[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._load()[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


class DatasetRegistry(Registry[Any]):
    """Data sets by name; the name of a source, which says where its files lie, needs no entry.

    Attributes:
        of_source: gives the entry of such a name.
    """

    of_source: Callable[[str], Any]

    def __getitem__(self, name: str) -> Any:
        kind, colon, _ = name.partition(":")
        if colon and kind in SOURCES:
            self._load()
            return self.of_source(name)
        return super().__getitem__(name)

    def near(self, name: str) -> str:
        kinds = ", ".join(f"{kind}:..." for kind in SOURCES)
        return f"{super().near(name)}; files are read in place by {kinds}"


def _origin(entry: Any) -> str:
    return getattr(entry, "__module__", type(entry).__module__)


def _same(one: Any, other: Any) -> bool:
    """Whether they are the same, or one definition whose module was imported anew."""
    name = getattr(one, "__qualname__", None)
    return one == other or (name is not None and (_origin(one), name) == (_origin(other), other.__qualname__))


# What `loss_names` names: subclasses of `vlmo.tasks.base.Task`.
TASKS: Registry[Any] = Registry("task", "vlmo.tasks")
# What the word before the colon of a source names ("tar:/data/*.tar"): `vlmo.sources.tables.Format`.
SOURCES: Registry[Any] = Registry("kind of source", "vlmo.sources")
# What `datasets` names: `vlmo.datasets.base_dataset.DatasetSpec`; a name such as "tar:/data/*.tar" is a source.
DATASETS: DatasetRegistry = DatasetRegistry("data set", "vlmo.datasets")
# What `model_arch` names: arguments of `MultiWayTransformer`.
ARCHITECTURES: Registry[dict[str, Any]] = Registry("architecture", "vlmo.modules.transformer")
# What `train_transform_keys` and `val_transform_keys` name: builders (size, autocontrast) -> transform.
TRANSFORMS: Registry[Any] = Registry("transform", "vlmo.transforms")
# What `loggers` names: builders (settings, folder) -> Lightning logger.
LOGGERS: Registry[Any] = Registry("logger", "vlmo.training.loggers")
# What `python -m vlmo.evaluate --suite` names: instances of `vlmo.evaluation.suites.base.Suite`.
SUITES: Registry[Any] = Registry("suite", "vlmo.evaluation.suites")
