"""The programs as a user meets them, and the images and texts they share."""

import dataclasses
import importlib.util
import logging as std_logging
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from PIL import Image

from aim_jax.cli import PROGRAMS
from aim_jax.cli.common import errors_in_one_line, recipes
from aim_jax.configs.defaults import aim_defaults, eval_defaults, vq_defaults
from aim_jax.evaluation.evaluate import sampling_settings
from aim_jax.models import AiMConfig
from aim_jax.models.config import VQConfig
from aim_jax.sampling.config import FIELDS
from aim_jax.sampling.generate import generate
from aim_jax.sampling.grids import (
    compare_settings,
    complete,
    fitted,
    interpolate,
    sample_to_directory,
    with_mixed_classes,
)
from aim_jax.training.monitor import AHEAD, MetricsWriter, StepLog
from aim_jax.utils.images import image_path, make_grid, save_png
from aim_jax.utils.logging import duration
from aim_jax.weights.directories import save_model
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import class_ids
from tests.conftest import ROOT
from tests.programs import run

FILES = [ROOT / "launch" / "jobset.py", *sorted((ROOT / "benchmarks").glob("*.py"))]
SCRIPTS = [path for path in FILES if "__main__" in path.read_text()]
CONFIGS = list(recipes().values())


def process(*command):
    """Runs Python as a process of its own, as a user does."""
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_shows_an_example(script):
    docstring = script.read_text().split('"""')[1]
    assert "Example" in docstring and f"python {script.relative_to(ROOT)} " in docstring


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_shows_an_example(name):
    docstring = (ROOT / "aim_jax" / "cli" / f"{name}.py").read_text().split('"""')[1]
    assert "Example" in docstring
    assert re.search(rf"aim-jax {name.replace('_', '[_-]')} ", docstring)


def test_every_program_is_listed():
    files = {path.stem for path in (ROOT / "aim_jax" / "cli").glob("*.py")}
    helpers = {"__init__", "common", "folder", "page", "page_actions", "page_requests"}
    assert files - helpers == set(PROGRAMS)


def test_benchmarks_find_each_other():
    """The installed package does not bring them; the directory of the program is all there is."""
    for script in (path for path in SCRIPTS if path.parent.name == "benchmarks"):
        head, imports, _ = script.read_text().partition("from benchmarks")
        assert not imports or "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))" in head


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds_its_model(config, picture_folder):
    from aim_jax.data.preprocessing import image_spec
    from aim_jax.models import AiMConfig, VQConfig
    from aim_jax.training.optimizer import learning_rate

    spec = importlib.util.spec_from_file_location(config.stem, config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    needed = [str(picture_folder)] if config.stem.startswith("folder") else []
    variants = (*getattr(module, "MODEL", ()), *getattr(module, "PARTS", ()))
    for arguments in (needed, *([variant] for variant in variants)):
        built = module.get_config(*arguments)
        if built.stage == "eval":
            assert set(built.sample) <= set(FIELDS)
            continue
        {"aim": AiMConfig, "vq": VQConfig}[built.stage](**built.model)
        learning_rate(built.optimizer, built.steps)
        image_spec(built.data)
    if variants:
        assert all(variant in module.__doc__ for variant in variants)
        with pytest.raises(ValueError, match="expected one of"):
            module.get_config("none")
    where = "--checkpoint" if built.stage == "eval" else r"--workdir runs/\w+"
    command = rf"--config {config.stem}(:\w+)? {where}"
    assert re.search(command, module.__doc__)


def test_programs_warn_but_not_for_orbax(caplog):
    with errors_in_one_line():
        logging.warning("no compiler was found")
        handler = logging.get_absl_handler()
        record = std_logging.LogRecord("absl", 40, "/x/orbax/a.py", 1, "noise", (), None)
        assert not handler.filter(record)
    assert "no compiler was found" in caplog.text


def test_help_and_one_line_errors(tmp_path):
    shown = run("sample", "--help")
    assert shown.returncode == 0
    assert "aim-jax sample --checkpoint" in shown.stdout and "--cfg_scale" in shown.stdout
    assert "--coordinator" in run("train", "--help").stdout
    wrong = process("-m", "aim_jax", "sample", "--checkpoint", tmp_path, "--out", tmp_path / "out")
    assert wrong.returncode == 1 and not (tmp_path / "out").exists()
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: no model")
    assert "Traceback" not in wrong.stderr
    wrong = run("train", "--config", "cifar10_vq", "--workdir", tmp_path / "w")
    assert wrong.returncode == 1 and "run it with aim-jax train_vq" in wrong.stderr
    given = ("--config", "cifar10_vq", "--workdir", tmp_path / "w", "--config.stepps=4")
    wrong = run("train_vq", *given)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert 'error: unknown setting of --config: stepps. Did you mean "steps"' in wrong.stderr
    wrong = run("compare", "--cfg_scale", "1,2", "--between", "cat,dog")
    assert wrong.returncode == 1 and "got cfg_scale, between" in wrong.stderr
    wrong = run("sample", "--classes", "cat", "ship")
    assert wrong.returncode == 1 and "error: unexpected 'ship'; separate lists with" in wrong.stderr
    wrong = run("train", "--config", "aim_ablation:foo", "--workdir", "w")
    assert wrong.stderr.strip().startswith(
        "error: unknown variant 'foo'; expected one of no_position"
    )
    wrong = run("compare", "--top_k", "10,2.5")
    assert wrong.returncode == 1 and "--top_k=10,2.5: expected integers" in wrong.stderr
    assert not (tmp_path / "w").exists()


FILES_OF_CONFIGS = {
    "syntax": ("def get_config(:", r"line 1: SyntaxError: "),
    "import": ("import not_installed", r"line 1: ModuleNotFoundError: No module named 'not_inst"),
    "name": (None, r"line 4: NameError: name 'stepz' is not defined", "config.steps = stepz"),
    "field": (
        None,
        r"line 4: AttributeError: optimiser\. Did you mean",
        "config.optimiser.lr = 1.0",
    ),
    "key": (None, r"line 4: KeyError: 'a'", "{}['a']"),
    "type": (None, r"line 4: TypeError: .*int", "config.steps = 'many'"),
    "file": (None, r"No such file or directory: '/nowhere/names' \(in ", "open('/nowhere/names')"),
    "value": (None, r"only on Sundays \(in ", "raise ValueError('only on Sundays')"),
    "missing": (None, r"save_minutes missing; start from aim_defaults", "del config.save_minutes"),
    "stage": (None, r"no configuration with a stage out of aim, vq, eval", "config.stage = 'x'"),
    "none": ("def get_config():\n    pass", r"get_config\(\) returns None"),
    "function": ("x = 1", r"defines no get_config\(\)"),
    "argument": (
        "def get_config(size):\n    pass",
        r"TypeError: get_config\(\) missing 1 required",
    ),
}


@pytest.mark.parametrize("kind", FILES_OF_CONFIGS)
def test_an_error_of_a_configuration_names_the_file_and_the_cause(kind, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # that of another file
    text, message, *line = FILES_OF_CONFIGS[kind]
    if text is None:
        text = (
            "from aim_jax.configs.defaults import aim_defaults\n"
            f"def get_config():\n    config = aim_defaults()\n    {line[0]}\n    return config\n"
        )
    file = tmp_path / "mine.py"
    file.write_text(text)
    wrong = run("train", "--config", file, "--workdir", tmp_path / "w")
    (said,) = wrong.stderr.strip().splitlines()
    assert wrong.returncode == 1 and said.startswith("error: ")
    assert f"--config={file}" in said and re.search(message, said), said


def test_an_error_of_a_shipped_configuration_names_it_as_it_was_given(tmp_path):
    wrong = run("train", "--config=aim_ablation:foo", "--workdir", tmp_path / "w")
    assert wrong.stderr.strip().endswith("(in --config=aim_ablation:foo)")
    wrong = run("train_vq", "--config", "folder_vq:/nowhere", "--workdir", tmp_path / "w")
    (said,) = wrong.stderr.strip().splitlines()
    assert "/nowhere does not exist (in --config=folder_vq:/nowhere)" in said
    wrong = run("train", "--config", "fashion_mnist:x", "--workdir", tmp_path / "w")
    assert "--config=fashion_mnist:x" in wrong.stderr and "takes 0 positional" in wrong.stderr
    wrong = run("train", "--config", "fashion_mnist", "--workdir", "w", "--config.steps=many")
    assert "config.steps" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1


def test_sampling_keeps_a_models_own_settings_where_none_are_given(
    tiny_model, tmp_path, monkeypatch
):
    """Also those that are not numbers, which once were replaced by the flags' defaults."""
    own = {"cfg_scale": 3.0, "cfg_schedule": "cosine", "cfg_interval": [0.0, 0.5], "min_p": 0.1}
    model = save_model(tmp_path / "model", dataclasses.replace(tiny_model, sampling=own))
    command = ("sample", "--checkpoint", model, "--per_class", 2, "--npz", "--out")

    def samples(name, *options):
        ended = run(*command, tmp_path / name, *options)
        assert ended.returncode == 0, ended.stderr
        return np.load(tmp_path / name / "samples.npz")["arr_0"]

    labels = np.repeat([0, 1, 2], 2)
    expected = generate(load_pretrained(model), labels)
    np.testing.assert_array_equal(samples("own"), expected.images)
    constant = generate(
        load_pretrained(model), labels, cfg_schedule="constant", cfg_interval=(0.25, 1.0)
    )
    given = samples("given", "--cfg_schedule", "constant", "--cfg_interval", "0.25,1")
    np.testing.assert_array_equal(given, constant.images)
    assert (given != samples("own")).any()
    wrong = run(*command, tmp_path / "wrong", "--cfg_interval", "0.1,late")
    assert wrong.returncode == 1 and "--cfg_interval=0.1,late: expected two" in wrong.stderr
    assert not (tmp_path / "wrong").exists()


def test_evaluation_keeps_a_models_own_settings_too(tiny_model):
    own = {"cfg_scale": 3.0, "cfg_schedule": "cosine", "cfg_interval": [0.0, 0.5]}
    settings = sampling_settings(dataclasses.replace(tiny_model, sampling=own), eval_defaults())
    assert settings.items() >= own.items()
    settings = sampling_settings(tiny_model, eval_defaults())
    assert settings["cfg_schedule"] == "constant" and "cfg_interval" not in settings


def test_completions_are_made_in_batches_with_progress(tiny_model, capsys):
    data = {"image_size": 4, "channels": 1, "fit": "resize", "resize_size": 0}
    info = {"data": data | {"random_crop": False, "random_flip": False}}
    model = dataclasses.replace(tiny_model, info=info)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
    scales = np.linspace(1, 3, 10).tolist()
    whole = complete(model, pixels, [0, 2], 5, cfg_scale=scales)
    assert "sampling: 10/10 images" in capsys.readouterr().err
    parts = complete(model, pixels, [0, 2], 5, batch_size=4, cfg_scale=scales)
    np.testing.assert_array_equal(np.asarray(parts), np.asarray(whole))
    assert "sampling: 10/10 images" in capsys.readouterr().err


def test_the_package_lists_and_runs_the_programs():
    shown = process("-m", "aim_jax", "--help")
    assert shown.returncode == 0
    for program in PROGRAMS:
        assert f"  {program} " in shown.stdout
    inner = run("convert", "to-jax", "--help")
    assert inner.returncode == 0 and "--position_offset" in inner.stdout
    wrong = process("-m", "aim_jax", "paint")
    assert wrong.returncode == 2 and "unknown program 'paint'" in wrong.stderr


def test_samples_come_as_grid_pngs_and_npz(tiny_model, tmp_path):
    paths = sample_to_directory(
        tiny_model, [0, 2], 3, tmp_path, seed=5, batch_size=4, pngs=True, npz=True
    )
    assert paths[0] == tmp_path / "grid.png" and len(paths) == 1 + 6 + 1
    assert all(path.is_file() for path in paths)
    arrays = np.load(tmp_path / "samples.npz")
    assert arrays["arr_0"].shape == (6, 4, 4, 1) and arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["labels"], [0, 0, 0, 2, 2, 2])
    picture = np.asarray(Image.open(tmp_path / "images" / "00005_old_tree.png"))
    np.testing.assert_array_equal(picture[..., 0], arrays["arr_0"][5, ..., 0])
    by_two = tmp_path / "by_two"
    sample_to_directory(tiny_model, [0, 2], 3, by_two, seed=5, batch_size=2, npz=True)
    np.testing.assert_array_equal(np.load(by_two / "samples.npz")["arr_0"], arrays["arr_0"])


def test_completions_keep_what_is_given(tiny_model, picture_folder):
    data = {"image_size": 4, "channels": 1, "fit": "resize", "resize_size": 0}
    info = {"data": data | {"random_crop": False, "random_flip": False}}
    files = sorted((picture_folder / "validation" / "boat").glob("*.png"))[:2]
    pictures = [np.asarray(Image.open(file))[..., None] for file in files]
    with pytest.raises(ValueError, match="does not record how its training images were"):
        complete(tiny_model, pictures, [0, 1], 3)
    model = dataclasses.replace(tiny_model, info=info)
    with pytest.raises(ValueError, match="1 classes or captions for 2 images"):
        complete(model, pictures, [0], 3)
    grid = np.asarray(complete(model, pictures, [0, 2], 3))[:, -(5 * 66 + 2) :]
    assert grid.shape == (2 * 66 + 2, 5 * 66 + 2, 3)
    first = pictures[0][..., 0].repeat(16, axis=0).repeat(16, axis=1)
    np.testing.assert_array_equal(grid[2:66, 2:66, 0], first)
    np.testing.assert_array_equal(grid[2:34, 68:132, 0], first[:32])
    assert (grid[34:66, 68:132] == 127).all()

    # A model of padded pictures pads what fits, and scales what does not.
    padding = dataclasses.replace(model, info={"data": info["data"] | {"fit": "pad"}})
    small = fitted(padding, np.full((2, 2, 1), 255, np.uint8))[..., 0]
    np.testing.assert_array_equal(small, np.pad(np.ones((2, 2)), 1, constant_values=-1))
    np.testing.assert_array_equal(fitted(padding, np.full((9, 8, 3), 255, np.uint8)), 1)


def test_settings_are_compared_on_the_same_pictures(tiny_model):
    scales = [1.0, 4.0]
    grid = np.asarray(compare_settings(tiny_model, [0, 2, 1], "cfg_scale", scales, seed=3))
    grid = grid[:, -(3 * 66 + 2) :]
    for row, scale in enumerate(scales):
        images = np.asarray(generate(tiny_model, [0, 2, 1], 3, cfg_scale=scale).images)
        for column, image in enumerate(images):
            cell = grid[20 + 66 * row :, 2 + 66 * column :][:64:16, :64:16, 0]
            np.testing.assert_array_equal(cell, image[..., 0])
    assert (grid[20:84, 2:200] != grid[86:150, 2:200]).any()


def test_from_one_class_to_another(tiny_model):
    ends = with_mixed_classes(tiny_model, 2, 0, np.array([0.0, 0.5, 1.0], np.float32))
    table = ends.aim_params["class_embedding"]["table"]["embedding"]
    old = tiny_model.aim_params["class_embedding"]["table"]["embedding"]
    np.testing.assert_allclose(table, [old[2], (old[2] + old[0]) / 2, old[0], old[3]], rtol=1e-6)
    for mixed, pure in ((0, 2), (2, 0)):  # at the ends it is the class itself, guidance included
        np.testing.assert_array_equal(
            generate(ends, [mixed] * 2).tokens, generate(tiny_model, [pure] * 2).tokens
        )
    grid = interpolate(tiny_model, 2, 0, 3, 4)
    assert grid.height == 3 * 66 + 2
    with pytest.raises(ValueError, match="steps=1"):
        interpolate(tiny_model, 2, 0, 1, 4)


def test_every_field_of_a_model_can_be_overridden():
    for defaults, shape in ((aim_defaults, AiMConfig), (vq_defaults, VQConfig)):
        assert shape(**defaults().model) == shape()
        assert set(defaults().model) == {field.name for field in dataclasses.fields(shape)}


def test_a_picture_never_takes_the_place_of_a_directory(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert image_path(tmp_path / "mine", "grid.png") == tmp_path / "mine" / "grid.png"
    assert image_path(tmp_path / "new.png", "grid.png") == tmp_path / "new.png"
    with pytest.raises(IsADirectoryError, match="mine is a directory; name a file"):
        save_png(Image.new("L", (2, 2)), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not [path for path in tmp_path.iterdir() if path.name != "mine"]


def test_models_take_the_place_of_models_alone(tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", tiny_model)
    save_model(tmp_path / "empty", tiny_model)  # an older model
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="mine exists and is not a model directory"):
        save_model(tmp_path / "mine", tiny_model)
    with pytest.raises(ValueError, match="dtype='int8': expected one of float32"):
        save_model(tmp_path / "new", tiny_model, "int8")
    assert not (tmp_path / "new").exists() and (tmp_path / "mine" / "thesis.txt").exists()


def test_class_names_and_ids(tiny_model):
    assert class_ids(tiny_model, []) == [0, 1, 2]
    assert class_ids(tiny_model, ["House", "old_tree", "0"]) == [1, 2, 0]
    digits = dataclasses.replace(tiny_model, class_names=("1", "2", "3"))
    assert class_ids(digits, ["1", "3", "0"]) == [0, 2, 0]  # a number only where it is no name
    for wrong in ("castle", "3", "-1"):
        with pytest.raises(ValueError, match=f"unknown class '{wrong}'.*boat, house, old tree"):
            class_ids(tiny_model, [wrong])


def test_grid_places_images_and_captions():
    images = np.zeros((6, 4, 4, 1), np.uint8)
    images[4] = 200
    grid = np.asarray(make_grid(images, 3, ["first", "second"]))
    right = grid[:, -(3 * 66 + 2) :]
    assert right.shape == (2 * 66 + 2, 200, 3)
    assert (right[70:130, 70:130] == 200).all() and (right[4:60, 70:130] == 0).all()
    captions = grid[:, : -(3 * 66 + 2)]
    assert (captions[:66] < 128).any() and (captions[66:] < 128).any()
    below = np.asarray(make_grid(images, 3, column_labels=["a", "", "too wide a name " * 9]))
    head = below[:18] < 128
    np.testing.assert_array_equal(below[18:], right)
    assert head[:, :67].any() and not head[:, 69:133].any() and head[:, 134:].any()


def test_metrics_of_repeated_steps_are_dropped(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    MetricsWriter(tmp_path, first_step=2).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 2.0}']


def test_duration():
    assert (duration(59.6), duration(61), duration(7322)) == ("1:00", "1:01", "2:02:02")


def test_the_host_runs_only_so_far_ahead_of_the_device(tmp_path):
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 40, lambda _, x: x @ x / 600, x)

    log, x, done = StepLog(MetricsWriter(tmp_path), 8, 0, 1, 5), jnp.ones((600, 600)), []
    jax.block_until_ready(slow(x))
    for step in range(1, 9):
        x = slow(x)
        done.append(x)
        log.add(step, {"loss": x[0, 0], "skipped": 0, "skipped_in_a_row": 0})
        assert all(x.is_ready() for x in done[: -1 - AHEAD])
    assert not done[-1].is_ready()
