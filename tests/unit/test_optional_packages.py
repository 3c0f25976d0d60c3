"""The core imports, and its tests run, where none of the extras is installed; what needs one says which, in a line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = [
    *("fastapi", "starlette", "uvicorn", "httpx", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf"),
    *("gradio", "peft", "hf_xet", "moto", "boto3", "s3fs", "aiohttp", "eccv_caption", "simplejpeg"),
    *("ray", "wandb", "mlflow", "comet_ml", "trackio", "deepspeed", "fairscale"),
]
# (as the import system has it of a package that is not there: `import` and `find_spec` both find nothing)
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"

COMMANDS = """
import contextlib, io
from vlmo import VLMoModel, Predictor, __main__
from vlmo.checkpoints import hub
for words, extra in (
    (["export", "last.ckpt", "out", "--format", "onnx"], "vlmo[export]"),
    (["export", "last.ckpt", "out", "--format", "openvino", "--int8"], "vlmo[export]"),
    (["serve", "last.ckpt"], "vlmo[serve]"),
    (["app", "--checkpoint", "last.ckpt"], "vlmo[app]"),
):
    sys.argv = ["vlmo", *words]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = __main__.main()
        except SystemExit as ended:
            status = ended.code
    lines = said.getvalue().splitlines()
    assert status == 2 and len(lines) == 1 and extra in lines[0], (words, status, lines)
"""
TESTS = ("export", "test_serve.py", "checkpoints", "test_inference.py", "modules", "test_settings.py")


def without_extras(program, seconds):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT + program]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def test_commands_name_the_extra_that_they_need():
    without_extras(COMMANDS, 120)


@pytest.mark.slow
def test_tests_run_without_extras():
    paths = [f"tests/unit/{path}" for path in TESTS]
    printed = without_extras(f"import pytest; sys.exit(pytest.main([*{paths}, '-q', '-p', 'no:cacheprovider']))", 900)
    assert "passed" in printed and "skipped" in printed
