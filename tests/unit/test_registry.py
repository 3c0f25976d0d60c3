"""Names that users type, and what they stand for."""

import sys

import pytest

from vlmo.errors import VLMoError
from vlmo.registry import ARCHITECTURES, DATASETS, LOGGERS, TASKS, TRANSFORMS, Registry


@pytest.fixture
def sizes(tmp_path, monkeypatch):
    """A registry whose built-in entry comes with the module `home_of_sizes`."""
    (tmp_path / "home_of_sizes.py").write_text("from tests.unit import test_registry\ntest_registry.add_to('small')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "add_to", lambda name: registry.register(name)(1), raising=False)
    registry = Registry("size", "home_of_sizes")
    yield registry
    sys.modules.pop("home_of_sizes", None)


@pytest.mark.parametrize("registry", [TASKS, DATASETS, ARCHITECTURES, TRANSFORMS, LOGGERS], ids=lambda r: r.what)
def test_built_in_entries_are_there_when_looked_for(registry):
    assert len(registry) and all(name in registry for name in registry)


def test_the_home_is_imported_on_the_first_look(sizes):
    sizes.register("large")(3)
    assert "home_of_sizes" not in sys.modules
    assert dict(sizes) == {"large": 3, "small": 1}


def test_a_name_is_taken_once(sizes):
    sizes.register("medium")(2)
    sizes.register("medium")(2)  # the same again
    with pytest.raises(VLMoError, match="size 'medium': is registered already"):
        sizes.register("medium")(5)


def test_a_class_of_a_module_that_is_imported_anew_takes_its_own_place():
    registry = Registry("task", "vlmo.errors")
    old, new = (type("Probe", (), {"__module__": "probe"}) for _ in range(2))
    registry.register("probe")(old)
    registry.register("probe")(new)
    assert registry["probe"] is new


def test_unknown_names(sizes):
    sizes.dropped["huge"] = "it never fitted"
    assert sizes.near("smal") == "'smal' is unknown; did you mean small? Known: small"
    assert sizes.near("zzz") == "'zzz' is unknown. Known: small"
    assert sizes.near("huge").startswith("'huge' was dropped: it never fitted")
    with pytest.raises(VLMoError) as error:
        sizes.require(["small", "smal", "zzz"], "model_size")
    assert [line.split(" is")[0] for line in str(error.value).splitlines()] == [
        "model_size: 'smal'",
        "model_size: 'zzz'",
    ]
