"""Meshes, partition specs, and steps that do not depend on how they are sharded."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from aim_jax.configs.defaults import aim_defaults
from aim_jax.models import PRESETS
from aim_jax.models.aim import init_params
from aim_jax.ops import cross_entropy, linear_cross_entropy
from aim_jax.parallel.sharding import (
    axis_rules,
    batch_share,
    check_batch,
    constrain,
    make_mesh,
    partition_specs,
    replicate,
    sharded_jit,
)
from aim_jax.sampling.generate import generate
from aim_jax.training import aim as train
from aim_jax.training import loop
from aim_jax.training.optimizer import accumulated_grads
from tests.conftest import TINY_AIM

# Where every kind of parameter of AiM-L lies on the mesh; with FSDP "data" takes the place of "-".
SPECS = {
    "token_embedding/embedding": ("model", "-"),
    "position_embedding/embedding": (None, "-"),
    "class_embedding/table/embedding": (None, "-"),
    "adaln/kernel": (None, "-", None, None),
    "adaln/bias": (None, None, None),
    "adaln/table": (None, None, None),
    "final_adaln/kernel": (None, "-", None, None),
    "final_adaln/bias": (None, None, None),
    "norm_f/scale": ("-",),
    "final_layer/norm_final/scale": ("-",),
    "layers/norm/scale": (None, "-"),
    "layers/mixer/z_proj/kernel": (None, "-", "model"),
    "layers/mixer/x_proj/kernel": (None, "-", "model"),
    "layers/mixer/B_proj/kernel": (None, "-", None),
    "layers/mixer/C_proj/kernel": (None, "-", None),
    "layers/mixer/dt_proj/kernel": (None, "-", "model"),
    "layers/mixer/conv_x/kernel": (None, None, "model"),
    "layers/mixer/conv_x/bias": (None, "model"),
    "layers/mixer/conv_B/kernel": (None, None, None),
    "layers/mixer/conv_B/bias": (None, None),
    "layers/mixer/conv_C/kernel": (None, None, None),
    "layers/mixer/conv_C/bias": (None, None),
    "layers/mixer/dt_bias": (None, "model"),
    "layers/mixer/A_log": (None, "model"),
    "layers/mixer/D": (None, "model"),
    "layers/mixer/norm/scale": (None, "model"),
    "layers/mixer/out_proj/kernel": (None, "model", "-"),
}


@pytest.fixture(scope="module")
def boxed():
    return jax.eval_shape(lambda: init_params(PRESETS["L"], jax.random.key(0)))


def flat_specs(boxed, rules):
    is_spec = lambda leaf: isinstance(leaf, P)  # noqa: E731
    specs = partition_specs(boxed, rules)
    leaves, _ = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    return {"/".join(entry.key for entry in path): tuple(spec) for path, spec in leaves}


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("slices", [1, 2])
def test_expected_partition_specs(boxed, fsdp, slices):
    mesh = make_mesh(-1, 2, slices)
    place = {"-": "data" if fsdp else None}
    expected = {k: tuple(place.get(a, a) for a in spec) for k, spec in SPECS.items()}
    assert flat_specs(boxed, axis_rules(mesh, fsdp)) == expected


def test_an_axis_without_a_rule_raises(boxed):
    mesh = make_mesh(-1, 2)
    rules = {k: v for k, v in axis_rules(mesh).items() if k != "inner"}
    with pytest.raises(ValueError, match="logical axis 'inner', for which the rules have no entry"):
        partition_specs(boxed, rules)
    with pytest.raises(ValueError, match="did not match a rule"):
        sharded_jit(lambda x: constrain(x, "batch", "inner"), mesh, rules)(jnp.ones((8, 8)))


def test_every_parameter_names_its_axes(boxed):
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for leaf in jax.tree.leaves(boxed, is_leaf=is_box):
        assert is_box(leaf) and len(leaf.names) == leaf.value.ndim


def test_mesh_and_batch_must_fit_the_devices():
    assert make_mesh().shape == {"data": 8, "model": 1}
    assert make_mesh(-1, 4).shape == {"data": 2, "model": 4}
    assert make_mesh(-1, 2, 2).shape == {"slice": 2, "data": 2, "model": 2}
    with pytest.raises(ValueError, match="data=3 times model=2 is 6, but there are 8 devices"):
        make_mesh(3, 2)
    check_batch(24, 3, make_mesh(-1, 1, 2))
    with pytest.raises(ValueError, match=r"batch_size=20 is not a multiple of 8: 4 devices .*=2"):
        check_batch(20, 2, make_mesh(-1, 2))


class Slice:
    """A device as JAX describes it."""

    def __init__(self, number, slice_index, platform="tpu", process_index=0):
        self.id, self.slice_index, self.platform = number, slice_index, platform
        self.process_index = process_index


def test_slices_stay_together():
    devices = [Slice(i, i % 2) for i in range(8)]
    mesh = make_mesh(-1, 2, 2, devices)
    assert [[d.slice_index for d in block.flat] for block in mesh.devices] == [[0] * 4, [1] * 4]
    with pytest.raises(ValueError, match=r"slices=1, but the devices belong to 2 .*mesh.slices=2"):
        make_mesh(-1, 2, 1, devices)
    # Hosts of GPUs have such numbers too, and are no slices.
    hosts = [Slice(i, i // 4, "gpu") for i in range(8)]
    assert make_mesh(-1, 2, 1, hosts).shape == {"data": 4, "model": 2}


def test_hosts_whose_chips_are_numbered_across_them():
    """As on v5e slices: a host has a square of 2 x 2 of a grid that is numbered row by row."""
    owner = lambda number: number // 8 * 2 + number % 4 // 2  # noqa: E731
    devices = [
        Slice(16 * part + number, part, process_index=4 * part + owner(number))
        for part in range(2) for number in range(16)
    ]  # fmt: skip
    mesh = make_mesh(-1, 1, 2, devices)
    assert [batch_share(mesh, process) for process in range(8)] == [(i, 8) for i in range(8)]
    across = make_mesh(devices=sorted(devices[:16], key=lambda device: device.id))
    with pytest.raises(ValueError, match=r"process 0 holds the rows \[0, 1, 4, 5\]"):
        batch_share(across, 0)


def test_images_are_drawn_where_the_parameters_are_in_whatever_order(tiny_model):
    devices = jax.devices()
    mesh = make_mesh(devices=[devices[i] for i in (0, 2, 1, 3)])
    parts = {k: replicate(getattr(tiny_model, k), mesh) for k in ("aim_params", "vq_params")}
    labels = np.arange(8) % 3
    found = generate(dataclasses.replace(tiny_model, **parts), labels, 3)
    expected = generate(tiny_model, labels, 3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.images, expected.images)


def test_cross_entropy_in_chunks_is_that_of_all_logits():
    rng = np.random.default_rng(0)
    x, table = (rng.normal(size=size).astype(np.float32) for size in ((2, 7, 6), (11, 6)))
    labels = rng.integers(0, 11, (2, 7))

    def loss(x, table, chunk):
        return jnp.sum(linear_cross_entropy(x, table, labels, chunk) * np.arange(7))

    logits = np.einsum("bld,vd->blv", x, table)
    z = logits - logits.max(-1, keepdims=True)
    expected = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(linear_cross_entropy(x, table, labels), expected, rtol=2e-5)
    np.testing.assert_allclose(linear_cross_entropy(x, table, labels, 3), expected, rtol=2e-5)
    whole = jax.grad(loss, argnums=(0, 1))(x, table, 0)
    for chunk in (1, 3):
        parts = jax.grad(loss, argnums=(0, 1))(x, table, chunk)
        chex.assert_trees_all_close(parts, whole, rtol=1e-4, atol=1e-5)
    far = jnp.array([[1e4, 0.0, -1e4]])
    assert cross_entropy(far, jnp.array([0]))[0] == 0
    assert cross_entropy(far, jnp.array([2]))[0] == 2e4


def small_config(**mesh):
    config = aim_defaults()
    config.steps, config.batch_size = 10, 8
    config.optimizer.update(lr=1e-2, schedule="constant")
    config.ema_decay = 0.5
    config.model.update({**vars(TINY_AIM), "class_dropout": 0.0})
    config.mesh.update(mesh)
    return config


def random_batch():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (8, 4)).astype(np.int32)
    return {"codes": codes, "labels": np.arange(8, dtype=np.int32) % 3}


@pytest.fixture(scope="module")
def params(tiny_model):
    return jax.tree.map(np.asarray, tiny_model.aim_params)


def gradients(config, devices, params):
    """Loss and gradients of a batch on some of the devices, sharded as a run would be."""
    setup = train.Setup(config, jax.devices()[:devices])
    state, _ = setup.abstract_arguments()
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, state.params)

    def fn(params, batch):
        loss = lambda p, part, key: train.loss_fn(p, part, key, setup.model)  # noqa: E731
        grads, metrics, _ = accumulated_grads(
            jax.grad(loss, has_aux=True), params, batch, jax.random.key(0), config.accumulate
        )
        return metrics["loss"], grads

    jitted = sharded_jit(fn, setup.mesh, setup.rules)
    kernel = placed["layers"]["mixer"]["x_proj"]["kernel"].sharding.spec
    return *jitted(placed, loop.shard_batch(random_batch(), setup.mesh)), kernel


@pytest.fixture(scope="module")
def on_one_device(params):
    return gradients(small_config(), 1, params)


# data, model, slices, fsdp, micro-batches
ARRANGEMENTS = [
    (2, 1, 1, False, 1),
    (1, 2, 1, False, 1),
    (4, 1, 1, True, 1),
    (2, 2, 1, True, 1),
    (8, 1, 1, False, 1),
    (4, 2, 1, True, 2),
    (2, 2, 2, True, 1),
]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_gradients_do_not_depend_on_the_mesh(on_one_device, params, arrangement):
    """Loss to 1e-6 relative, every gradient to 1e-5 of its largest value."""
    data, model, slices, fsdp, accumulate = arrangement
    config = small_config(data=data, model=model, slices=slices, fsdp=fsdp)
    config.accumulate = accumulate
    loss, grads, spec = gradients(config, data * model * slices, params)
    assert spec == P(None, "data" if fsdp else None, "model")
    expected_loss, expected, _ = on_one_device
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def test_a_step_does_not_depend_on_the_mesh(params):
    """Parameters, moments, averages and reports after a step: to 1e-4 relative."""

    def step(devices, **mesh):
        config = small_config(**mesh)
        config.model.class_dropout = 0.5  # which labels are dropped does not depend on it either
        setup = train.Setup(config, jax.devices()[:devices])
        state = train.create_sharded(setup.new_state, setup.mesh, setup.rules).with_params(params)
        return setup.train_step(state, loop.shard_batch(random_batch(), setup.mesh))

    found, expected = step(8, data=2, model=2, slices=2, fsdp=True), step(1)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-7)


def shapes_of(kind, hlo):
    """Result shapes, as tuples of sizes, of the instructions of a kind."""
    found = []
    for line in hlo.splitlines():
        if match := re.search(rf"= (.*?) {kind}(-start)?\(", line):
            found += [
                tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]", match[1])
            ]
    return found


@pytest.mark.parametrize("chunk", [0, 2])
def test_logits_of_a_sharded_vocabulary_are_never_gathered(chunk):
    """No device ever holds a logit of another's part of the vocabulary, forward or backward."""
    config = small_config(data=2, model=4)
    config.model.update(vocab_size=4096, logits_chunk=chunk)
    setup = train.Setup(config)
    hlo = setup.train_step.lower(*setup.abstract_arguments()).compile().as_text()
    rows = {4096, 16 * 4096}
    for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        for shape in shapes_of(kind, hlo):
            # What travels is a scalar per token, or the table's own gradient, never logits.
            assert not (len(shape) >= 2 and shape[-1] in (1024, *rows)), (kind, shape)
    assert shapes_of("all-reduce", hlo)  # of maxima and sums
    tokens = 4 * (chunk or 4)  # per device: 4 images
    held = re.findall(r"f32\[(\d+(?:,\d+)*)\]", hlo)
    sizes = {tuple(map(int, sizes.split(","))) for sizes in held}
    logits = [s for s in sizes if s[-1] == 4096 and int(np.prod(s)) >= tokens * 4096]
    assert not logits, logits
