"""The documentation's commands and Python blocks, run on small stand-ins: `make docs`.

Each page runs from top to bottom in a directory of its own, which holds what its commands take:
images in class folders, and weights in the official format. Trainings take two steps of a small
model. `SKIPPED` says what is not run, and why.
"""

import dataclasses
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from aim_jax.configs.defaults import vq_defaults
from aim_jax.data.imagenet import imagenet_classes
from aim_jax.models.aim import init_params
from aim_jax.weights.directories import save_model
from tests.conftest import ROOT, TINY_AIM
from tests.docs.snippets import PAGES, blocks, commands
from tests.programs import run

pytestmark = pytest.mark.docs

# What is not run: a pattern of the command, and the reason.
SKIPPED = {
    r"--page": "serves until it is stopped; tests/cli/test_page.py uses it",
    r"\b(cifar10|fashion_mnist):\w": "downloads a dataset; tests/test_wheel.py runs the programs",
    r"--config (cifar10|fashion_mnist)|(tokenizer|checkpoint) runs/(fashion|cifar)": "hours",
    r"--tokenizer cifar10 --out codes/cifar10": "downloads a dataset",
    r"--config (vq_f16|aim_l)\b|codes/imagenet": "needs ImageNet",
    r"--topology": "minutes, and another compiler; tests/perf compiles for devices",
    r"HOST0|launch/|kubectl|docker|sbatch|scancel|mpirun|tail -f|git archive": "needs a cluster",
    r"benchmarks/": "minutes; tests/benchmarks runs them on small settings",
    r"--repository|hf |curl |tfds |^git |pip install|\.venv/bin/|^source|^export": "the network",
    r"^make |tensorboard|parity.py": "targets of the Makefile, or tests by themselves",
    r"\b(FILE|DIR)\b|vgg\.pth|\.pt\b": "needs files from the network",
    r"runs/aim_b,|models/cifar10|runs/decoder|--evaluation": "needs runs of hours",
    r"boot\.png": "images of a dataset from the network",
    r"hf://": "the network; tests/weights/test_hub.py has a stand-in of the hub",
    r"--image_size": "as large as for ImageNet; tests/data/test_token_cache.py is smaller",
    r"eval_imagenet": "50,000 images of 256 x 256",
}
# Appended to the commands of a program, so that they take seconds.
SMALL_RUN = ["--config.steps=2", "--config.batch_size=8", "--config.optimizer.warmup_steps=1"] + [
    f"--config.{event}_every=2" for event in ("log", "eval", "save", "sample")
]
SMALL = {
    "train_vq": [*SMALL_RUN, "--config.model.ch=32", "--config.model.num_res_blocks=1"],
    "train": [*SMALL_RUN, "--config.model.n_layer=1"],
    "train-folder": ["--budget_minutes=0.001", "--per_class=1"],
    "sample": ["--batch_size=8"],
}
RUN = [
    page
    for page in PAGES
    if any(not re.search("|".join(SKIPPED), " ".join(c.words)) for c in commands(page))
]


@pytest.fixture(scope="module")
def imagenet_model(tiny_model, tmp_path_factory):
    """A tiny model of ImageNet's classes, and its weights in the official format."""
    root = tmp_path_factory.mktemp("imagenet")
    config = dataclasses.replace(TINY_AIM, num_classes=1000)
    model = dataclasses.replace(
        tiny_model,
        aim_config=config,
        aim_params=nn.unbox(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))),
        class_names=imagenet_classes(),
        info={"data": vq_defaults().data.to_dict() | {"image_size": 4, "channels": 1}},
    )
    save_model(root / "model", model)
    done = run("convert", "to-torch", "--checkpoint", root / "model", "--out", root / "official")
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def directory(tmp_path, monkeypatch, picture_folder, imagenet_model):
    """What a page's commands find where they are run."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(24):
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image.save(folder / f"{i}.png")
    for split in ("train", "validation"):
        folder = tmp_path / "captioned" / split
        folder.mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image.save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"image number {i}")
    for name in ("aim-base", "aim-large"):
        shutil.copytree(imagenet_model / "official", tmp_path / name)
    for name in ("aim_b", "fine_tuned"):
        target = tmp_path / ("models" if name == "aim_b" else "runs") / name
        shutil.copytree(imagenet_model / "model", target)
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, directory):
    for command in commands(page):
        text = " ".join(command.words)
        if any(re.search(pattern, text) for pattern in SKIPPED):
            continue
        program, *arguments = command.words
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True, cwd=directory)
            continue
        assert program == "aim-jax", f"{command}: neither run nor in SKIPPED"
        if any(argument.startswith("aim_finetune") for argument in arguments):
            continue  # tests/training/test_aim.py starts from converted weights
        small = SMALL.get(arguments[0], []) if arguments else []
        done = run(*arguments, *small)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_reason_to_skip_is_needed():
    texts = [" ".join(command.words) for page in PAGES for command in commands(page)]
    for pattern in SKIPPED:
        assert any(re.search(pattern, text) for text in texts), pattern


# ------------------------------------------------------------------------------- Python


def execute(page, source, names=None):
    """Run a block in a module of its own."""
    module = types.ModuleType("snippet")
    module.__dict__.update(names or {})
    exec(compile(source, str(page), "exec"), module.__dict__)
    return module.__dict__


# Blocks that have a test of their own, with stand-ins for what they import.
ELSEWHERE = {
    "docs/training.md": "tests/training/test_loop.py",
    "docs/export.md": "tests/sampling/test_export.py runs the exported parts",
    "docs/gallery.md": "reads a dataset from the network",
    "docs/own_images.md": "test_digits_become_class_folders",
}


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, "python") and str(p.relative_to(ROOT)) not in ELSEWHERE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_python_of_a_page_runs(page, directory):
    execute(page, "\n".join(blocks(page, "python")))


def test_digits_become_class_folders(tmp_path, monkeypatch):
    digits = types.SimpleNamespace(images=np.full((3, 8, 8), 16.0), target=np.array([0, 7, 7]))
    datasets = types.ModuleType("sklearn.datasets")
    datasets.load_digits = lambda: digits
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "own_images.md"
    execute(page, "\n".join(blocks(page, "python")))
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert len(written) == 3 and [path.parent.name for path in written] == ["0", "7", "7"]
    assert np.asarray(Image.open(tmp_path / written[0])).max() == 255
