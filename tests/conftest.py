"""Eight host devices before JAX is imported; shared tiny models and data."""

import dataclasses
import os
import sys

from tests.compilation import xla_flags

# JAX's plugin for NVIDIA GPUs, with which kernels and programs compile without a GPU. `make test`
# installs it here, apart from the environment; JAX looks for plugins when it is imported.
sys.path.append(os.path.join(sys.prefix, "cuda"))

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from PIL import Image

from aim_jax.data.text import TextTokenizer
from aim_jax.models import AiMConfig, VQConfig
from aim_jax.models.aim import init_params as init_aim
from aim_jax.models.vq import init_params as init_vq
from aim_jax.weights.directories import save_model
from aim_jax.weights.pretrained import Pretrained
from tests.slow import SLOW

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests read launch/ and benchmarks/

# Every program and test compiles its own functions. Equal ones are compiled once, and kept for the
# next run in the checkout. The programs that tests start, and the workers of pytest-xdist, inherit
# the environment of the process that starts them, and so read and fill the same directory.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "tests")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Orbax has every device write a part of what all hold, and compiles a program to cut out each.
ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False

TINY_AIM = AiMConfig(
    vocab_size=16, num_classes=3, num_tokens=4, d_model=16, n_layer=2, d_state=8, headdim=8,
    adaln="group", num_groups=1, chunk_size=4,
)  # fmt: skip
WORDS = ["a red boat", "a blue house", ""]  # captions of `text_model`
TINY_VQ = VQConfig(
    in_channels=1, out_channels=1, ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8,
    embed_dim=4, n_embed=16,
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Mark the tests of `tests.slow`."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Thousands of small programs add up to gigabytes; the next file needs few of them."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_model() -> Pretrained:
    """A random AiM and tokenizer of 4x4 grey pictures, three classes."""
    noise = lambda key: lambda x: x + 0.1 * jax.random.normal(key, x.shape)  # noqa: E731
    aim = nn.unbox(jax.jit(init_aim, static_argnums=0)(TINY_AIM, jax.random.key(0)))
    return Pretrained(
        name="tiny",
        aim_config=TINY_AIM,
        aim_params=jax.tree.map(noise(jax.random.key(1)), aim),
        vq_config=TINY_VQ,
        vq_params=jax.jit(init_vq, static_argnums=0)(TINY_VQ, jax.random.key(2)),
        class_names=("boat", "house", "old tree"),
        sampling={"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    )


@pytest.fixture(scope="session")
def text_model(tiny_model) -> Pretrained:
    """`tiny_model` for captions instead of classes, of up to 7 tokens."""
    from tests.models.test_models import random_params

    text = TextTokenizer.train(WORDS * 2, 270)
    config = dataclasses.replace(
        TINY_AIM, condition="text", num_classes=0, max_caption=7, caption_vocab=text.vocab_size
    )
    return dataclasses.replace(
        tiny_model, name="words", aim_config=config, aim_params=random_params(config),
        class_names=(), text=text,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_model, tmp_path_factory) -> Path:
    """`tiny_model` on disk."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tiny_model)


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory) -> Path:
    """Class folders of 4x4 pictures: 3 classes, 16 training and 4 validation pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 4)):
        for c, name in enumerate(("boat", "house", "old tree")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (4, 4)) + 80 * c
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root
