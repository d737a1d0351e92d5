"""Runs of the tests of training share what takes most of their time."""

import jax
import pytest

from aim_jax.training import aim, tokenizer


@pytest.fixture(scope="module")
def made():
    """What `start_once` keeps for the tests of a file."""
    return {}


@pytest.fixture
def start_once(monkeypatch, made):
    """Runs of equal configurations share their compiled steps, first states and tokenizers.

    A run spends most of its time on those. Every run gets a copy of the first state of its own, as
    its steps consume it.
    """

    def once(key, make):
        if key not in made:
            made[key] = make()
        return made[key]

    def share(module):
        new_setup, create_sharded = module.Setup, module.create_sharded

        def setup_once(config):
            config = config.copy_and_resolve_references()  # tests change theirs afterwards
            mesh = module.make_mesh(config.mesh.data, config.mesh.model, config.mesh.slices)
            devices = tuple(device.id for device in mesh.devices.flat)
            key = ("setup", module.__name__, config.to_json(), mesh.devices.shape, devices)
            return once(key, lambda: new_setup(config))

        def state_once(make, mesh, rules):
            first = once(("state", make), lambda: create_sharded(make, mesh, rules))
            placed = jax.tree.map(lambda x: x.sharding, first)
            return jax.device_put(first, placed, may_alias=False)

        monkeypatch.setattr(module, "Setup", setup_once)
        monkeypatch.setattr(module, "create_sharded", state_once)

    share(aim)
    share(tokenizer)
    open_tokenizer = aim.open_tokenizer
    monkeypatch.setattr(
        aim, "open_tokenizer", lambda path: once(("tokenizer", path), lambda: open_tokenizer(path))
    )
