"""Exported programs against the library, run where the library cannot be imported."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import deserialize_portable_artifact
from jax.interpreters import mlir
from safetensors.numpy import load_file

from aim_jax import generate
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


def test_step_loops_to_the_greedy_tokens(tiny_model, exported):
    programs = {
        name: jax.export.deserialize((exported / f"{name}.jax").read_bytes())
        for name in ("begin", "step", "embed")
    }
    weights = load_file(exported / "weights.safetensors")
    weights = {name: w for name, w in weights.items() if name.startswith("aim.")}
    labels = jnp.array([2, 0, 3, 3], jnp.int32)  # two images, and their rows of the null class
    x, modulation, caches = programs["begin"].call(weights, labels)
    drawn = []
    for position in range(tiny_model.aim_config.num_tokens):
        logits, caches = programs["step"].call(weights, x, modulation, caches)
        conditional, null = jnp.split(logits, 2)
        token = jnp.argmax(null + 2.0 * (conditional - null), axis=-1).astype(jnp.int32)
        drawn.append(token)
        x = programs["embed"].call(weights, jnp.tile(token, 2), jnp.int32(position))
    expected = generate(tiny_model, [2, 0], cfg_scale=2.0, top_k=1)
    np.testing.assert_array_equal(np.stack(drawn, axis=1), expected.tokens)


def test_stablehlo_has_the_arguments_that_are_described(exported):
    for name in ("begin", "step", "embed"):
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
