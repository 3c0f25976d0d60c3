"""The notebooks, executed from top to bottom; in the repository they have no outputs."""

import os

import pytest

from tests.code_blocks import REPOSITORY

pytestmark = pytest.mark.slow
NOTEBOOKS = sorted((REPOSITORY / "examples/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell["outputs"] for cell in notebook.cells if cell.cell_type == "code"), "strip the outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any(cell.get("outputs") for cell in notebook.cells)
