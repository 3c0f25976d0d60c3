"""The command line of the converters."""

import inspect
import subprocess
import sys

import pytest

from tests.unit.utils.raw import write_karpathy
from vlmo.utils import convert


@pytest.mark.parametrize("name", [*convert.SETS, *convert.ALIASES.values()])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main([name, "--help"])
    assert stopped.value.code == 0
    assert "ROOT" in capsys.readouterr().out


@pytest.mark.parametrize("module", convert.SETS.values())
def test_every_converter_has_the_two_fixed_arguments(module):
    parameters = list(inspect.signature(module.make_arrow).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["root", "dataset_root"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[2:])


def test_success(tmp_path, capsys):
    write_karpathy(tmp_path / "raw", 3)
    assert convert.main(["own_karpathy", str(tmp_path / "raw"), str(tmp_path / "out"), "--name", "mine"]) == 0
    assert "mine_caption_karpathy_train.arrow" in capsys.readouterr().out


def test_mistakes_end_with_2_and_one_message(tmp_path):
    command = [sys.executable, "-m", "vlmo.utils.convert", "coco", str(tmp_path), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: missing in ") and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["cocoa", "a", "b"], ["coco", "a"], ["coco", "a", "b", "--seed", "1"], ["vqa", "a", "b", "--seed", "x"]],
)
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_wrong_number_of_workers(tmp_path, capsys):
    write_karpathy(tmp_path / "raw", 3)
    assert convert.main(["own_karpathy", str(tmp_path / "raw"), str(tmp_path), "--num-workers", "-1"]) == 2
    assert "num_workers=-1" in capsys.readouterr().err


def test_converters_do_not_load_torch():
    """It would take each of their processes 200 MB and seconds to start."""
    code = "import sys, vlmo.utils.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
