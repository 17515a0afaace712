"""The notebooks run from top to bottom, and what is committed of them is small and clean.

They are committed with their outputs, so that the plots are seen where a notebook is only looked at; the outputs are written by
this file, never by hand:

    LOLA_UPDATE_NOTEBOOKS=1 pytest tests/test_notebooks.py

Proved here: each runs without an error (its own assertions included); committed outputs hold no error, no warning, no path
of a machine and no more bytes than they should.
"""

import os
import pathlib
import re

import lola
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 250_000                        # bytes of one notebook, outputs included


def cleaned(notebook):
    """What is committed: no counts, no times, no versions; streams joined."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.metadata = {}
        cell.id = f"cell-{i:02d}"
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                if "data" in output and "image/png" in output.data:
                    output.data = {"image/png": output.data["image/png"].strip() + "\n"}
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    # The kernel shall import the lola that is tested, from a folder in which nothing of the checkout lies.
    here = str(pathlib.Path(lola.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    if os.environ.get("LOLA_UPDATE_NOTEBOOKS") == "1":
        nbformat.write(cleaned(notebook), path)
    check_outputs(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_clean(path):
    assert path.stat().st_size <= LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert all(cell.get("execution_count") is None for cell in notebook.cells)
    figures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert figures, "committed without outputs: run with LOLA_UPDATE_NOTEBOOKS=1"


def check_outputs(notebook):
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"(?<![\w.:/])/(?:[\w.-]+/)+|\b[A-Z]:\\", text), text


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 3
