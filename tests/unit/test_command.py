"""`vlmo`: every command under one name, what a shell completes, and a package that works away from the checkout."""

import contextlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vlmo
from vlmo.__main__ import COMMANDS, main

REPOSITORY = Path(vlmo.__file__).parent.parent


def test_help_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"  {command} ") == 2 for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    try:
        assert main([command, "--help"]) == 0
    except SystemExit as end:  # (of argparse)
        assert end.code == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize("program", ["/usr/bin/vlmo", "/site-packages/vlmo/__main__.py"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_of_the_command_that_was_called(command, program, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, command, "--help"])
    with contextlib.suppress(SystemExit):
        main(sys.argv[1:])
    shown = capsys.readouterr().out
    assert f"vlmo {command}" in shown
    assert f"python -m {COMMANDS[command][0].removesuffix('.__main__')} " not in shown


def test_help_of_a_module_is_of_the_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/site-packages/vlmo/evaluate.py", "--help"])
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert capsys.readouterr().out.startswith("usage: python -m vlmo.evaluate ")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == vlmo.__version__


@pytest.mark.parametrize("words, told", [(["trian"], "train"), (["xyz"], "doctor"), (["completion", "fish"], "zsh")])
def test_mistakes(words, told, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert told in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


def test_train_is_run_py(capsys):
    assert main(["train", "with", "task_mlm_itm_itc_base", "batch_sze=3"]) == 2
    assert "batch_size" in capsys.readouterr().err
    assert main(["train", "print_config", "with", "task_mlm_itm_itc_base", "seed=7"]) == 0
    assert "seed = 7" in capsys.readouterr().out


@pytest.mark.parametrize("name, text", [("o.yaml", "seed: 9\nloss_names:\n  itc: 0.5\n"), ("o.json", '{"seed": 9}')])
def test_options_from_a_file(name, text, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    line = ["train", "print_config", "with", "task_mlm_itm_itc_base", str(tmp_path / name), "image_size=32"]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "seed = 9" in shown and "image_size = 32" in shown and "batch_size = 1024" in shown
    assert ("itc = 0.5" in shown) == (name == "o.yaml")


TYPED = [
    (["vlmo", "che"], "checkpoint"),
    (["vlmo", "train", "wi"], "with"),
    (["vlmo", "train", "with", "task_finetune_nlvr2_large_im"], "task_finetune_nlvr2_large_image384"),
    (["vlmo", "doctor", "with", "task_mim_base", "per_gpu_b"], "per_gpu_batchsize="),
]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize("typed, found", TYPED)
def test_zsh_completes(typed, found, tmp_path, capsys):
    """In a shell at a terminal of its own, with the words, a tab and a return typed into it."""
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    script = f"""
        zmodload zsh/zpty
        zpty shell 'TERM=dumb COLUMNS=200 zsh -f -i'
        zpty -w shell 'PS1=; cd {tmp_path}; autoload -Uz compinit && compinit -u -D && source completion; echo re""ady'
        zpty -r -m shell shown '*ready*'
        zpty -w shell 'vlmo() {{ print -r -- "$@" > typed; }}'
        zpty -w shell '{" ".join(typed)}'$'\\t'
        for i in {{1..100}}; do [[ -s {tmp_path}/typed ]] && break; sleep 0.05; done
        zpty -d shell
    """
    subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, timeout=60)
    assert (tmp_path / "typed").read_text().split() == [*typed[1:-1], found]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("typed, found", TYPED)
def test_bash_completes(typed, found, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = " ".join(f"'{word}'" for word in typed)
    script += f"\nCOMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _vlmo; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]


def test_a_wheel_works_away_from_the_checkout(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "vlmo", source / "vlmo", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True)
    (wheel,) = tmp_path.glob("vlmo-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    (scripts,) = site.glob("*.dist-info/entry_points.txt")
    assert "vlmo = vlmo.__main__:main" in scripts.read_text()

    def call(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert Path(call("-c", "import vlmo; print(vlmo.__file__)").strip()).is_relative_to(site)
    assert "seed = 7" in call("-m", "vlmo", "train", "print_config", "with", "task_mlm_itm_itc_base", "seed=7")
