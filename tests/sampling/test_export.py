"""Exported programs against the library, run where the library cannot be imported."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import deserialize_portable_artifact
from jax.interpreters import mlir
from PIL import Image
from safetensors.numpy import load_file

from aim_jax import generate
from aim_jax.sampling import export_runner
from aim_jax.sampling.export import save_exported

# Any import of the library fails in this process, of its own modules too.
ALONE = """
import sys
sys.modules["aim_jax"] = None
sys.path.insert(0, sys.argv[1])
import numpy as np, sample
tokens, images = sample.sample([2, 0, 1, 2, 3], seed=7, temperature=0.9, top_k=9)
np.savez(sys.argv[2], tokens=tokens, images=images)
"""


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    return save_exported(tiny_model, tmp_path_factory.mktemp("exported") / "tiny", images=2)


def test_sampler_draws_the_same_images_without_the_library(tiny_model, exported, tmp_path):
    file = tmp_path / "drawn.npz"
    subprocess.run([sys.executable, "-c", ALONE, exported, file], check=True)
    drawn = np.load(file)
    expected = generate(
        tiny_model,
        [2, 0, 1, 2, 3],
        7,
        temperature=0.9,
        top_k=9,
        form="recurrent",
        implementation="xla",
    )
    np.testing.assert_array_equal(drawn["tokens"], expected.tokens)
    difference = np.abs(drawn["images"].astype(int) - np.asarray(expected.images, int))
    assert difference.max() <= 1  # a rounding of the last layer may differ

    wrong = [sys.executable, exported / "sample.py", "--labels", "1,4"]
    said = subprocess.run(wrong, capture_output=True, text=True)
    assert said.returncode == 2 and "class ids 0..2" in said.stderr

    page = [sys.executable, exported / "sample.py", "--labels", "1,2", "--out", tmp_path / "a.png"]
    subprocess.run(page, check=True, capture_output=True)
    assert (tmp_path / "a.png").stat().st_size > 0


SETTINGS = """
import sys
sys.modules["aim_jax"] = None
sys.path.insert(0, sys.argv[1])
import numpy as np, sample
settings = {"cfg_scale": 3.0, "temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.05}
given = sample.sample(["house", "old_tree", 0], 3, cfg_interval=(0.25, 1.0), **settings)
own = sample.sample(["HOUSE", "old tree", "0"], 3)
np.savez(sys.argv[2], given=given[0], own=own[0])
for wrong in (
    {"cfg_schedule": "constant"}, {"cfg_interval": (0.5, 0.5)}, {"cfg_scale": 1e39},
    {"temperature": 1e-46}, {"top_k": 2.5}, {"min_p": "a"}, {"size": 3}, {"top_p": True},
):
    try:
        sample.sample([0], **wrong)
    except (TypeError, ValueError) as error:
        print(error)
"""


def test_sampler_takes_names_and_all_settings_and_keeps_the_models_own(tiny_model, tmp_path):
    own = {"cfg_scale": 2.5, "cfg_schedule": "cosine", "cfg_interval": [0.0, 0.75], "min_p": 0.02}
    model = dataclasses.replace(tiny_model, sampling=own)
    path = save_exported(model, tmp_path / "exported")
    file = tmp_path / "drawn.npz"
    run = subprocess.run(
        [sys.executable, "-c", SETTINGS, path, file], check=True, capture_output=True, text=True
    )
    drawn = np.load(file)
    plain = {"form": "recurrent", "implementation": "xla"}
    expected = generate(
        model, [1, 2, 0], 3, cfg_scale=3.0, temperature=0.8, top_k=7, top_p=0.9, min_p=0.05,
        cfg_interval=(0.25, 1.0), **plain,
    )  # fmt: skip
    np.testing.assert_array_equal(drawn["given"], expected.tokens)
    np.testing.assert_array_equal(drawn["own"], generate(model, [1, 2, 0], 3, **plain).tokens)
    assert (drawn["own"] != drawn["given"]).any()
    refused = run.stdout.splitlines()
    assert (
        "exported with 'cosine'; export the model again with --cfg_schedule constant"
        in (refused[0])
    )
    names = [re.match(r"\w+", line)[0] for line in refused]
    assert names == [
        "cfg_schedule", "cfg_interval", "cfg_scale", "temperature", "top_k", "min_p", "size",
        "top_p",
    ]  # fmt: skip


def test_another_schedule_can_be_exported(tiny_model, tmp_path):
    path = save_exported(tiny_model, tmp_path / "linear", cfg_schedule="linear")
    assert json.loads((path / "settings.json").read_text())["cfg_schedule"] == "linear"
    with pytest.raises(ValueError, match="cfg_schedule='square': expected one of"):
        save_exported(tiny_model, tmp_path / "square", cfg_schedule="square")
    assert not (tmp_path / "square").exists()


def exported_program(exported, *options):
    command = [sys.executable, exported / "sample.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


def test_sampler_writes_a_labelled_grid(tiny_model, exported, tmp_path):
    out = tmp_path / "grid.png"
    ended = exported_program(
        exported, "--classes", "old tree,boat", "--per_class", 3, "--min_p", 0.1, "--out", out
    )
    assert ended.returncode == 0, ended.stderr
    grid = np.asarray(Image.open(out))
    assert grid.shape[0] == 2 * 66 + 2 and grid.shape[1] > 3 * 66 + 2
    expected = generate(
        tiny_model, np.repeat([2, 0], 3), min_p=0.1, form="recurrent", implementation="xla"
    )
    cells = grid[2:, -3 * 66 :][::66, ::66][:2, :3, 0].ravel()
    first_pixels = np.asarray(expected.images)[:, 0, 0, 0].astype(int)
    assert np.abs(cells - first_pixels).max() <= 1
    captions = grid[:, : -(3 * 66 + 2)]
    assert (captions[:66] < 128).any() and (captions[66:] < 128).any()
    wrong = exported_program(exported, "--classes", "castle", "--out", tmp_path / "wrong.png")
    assert wrong.returncode == 2
    assert "unknown class 'castle'; expected 'boat', 'house'" in wrong.stderr
    wrong = exported_program(exported, "--cfg_schedule", "linear", "--out", tmp_path / "wrong.png")
    assert wrong.returncode == 2 and "exported with 'constant'" in wrong.stderr
    assert not (tmp_path / "wrong.png").exists()


def test_sampler_matches_class_names_exactly_first():
    stored = {"class_names": ["cat", "Cat", "caf\u00e9", "\u732b"], "num_classes": 4}
    given = {"cat": 0, "Cat": 1, "cafe\u0301": 2, "\u732b": 3, "3": 3, "CAFE\u0301": 2}
    assert {name: export_runner.class_id(name, stored) for name in given} == given
    for wrong, message in (("CAT", "ambiguous: 'cat'"), ("dog", "unknown"), ("5", "unknown")):
        with pytest.raises(ValueError, match=message):
            export_runner.class_id(wrong, stored)
    captions = [export_runner.caption(label, stored) for label in range(5)]
    assert captions == ["cat", "Cat", "caf\u00e9", "class 3", "class 4"]


def test_step_loops_to_the_greedy_tokens(tiny_model, exported):
    programs = {
        name: jax.export.deserialize((exported / f"{name}.jax").read_bytes())
        for name in ("prepare", "begin", "step", "embed")
    }
    weights = load_file(exported / "weights.safetensors")
    weights = {name: w for name, w in weights.items() if name.startswith("aim.")}
    labels = jnp.array([2, 0, 3, 3], jnp.int32)  # two images, and their rows of the null class
    laid_out = programs["prepare"].call(weights)
    x, modulation, caches = programs["begin"].call(laid_out, labels)
    drawn = []
    for position in range(tiny_model.aim_config.num_tokens):
        logits, caches = programs["step"].call(laid_out, x, modulation, caches)
        conditional, null = jnp.split(logits, 2)
        token = jnp.argmax(null + 2.0 * (conditional - null), axis=-1).astype(jnp.int32)
        drawn.append(token)
        x = programs["embed"].call(laid_out, jnp.tile(token, 2), jnp.int32(position))
    expected = generate(tiny_model, [2, 0], cfg_scale=2.0, top_k=1)
    np.testing.assert_array_equal(np.stack(drawn, axis=1), expected.tokens)


def test_stablehlo_has_the_arguments_that_are_described(exported):
    for name in ("prepare", "begin", "step", "embed"):
        described = json.loads((exported / f"{name}.json").read_text())
        bytecode = (exported / f"{name}.mlirbc").read_bytes()
        assert bytecode[:4] == b"ML\xefR"
        with mlir.make_ir_context():
            text = str(deserialize_portable_artifact(bytecode))
        signature = text[text.index("@main(") :].partition("->")[0]
        assert signature.count("%arg") == len(described["arguments"]), name
        for argument in described["arguments"]:
            shape = "x".join([*map(str, argument["shape"]), ""])
            kind = {"float32": "f32", "int32": "i32"}[argument["dtype"]]
            assert f"tensor<{shape}{kind}>" in signature
    names = [argument["name"] for argument in described["arguments"]]
    assert names[-2:] == ["tokens", "position"]


def test_nothing_is_overwritten(tiny_model, exported):
    with pytest.raises(FileExistsError, match="not empty"):
        save_exported(tiny_model, exported)
