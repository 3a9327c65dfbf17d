"""The notebook runs as it stands, on the real model, in a Jupyter kernel of this interpreter."""

import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments/notebooks/quickstart.ipynb"
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=400, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def test_quickstart_shows_texts_speeds_and_a_plot(smollm2, tmp_path):
    executed = tmp_path / "executed.ipynb"
    subprocess.run([sys.executable, "-c", EXECUTE, NOTEBOOK, executed], cwd=ROOT, check=True, timeout=500)
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert ">>> Name three rivers in Europe." in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)


def test_the_notebook_is_stored_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
