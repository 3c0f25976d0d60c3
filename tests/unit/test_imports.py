"""Imports point down, and every module can be imported alone."""

import ast
import importlib
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmo

PACKAGE = Path(vlmo.__file__).parent
REPOSITORY = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in FILES]

# A part may import parts of a lower level, and itself. So the model knows nothing of data, and data nothing of it.
# Whatever is not named here is a command: it may import everything, and nothing imports it.
LEVELS = {
    0: ("errors", "distributed", "files", "image_formats", "metrics"),
    1: ("config",),
    2: ("settings",),
    3: ("transforms",),
    4: ("datasets", "modules", "tasks", "checkpoints"),
    5: ("datamodules", "evaluation", "utils"),
    6: ("training", "inference"),
}
COMMAND = 7
LEVEL = {part: level for level, parts in LEVELS.items() for part in parts}
NAMES = {"PIL": "pillow", "pkg_resources": "setuptools", "pytorch_lightning": "pytorch-lightning"}
# What a requirement itself requires, and what is asked for only by those who use it.
INDIRECT = {"huggingface_hub", "tokenizers", "packaging", "deepspeed", "fairscale", "easy_vqa"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports, and whether it does when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in late
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            for name in whole or {node.module}:
                yield name, id(node) not in late


def part(module: str) -> str:
    """ "vlmo.modules.heads" -> "modules"."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_imports_point_down(path):
    own = part(MODULES[FILES.index(path)])
    for module, _ in imports(path):
        other = part(module) if module.startswith("vlmo.") else own
        if own and other != own:
            assert LEVEL.get(other, COMMAND) < LEVEL.get(own, COMMAND), f"{own} imports {module}"


def test_the_levels_are_of_parts_that_there_are():
    assert set(LEVEL) <= {part(module) for module in MODULES}


def test_objectives_and_model_leave_the_data_module_alone():
    for path in (PACKAGE / "modules").rglob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "datamodule" not in names, path


def test_other_packages_are_requirements():
    lines = (REPOSITORY / "requirements.txt").read_text().lower().splitlines()
    required = {match[0] for line in lines if (match := re.match(r"[\w-]+", line))}
    for path in [*FILES, REPOSITORY / "run.py"]:
        for module, _ in imports(path):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top not in INDIRECT | {"vlmo"}:
                assert NAMES.get(top, top).lower() in required, f"{path}: {module}"


def test_packages_that_not_everybody_has_are_imported_late():
    for path in FILES:
        assert not {module.split(".")[0] for module, early in imports(path) if early} & INDIRECT, path


def test_every_module_can_be_imported_alone():
    # in a forked process: what the others import is there, what this project has imported is forgotten each time
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    process = context.Process(target=import_each_alone, args=(failures,))
    process.start()
    assert failures.get(timeout=60) == []
    process.join(60)


def import_each_alone(failures: multiprocessing.Queue) -> None:
    warnings.simplefilter("ignore")
    failed = []
    for name in MODULES:
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "vlmo"]:
            del sys.modules[loaded]
        if not name.endswith("__main__"):
            try:
                importlib.import_module(name)
            except Exception as error:
                failed.append(f"{name}: {error!r}")
    failures.put(failed)
