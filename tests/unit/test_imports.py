"""Imports point down, and every module can be imported alone."""

import ast
import graphlib
import importlib
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmo
from vlmo.registry import TASKS

PACKAGE = Path(vlmo.__file__).parent
REPOSITORY = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in FILES]

# A room may import rooms of a lower level, and itself. So the networks know nothing of tasks, tasks nothing of training
# and data nothing of the model. Whatever is not named here is a command: it may import everything, nothing imports it.
LEVELS = [
    ("errors", "files", "images"),
    ("batch", "registry", "plugins", "pages", "label_names"),
    ("distributed", "settings", "sources", "text", "transforms"),
    ("config", "datasets", "modules"),
    ("checkpoints", "evaluation", "utils"),
    ("tasks",),
    ("datamodules",),
    ("inference",),
    ("training",),
    ("planning",),
]
COMMAND = len(LEVELS)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# files whose place among their users is not that of what they need
ROOMS = {"vlmo.modules.vlmo_module": "training"}
# the console's MFU counts the operations of a step as the plan does
ROOMS |= {f"vlmo.planning.{name}": "training" for name in ("step", "recording", "compute", "devices")}
# `VLMoModel.from_pretrained` and `save_pretrained` import what they delegate to when they are called
UPWARDS = {("vlmo.modules.model", "vlmo.checkpoints.pretrained")}
NAMES = {"PIL": "pillow", "pkg_resources": "setuptools", "pytorch_lightning": "pytorch-lightning"}
# What a requirement itself requires, and what is asked for only by those who use it.
INDIRECT = {
    "huggingface_hub",
    "packaging",
    "deepspeed",
    "fairscale",
    "easy_vqa",
    "trackio",
    "ray",
    "simplejpeg",
    "clip_benchmark",
    "eccv_caption",
    "peft",
    "gradio",
    "openvino",
    "onnxruntime",
    "nncf",
    "fastapi",
    "starlette",  # (what FastAPI is made of)
    "uvicorn",
}


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


def room(module: str) -> str:
    """ "vlmo.modules.heads" -> "modules"."""
    return ROOMS.get(module, module.split(".")[1] if "." in module else "")


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_imports_point_down(path):
    module = MODULES[FILES.index(path)]
    own = room(module)
    for imported, _ in imports(path):
        if imported.startswith("vlmo.") and own and room(imported) != own and (module, imported) not in UPWARDS:
            assert LEVEL.get(room(imported), COMMAND) < LEVEL.get(own, COMMAND), f"{module} imports {imported}"


def test_the_levels_are_of_rooms_that_there_are():
    assert set(LEVEL) <= {room(module) for module in MODULES}


def test_no_file_imports_itself_by_way_of_others():
    """Imports within functions and under TYPE_CHECKING count too."""
    graph = {
        module: {imported for imported, _ in imports(path) if imported in MODULES and imported != module}
        for module, path in zip(MODULES, FILES, strict=True)
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_networks_know_torch_and_einops_alone():
    allowed = {"torch", "einops", "timm", "numpy", "scipy", "fairscale"}
    for module, path in zip(MODULES, FILES, strict=True):
        if module.startswith("vlmo.modules.") and module not in ROOMS:
            others = {name.split(".")[0] for name, _ in imports(path)} - set(sys.stdlib_module_names) - {"vlmo"}
            assert others <= allowed, f"{module}: {others - allowed}"


def test_tasks_and_model_leave_the_data_module_alone():
    for folder in ("modules", "tasks"):
        for path in (PACKAGE / folder).rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert "datamodule" not in names, path


def test_downstream_tasks_are_named_at_home_alone():
    """Beside a task's own file, and those of tasks that build on it, stand data sets, converters, suites, demo."""
    for task, kind in ((name, each) for name, each in TASKS.items() if each.stage is None):
        homes = ("tasks/{}.py", "datasets/{}_dataset.py", "evaluation/suites/{}.py")
        heirs = [name for name, each in TASKS.items() if issubclass(each, kind)]
        own = tuple(home.format(name) for name in heirs for home in homes)
        own += ("utils/", "demo/", "config.py")
        for path in FILES:
            place = path.relative_to(PACKAGE).as_posix()
            if not place.startswith(own):
                assert task not in path.read_text(encoding="utf-8").lower(), f"{place} names {task}"


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
    assert failures.get(timeout=300) == []  # (of a busy machine)
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
