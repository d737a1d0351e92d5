"""Train steps are traced once: not again for another step, seed or batch, or after a restore."""

import functools

import chex
import jax
import numpy as np
import pytest

from aim_jax.configs.defaults import aim_defaults, vq_defaults
from aim_jax.parallel.sharding import create_sharded, make_mesh, shard_batch
from aim_jax.training import aim, tokenizer
from aim_jax.training.checkpoint import RunCheckpoints
from tests.conftest import TINY_AIM, TINY_VQ
from tests.training.test_loop import Batches


def aim_setup():
    config = aim_defaults()
    config.batch_size, config.ema_decay = 8, 0.5
    config.model.update(vars(TINY_AIM))
    return aim.Setup(config)


def tokenizer_setup():
    config = vq_defaults()
    config.batch_size, config.ema_decay, config.restart_codes = 8, 0.5, 2
    config.model.update(vars(TINY_VQ))
    config.data.update(image_size=4, channels=1)
    return tokenizer.Setup(config)


def token_batch(rng):
    codes = rng.integers(0, 16, (8, 4)).astype(np.int32)
    return {"codes": codes, "labels": rng.integers(0, 3, 8).astype(np.int32)}


def image_batch(rng):
    return {"images": rng.uniform(-1, 1, (8, 4, 4, 1)).astype(np.float32)}


@pytest.mark.parametrize(
    ("program", "make", "batch", "rest"),
    [(aim, aim_setup, token_batch, ()), (tokenizer, tokenizer_setup, image_batch, (None,))],
    ids=["aim", "tokenizer"],
)
def test_a_train_step_is_traced_once(program, make, batch, rest, tmp_path, monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(program, "make_mesh", lambda *_: mesh)
    traced_once = chex.assert_max_traces(program.train_step, n=1)
    monkeypatch.setattr(program, "train_step", traced_once)
    setup, rng = make(), np.random.default_rng(0)
    step = functools.partial(advance, setup, batch, rest, rng)
    state = step(step(create_sharded(setup.new_state, mesh, setup.rules)))
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(2, state, Batches())
    checkpoints.wait()
    number, restored = checkpoints.restore_newest(state, Batches())
    assert int(step(restored).step) == number + 1 == 3
    checkpoints.close()
    # Another seed: the key is part of the state, not of the program.
    other = create_sharded(setup.new_state, mesh, setup.rules)
    key = jax.device_put(jax.random.PRNGKey(7), other.rng.sharding)
    step(other.replace(rng=key))
    with pytest.raises(AssertionError, match="traced > 1 times"):  # so the count works
        setup.train_step(*half(step, batch, rng, setup, rest))


def advance(setup, batch, rest, rng, state):
    return setup.train_step(state, shard_batch(batch(rng), setup.mesh), *rest)[0]


def half(step, batch, rng, setup, rest):
    """Arguments of a step on half a batch, which is another program."""
    state = create_sharded(setup.new_state, setup.mesh, setup.rules)
    rows = jax.tree.map(lambda x: x[:4], batch(rng))
    return state, shard_batch(rows, setup.mesh), *rest
