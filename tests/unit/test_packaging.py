"""What `pip install` sees."""

import importlib
import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

import vlmo

REPOSITORY = Path(vlmo.__file__).parent.parent


@pytest.fixture(scope="module")
def arguments():
    """Of the call of setup()."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
        patch.chdir(REPOSITORY)
        runpy.run_path(str(REPOSITORY / "setup.py"))
    return given


def test_requirements_are_those_of_the_file(arguments):
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    wanted = [re.sub(r"\s*#.*", "", line) for line in lines]
    assert arguments["install_requires"] == [line for line in wanted if line]


def test_requirements_can_be_read_and_come_once(arguments):
    names = [Requirement(line).name.lower() for line in arguments["install_requires"]]
    assert len(set(names)) == len(names) > 10
    assert {"torch", "pytorch-lightning", "sacred", "timm", "transformers", "pyarrow", "einops", "pillow"} <= set(names)
    assert all(Requirement(line).specifier for line in arguments["install_requires"])


def test_every_folder_of_the_package_is_packed(arguments):
    folders = {path.parent for path in Path(vlmo.__file__).parent.rglob("*.py")}
    assert {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders} == set(arguments["packages"])


def test_version_and_python(arguments):
    assert arguments["version"] == vlmo.__version__
    assert arguments["python_requires"] == ">=3.10"


def test_the_command_is_there(arguments):
    (command,) = arguments["entry_points"]["console_scripts"]
    name, _, target = command.partition(" = ")
    module, function = target.split(":")
    assert name == "vlmo" and callable(getattr(importlib.import_module(module), function))
