"""The notebooks, run from top to bottom with small settings: `make docs`."""

import base64
import io
import shutil
import sys

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.compilation import xla_flags
from tests.conftest import ROOT

pytestmark = pytest.mark.docs
NOTEBOOKS = ROOT / "notebooks"


def outputs(notebook) -> tuple[list[np.ndarray], str]:
    """The images and the text among the outputs of all cells."""
    images, text = [], ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text += output.get("text", "")
            if data := output.get("data", {}).get("image/png"):
                images.append(
                    np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
                )
    return images, text


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook, with the parameters of its cells replaced."""
    monkeypatch.setenv("AIM_JAX_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # As the other tests compile, but for one device.
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    # The kernel of this interpreter, whatever kernels are installed.
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")

    def run(name, **parameters):
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
        for parameter, value in parameters.items():
            (cell,) = (c for c in notebook.cells if f'{parameter} = ""' in c.source)
            cell.source = cell.source.replace(f'{parameter} = ""', f"{parameter} = {value!r}")
        where = {"metadata": {"path": str(tmp_path)}}
        client = NotebookClient(notebook, timeout=600, resources=where)
        client.create_kernel_manager()
        client.km.kernel_spec.argv[0] = sys.executable
        client.execute()
        images, text = outputs(notebook)
        assert all(image.std() > 10 and min(image.shape[:2]) > 50 for image in images)
        return images, text

    return run


def test_samples_are_shown(execute):
    images, text = execute("aim_jax.ipynb")
    assert len(images) == 2 and "No weights given" in text


def test_a_model_is_trained_on_images_of_a_zip_file(execute, picture_folder, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "mine"), "zip", picture_folder)
    images, text = execute("your_images.ipynb", IMAGES=archive)
    assert len(images) == 2  # the curves and the samples
    assert "48 grey images of 3 classes" in text
    assert (tmp_path / "runs" / "aim" / "model" / "model.json").is_file()


def test_shapes_take_the_place_of_images(tmp_path, monkeypatch):
    """The cell that makes them, alone."""
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(NOTEBOOKS / "your_images.ipynb", as_version=4)
    (cell,) = (c for c in notebook.cells if "circle" in c.source and c.cell_type == "code")
    imports = "import pathlib, shutil\nimport numpy as np\nfrom PIL import Image, ImageDraw\n"
    names = {"IMAGES": "", "QUICK": True}
    exec(imports + cell.source, names)
    assert names["IMAGES"] == "shapes"
    files = list((tmp_path / "shapes").rglob("*.png"))
    assert len(files) == 120 and {file.parent.name for file in files} == {
        "circle", "square", "triangle",
    }  # fmt: skip
    assert min(np.asarray(Image.open(file)).std() for file in files) > 10
