"""The notebook, run from top to bottom with small settings."""

import base64
import io
import sys

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

from tests.compilation import xla_flags
from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "aim_jax.ipynb"


def pictures(cell) -> list[np.ndarray]:
    """The pictures among a cell's outputs."""
    found = []
    for output in cell.outputs:
        data = output.get("data", {}).get("image/png")
        if data:
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")))
    return found


def test_notebook_runs_and_shows_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("AIM_JAX_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # As the other tests compile, but for one device.
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    # The kernel of this interpreter, whatever kernels are installed.
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.create_kernel_manager()
    client.km.kernel_spec.argv[0] = sys.executable
    client.execute()

    shown = [
        picture for cell in notebook.cells if cell.cell_type == "code" for picture in pictures(cell)
    ]
    assert len(shown) == 4  # two grids, the curves, the toy's grid
    assert all(picture.std() > 10 and min(picture.shape[:2]) > 50 for picture in shown)
    text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    assert "No weights given" in text and "114 colour pictures of 3 classes" in text
    assert (tmp_path / "runs" / "aim" / "model" / "model.json").is_file()
