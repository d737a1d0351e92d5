"""Meshes and partition specs."""

import jax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from aim_jax.models import PRESETS
from aim_jax.models.aim import init_params
from aim_jax.sharding import make_mesh, parameter_rules, partition_specs


@pytest.fixture(scope="module")
def boxed():
    return jax.eval_shape(lambda: init_params(PRESETS["L"], jax.random.key(0)))


def test_expected_partition_specs(boxed):
    specs = partition_specs(boxed)
    mixer = specs["layers"]["mixer"]
    assert specs["token_embedding"]["embedding"] == P("model", None)
    assert mixer["x_proj"]["kernel"] == P(None, None, "model")
    assert mixer["out_proj"]["kernel"] == P(None, "model", None)
    assert mixer["dt_bias"] == P(None, "model")
    assert mixer["conv_x"]["kernel"] == P(None, None, "model")
    assert mixer["B_proj"]["kernel"] == P(None, None, None)
    assert specs["adaln"]["kernel"] == P(None, None, None, None)


def test_fsdp_shards_the_embed_axis_over_data(boxed):
    specs = partition_specs(boxed, parameter_rules(fsdp=True))
    assert specs["layers"]["mixer"]["x_proj"]["kernel"] == P(None, "data", "model")
    assert specs["layers"]["norm"]["scale"] == P(None, "data")


def test_an_axis_without_a_rule_raises(boxed):
    rules = tuple(rule for rule in parameter_rules() if rule[0] != "inner")
    with pytest.raises(ValueError, match="logical axis 'inner', for which the rules have no entry"):
        partition_specs(boxed, rules)


def test_every_parameter_names_its_axes(boxed):
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for leaf in jax.tree.leaves(boxed, is_leaf=is_box):
        assert is_box(leaf) and len(leaf.names) == leaf.value.ndim


def test_mesh_must_fill_the_devices():
    assert make_mesh().shape == {"data": 8, "model": 1}
    assert make_mesh(-1, 4).shape == {"data": 2, "model": 4}
    with pytest.raises(ValueError, match="data=3 times model=2 is 6, but there are 8 devices"):
        make_mesh(3, 2)
