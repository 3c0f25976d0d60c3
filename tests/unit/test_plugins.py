"""Modules from outside the package, named by a config or by an installed package."""

import importlib.metadata
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import run
from vlmo import plugins
from vlmo.config import ex, resolve
from vlmo.errors import VLMoError
from vlmo.registry import ARCHITECTURES, DATASETS, TASKS, TRANSFORMS
from vlmo.settings import Settings

REPOSITORY = Path(run.__file__).parent
REGISTRIES = (TASKS, DATASETS, ARCHITECTURES, TRANSFORMS)

PROBE = """
    from vlmo.config import named
    from vlmo.registry import ARCHITECTURES, DATASETS, TASKS, TRANSFORMS
    from vlmo.settings.groups import PositiveInt
    from vlmo.settings.option import OptionGroup, option

    ARCHITECTURES.register("vlmo_probe_patch8")(ARCHITECTURES["vlmo_tiny_patch16"] | {"patch_size": 8})
    DATASETS.register("probes")(DATASETS["coco"])
    TRANSFORMS.register("probe_transform")(TRANSFORMS["square_transform"])


    @TASKS.register("probe")
    class Probe(TASKS["mlm"]):
        name = "probe"
        datasets = frozenset({"probes"})

        class Options(OptionGroup):
            "Probe"

            probe_depth: PositiveInt = option(3, "layers of the probe")


    named(
        "task_probe",
        loss_names={"itm": 0, "itc": 0, "mlm": 0, "probe": 1},
        datasets=["probes"],
        model_arch="vlmo_probe_patch8",
        image_size=24,
        val_transform_keys=["probe_transform"],
        probe_depth=5,
    )
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes modules into the working directory, which is no folder of `sys.path` yet; forgets them afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = [dict(registry) for registry in REGISTRIES], set(ex.named_configs), set(sys.modules)

    def file(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    yield file
    for registry, entries in zip(REGISTRIES, before[0], strict=True):
        for name in set(registry) - set(entries):
            del registry[name]
    for name in set(ex.named_configs) - before[1]:
        del ex.named_configs[name]
    for name in set(sys.modules) - before[2]:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_plugin_registers_all_kinds_of_things(write):
    write("my_pkg/__init__.py", "")
    write("my_pkg/probe.py", PROBE)
    config = resolve("task_probe", plugins=["my_pkg.probe"], probe_depth=7)
    assert (config["exp_name"], config["probe_depth"], config["loss_names"]["probe"]) == ("probe", 7, 1)
    settings = Settings.from_config(config)
    assert (settings.active, settings.plugins, settings.patch_size) == (("probe",), ("my_pkg.probe",), 8)
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(VLMoError, match="image_size=20: .*patch size 8"):
        Settings.from_config(config | {"image_size": 20})


def test_a_config_brings_its_plugins_to_another_process(write, tmp_path):
    write("probe.py", PROBE)
    config = resolve("task_probe", plugins=["probe"])
    (tmp_path / "settings.pickle").write_bytes(pickle.dumps(Settings.from_config(config)))
    program = f"""
        import pickle, sys
        sys.path.append({str(REPOSITORY)!r})
        from vlmo.settings import Settings
        settings = Settings.from_config({config!r})
        print(settings.probe_depth, settings == pickle.load(open("settings.pickle", "rb")))
    """
    done = child("-c", textwrap.dedent(program))
    assert done.stdout.split() == ["5", "True"], done.stderr


def test_the_command_line_imports_plugins_first(write, tmp_path):
    write("probe.py", PROBE)
    line = ["with", 'plugins=["probe"]', "task_probe", "probe_depth=9", "loss_names.probe=0.5"]
    done = child(str(REPOSITORY / "run.py"), "print_config", *line)
    assert done.returncode == 0, done.stderr
    printed = dict(each.split("#")[0].split(" = ", 1) for each in plain(done.stdout).splitlines() if " = " in each)
    printed = {name.strip(): value.strip() for name, value in printed.items()}
    assert (printed["probe_depth"], printed["probe"], printed["plugins"]) == ("9", "0.5", "['probe']")


def child(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def plain(text):
    """Without colours."""
    return "".join(part.split("m", 1)[-1] for part in text.split("\x1b["))


MISTAKES = {
    "missing": ("'absent.module'", ["plugins: absent.module: ", "no module absent"]),
    "missing in a package": ("'my_pkg.absent'", ["plugins: my_pkg.absent: ", "no module my_pkg.absent"]),
    "lacks a requirement": ("'needs'", ["plugins: needs: ", "No module named 'never_heard_of'"]),
    "broken": ("'broken'", ["plugins: broken: ", "ZeroDivisionError", "-d"]),
    "no Python": ("'no_python'", ["plugins: no_python: ", "SyntaxError"]),
    "a name that is taken": ("'taken'", ["plugins: taken: ", "'mlm'", "take another name"]),
}


@pytest.mark.parametrize("name, parts", MISTAKES.values(), ids=MISTAKES)
def test_a_plugin_that_fails_is_one_line(write, capsys, name, parts):
    write("my_pkg/__init__.py", "")
    write("needs.py", "import never_heard_of")
    write("broken.py", "1 / 0")
    write("no_python.py", "class :")
    write("taken.py", "from vlmo.registry import TASKS\n@TASKS.register('mlm')\nclass Mine:\n    pass")
    line = ["run.py", "with", f"plugins=[{name}]", "task_mlm_itm_itc_base"]
    assert run.command_line(line) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and all(part in said for part in parts), said
    with pytest.raises(VLMoError) as error:
        run.command_line([line[0], "-d", *line[1:]])
    assert error.value.__cause__ is not None
    with pytest.raises(VLMoError, match="plugins: "):
        Settings.from_config({"plugins": [name.strip("'")]})


def test_plugins_are_a_list():
    for value in ("probe", [3], [""]):
        with pytest.raises(VLMoError, match="plugins=.*give a list of modules"):
            resolve(plugins=value)


@pytest.fixture
def installed(write, monkeypatch):
    """Entry points of installed packages, by the modules that they name."""

    def entries(*modules):
        found = [importlib.metadata.EntryPoint(module, module, plugins.GROUP) for module in modules]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == plugins.GROUP else [])
        monkeypatch.syspath_prepend(os.getcwd())
        plugins.load_installed.cache_clear()

    yield entries
    plugins.load_installed.cache_clear()


def test_installed_plugins_need_not_be_named(write, installed):
    write("probe.py", PROBE)
    installed("probe")
    assert Settings.from_config(resolve("task_probe")).active == ("probe",)


def test_a_broken_installed_plugin(write, installed):
    write("broken.py", "1 / 0")
    installed("broken")
    for meet in (resolve, lambda: Settings.from_config({})):
        with pytest.raises(VLMoError, match="^plugin broken of .*ZeroDivisionError.*uninstall") as error:
            meet()
        assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_the_doctor_looks_at_plugins_too(write, capsys):
    from vlmo.doctor import resolve_leniently

    write("probe.py", PROBE)
    words = ["plugins=['probe']", "task_probe", "probe_dept=4"]
    config, problems = resolve_leniently(words)
    assert config["probe_depth"] == 5 and problems == ["probe_dept: there is no such option; did you mean probe_depth?"]
    config, problems = resolve_leniently(["plugins=['absent']", "seed=3"])
    assert config["seed"] == 3 and problems[0].startswith("plugins: absent: ")
