"""The wheel and the sdist, each alone: built, installed in a fresh environment, and used.

`make wheel-test` runs this; it needs a package index. Every program of the wheel does its work on
tiny settings, outside the checkout. The last tests put the unpacked sdist, as an editable install,
in the place of the wheel.
"""

import configparser
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import aim_jax
from aim_jax.cli import PROGRAMS
from aim_jax.cli.common import recipes
from tests.compilation import xla_flags
from tests.conftest import ROOT
from tests.inception_weights import save_seeded_inception

pytestmark = pytest.mark.wheel

# Two steps of the smallest batch, of models as small as the recipes allow.
SHORT = ("--config.steps=2", "--config.batch_size=4", "--config.optimizer.warmup_steps=0")
SMALL = ("--config.model.n_layer=2", "--config.model.d_model=64", "--config.model.d_state=16")
RECIPE = """
from aim_jax.configs.folder import get_config as folder_config


def get_config():
    config = folder_config("images")
    config.tokenizer = "runs/vq"
    config.codes = "codes"
    return config
"""
# What the tests need to be collected, beside the package and the extras `eval` and `export`.
COLLECTION = ("hypothesis", "ipykernel", "nbclient", "pytest")


def check(command, **options) -> subprocess.CompletedProcess:
    """Runs a command that has to succeed; its output is text."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def clean_environment() -> dict[str, str]:
    """The environment without what lets a process see this checkout or these tests' settings."""
    dropped = ("AIM_JAX", "COVERAGE", "JAX_", "PYTEST", "PYTHON", "VIRTUAL_ENV", "XLA_FLAGS")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


class Installation(NamedTuple):
    """A fresh environment with the package, and an empty directory to use it in.

    Attributes:
      python: its interpreter.
      work: outside the checkout, the working directory of all programs.
      environment: of the programs.
    """

    python: Path
    work: Path
    environment: dict[str, str]

    def aim_jax(self, *arguments) -> subprocess.CompletedProcess:
        """Runs the console script, whatever its end."""
        command = [str(self.python.with_name("aim-jax")), *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.work, env=self.environment, capture_output=True, text=True
        )

    def succeed(self, *arguments) -> str:
        """What a program that has to succeed prints."""
        done = self.aim_jax(*arguments)
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def fail(self, *arguments) -> str:
        """The one line with which a program that has to fail does so."""
        done = self.aim_jax(*arguments)
        assert done.returncode == 1 and not done.stdout, done
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.stderr
        return line

    def run_python(self, *arguments, cwd: Path | None = None) -> str:
        """What the interpreter prints."""
        command = [self.python, *arguments]
        return check(command, cwd=cwd or self.work, env=self.environment).stdout

    def pip(self, *arguments) -> None:
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints = ["--constraint", ROOT / "constraints.txt"]
        check([*pip, *constraints, *arguments], env=clean_environment())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, unpacked, and the wheel, which is built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", out, ROOT]
    check(command, env=clean_environment(), cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    return out / sdist.name.removesuffix(".tar.gz"), wheel


@pytest.fixture(scope="module")
def installation(distributions, tmp_path_factory) -> Installation:
    """The wheel with the extras `eval` and `export`, images and weights to work on."""
    _, wheel = distributions
    venv, work = tmp_path_factory.mktemp("installed") / "venv", tmp_path_factory.mktemp("work")
    check([sys.executable, "-m", "venv", venv], env=clean_environment())
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 2)):
        for shade, name in enumerate(("boat", "old tree")):
            folder = work / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (16, 16)) + 90 * shade
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (work / "mine.py").write_text(RECIPE)
    save_seeded_inception(work)
    cache = tmp_path_factory.mktemp("cache")
    environment = clean_environment() | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(cache),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody answers
        "XLA_FLAGS": xla_flags(1),
    }
    made = Installation(venv / "bin" / "python", work, environment)
    made.pip(f"{wheel}[eval,export]")
    return made


@pytest.fixture(scope="module")
def tokenizer(installation) -> str:
    """The workdir of a tokenizer trained on the images."""
    installation.succeed("train_vq", "--config", "folder_vq:images", "--workdir", "runs/vq", *SHORT)
    return "runs/vq"


@pytest.fixture(scope="module")
def codes(installation, tokenizer) -> str:
    """Token caches of the images."""
    given = ["--tokenizer", tokenizer, "--out", "codes", "--data", "images"]
    installation.succeed("extract_codes", *given, "--views", "centre")
    return "codes"


@pytest.fixture(scope="module")
def model(installation, codes) -> str:
    """The workdir of a model, trained with a recipe that a user has written."""
    given = ["--config", "mine.py", "--workdir", "runs/aim", *SHORT, *SMALL]
    installation.succeed("train", *given)
    return "runs/aim"


# What is inside


def files_below(root: Path) -> set[str]:
    """Files below a directory, without what Python, setuptools and the system add."""
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {name for name in names if "__pycache__" not in name}


def test_sdist_is_the_checkout(distributions):
    sdist, _ = distributions
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = set(check(["git", "-C", ROOT, "ls-files"]).stdout.splitlines())
    tracked = {name for name in tracked if (ROOT / name).exists()}
    assert tracked <= files_below(sdist)
    assert not [name for name in files_below(sdist) if name.startswith((".venv", "runs/"))]


def test_wheel_has_every_file_of_the_package(distributions):
    sdist, wheel = distributions
    expected = {f"aim_jax/{name}" for name in files_below(sdist / "aim_jax")}
    expected |= {f"aim_jax/configs/{name}" for name in files_below(sdist / "configs")}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


def test_metadata_stands_alone(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "aim-jax = aim_jax.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("aim_jax", aim_jax.__version__)
    assert metadata["Author"] and metadata["Summary"] and metadata["Keywords"]
    assert metadata["License-Expression"] == "Apache-2.0"
    for address in metadata.get_all("Project-URL"):
        assert re.fullmatch(r"[\w ]+, https://\S+", address)
    description = metadata.get_payload()
    assert description.strip() == (ROOT / "docs" / "package.md").read_text().strip()
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links and all(link.startswith("https://") for link in links)


# The programs of the wheel


def test_the_package_comes_from_the_wheel(installation):
    program = "import aim_jax, aim_jax.configs as c; print(aim_jax.__file__); print(c.__file__)"
    for path in installation.run_python("-c", program).splitlines():
        assert Path(path).is_relative_to(installation.python.parents[1] / "lib")


def test_programs_and_recipes_are_listed(installation):
    shown = installation.succeed()
    assert all(f"  {name} " in shown for name in PROGRAMS)
    assert installation.succeed("--version") == f"aim_jax {aim_jax.__version__}\n"
    assert installation.run_python("-m", "aim_jax") == shown
    line = installation.fail("train", "--config", "fashion", "--workdir", "runs/none")
    assert line.endswith(f"one of {', '.join(recipes())}.")


def test_every_program_is_run_here():
    source = Path(__file__).read_text()
    assert [name for name in PROGRAMS if not re.search(rf'\(\s*"{name}"', source)] == []


def test_demo_samples_the_bundled_models(installation):
    shown = installation.succeed("demo", "--per_class", 1)
    assert "\n  aim-jax sample --checkpoint cifar10" in shown
    for name in ("cifar10/grid.png", "fashion_mnist/grid.png", "samples.png"):
        assert Image.open(installation.work / "demo" / name).width > 100
    assert "pip install 'aim_jax[page]'" in installation.fail("demo", "--page")


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
def test_sample_with_the_kernels_of_the_wheel(installation):
    given = ["--checkpoint", "cifar10", "--classes", "cat", "--per_class", 1, "--pngs"]
    shown = installation.succeed("sample", *given, "--implementation", "native")
    assert shown.splitlines() == ["samples/grid.png", "samples/images/00000_cat.png"]


def test_describe_a_bundled_model(installation):
    shown = installation.succeed("describe", "--checkpoint", "cifar10")
    assert "10 classes" in " ".join(shown.split())


def test_train_tokenizer_codes_and_model(installation, model):
    runs = installation.work / "runs"
    assert (runs / "vq" / "model" / "model.json").is_file()
    assert (installation.work / "codes" / "validation").is_dir()
    lines = (runs / "aim" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in lines) == 2
    given = ["--checkpoint", model, "--per_class", 2, "--out", "mine"]
    assert installation.succeed("sample", *given) == "mine/grid.png\n"


def test_train_folder(installation):
    given = ["--out", "runs/folder", "--budget_minutes", "0.001", "--per_class", 1]
    assert (
        installation.succeed("train_folder", "images", *given) == "runs/folder/samples/grid.png\n"
    )


def test_text_tokenizer_of_captioned_images(installation):
    folder = installation.work / "captioned"
    folder.mkdir()
    for i in range(3):
        Image.new("L", (16, 16), 80 * i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"grey number {i}")
    given = ["--data", "captioned", "--out", "runs/text_tokenizer.json"]
    installation.succeed("train_text_tokenizer", *given)
    assert (installation.work / "runs" / "text_tokenizer.json").is_file()


def test_train_a_shipped_recipe(installation):
    data = ["--config.data.name=folder", "--config.data.dir=images", "--config.codes="]
    given = ["--config", "fashion_mnist", "--workdir", "runs/fashion_mnist", *SHORT]
    small = ["--config.model.n_layer=2", "--config.model.num_classes=2"]
    installation.succeed("train", *given, *data, *small, "--config.tokenizer=fashion_mnist")
    model = installation.work / "runs" / "fashion_mnist" / "model" / "model.json"
    assert json.loads(model.read_text())["class_names"] == ["boat", "old tree"]


def test_complete_and_compare(installation, model):
    image = installation.work / "images" / "validation" / "boat" / "0.png"
    given = ["--checkpoint", model, "--classes", "boat"]
    shown = installation.succeed("complete", *given, "--images", image, "--count", 1)
    assert shown == "completions.png\n"
    shown = installation.succeed("compare", *given, "--cfg_scale", "1,2")
    assert shown == "comparison.png\n"
    for name in ("completions.png", "comparison.png"):
        assert Image.open(installation.work / name).width > 100


def test_evaluate_sweep_and_publish(installation, model):
    given = ["--checkpoint", model, "--reference", "images/train"]
    line = installation.fail("evaluate", *given)
    assert "--inception is missing" in line and "docs/" not in line
    given += ["--inception", "random.safetensors", "--config.batch_size=10"]
    shown = installation.succeed("evaluate", *given, "--config.num_samples=6")
    assert "| fid | " in shown and "| commit | unknown |" in shown
    installation.succeed("sweep", *given, "--num_samples", 10, "--cfg_scale", 2)
    assert Image.open(installation.work / "sweep" / "sweep.png").width > 100
    given = ["--checkpoint", model, "--evaluation", "evaluation"]
    installation.succeed("publish", *given, "--out", "published")
    assert "| fid | " in (installation.work / "published" / "README.md").read_text()
    given += ["--out", "uploaded", "--repository", "owner/name"]
    # The library of the hub comes with tokenizers, which depends on it; no hub answers here.
    assert "hf://owner/name: " in installation.fail("publish", *given)


def test_scaling(installation, model):
    line = installation.fail("scaling", "--runs", f"{model},runs/none")
    assert "runs/none: not a workdir of aim-jax train" in line
    line = installation.fail("scaling", "--runs", model)
    assert "at least two runs of different size" in line


def test_convert_official_weights_and_back(installation):
    golden = ROOT / "tests" / "golden"
    weights = ["--weights", golden / "aim_tiny_group", "--vq", golden / "vq_tiny"]
    installation.succeed("convert", "to-jax", *weights, "--out", "converted")
    installation.succeed("convert", "to-torch", "--checkpoint", "converted", "--out", "back")
    assert (installation.work / "back" / "model.safetensors").is_file()


def test_export_samples_without_the_library(installation, model):
    installation.succeed("export", "--checkpoint", model, "--out", "exported")
    given = ["--labels", "0,1", "--out", "exported.png"]
    assert "aim_jax" not in (installation.work / "exported" / "sample.py").read_text()
    assert installation.run_python("exported/sample.py", *given) == "exported.png\n"


@pytest.mark.parametrize(
    ("topology", "advice"),
    [("v5e:2x2", "pip install 'aim_jax[tpu]'"), ("8xH100", "jax-cuda13-plugin")],
)
def test_compile_names_the_compiler_that_is_missing(topology, advice, installation):
    line = installation.fail("compile", "--config", "aim_b", "--topology", topology)
    assert advice in line


# The sdist alone, in the place of the wheel


@pytest.fixture(scope="module")
def editable(installation, distributions) -> Installation:
    """The environment with the unpacked sdist, editable, in the place of the wheel."""
    sdist, _ = distributions
    installation.pip("--editable", sdist, *COLLECTION)
    return installation


def test_an_editable_install_finds_its_recipes(editable, distributions):
    sdist, _ = distributions
    program = "import aim_jax, aim_jax.configs as c; print(aim_jax.__file__); print(c.__file__)"
    expected = [str(sdist / "aim_jax" / "__init__.py"), str(sdist / "configs" / "__init__.py")]
    for directory in (editable.work, sdist, sdist / "docs"):
        assert editable.run_python("-c", program, cwd=directory).splitlines() == expected
    line = editable.fail("train_vq", "--config", "cifar10", "--workdir", "runs/none")
    assert "run it with aim-jax train" in line


def test_the_sdist_holds_its_tests(editable, distributions):
    sdist, _ = distributions
    shown = editable.run_python("-m", "pytest", "--collect-only", "--quiet", cwd=sdist)
    parser = configparser.ConfigParser()
    parser.read(sdist / "setup.cfg")
    assert parser["tool:pytest"]["testpaths"] == "tests"
    modules = {str(path.relative_to(sdist)) for path in (sdist / "tests").rglob("test_*.py")}
    collected = {line.partition("::")[0] for line in shown.splitlines() if "::" in line}
    assert len(collected) > 20 and collected <= modules
