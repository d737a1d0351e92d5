"""Mesh and shardings: one ordered table maps the logical axes of parameters to mesh axes."""

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axis: tensor parallelism over heads, inner channels and vocabulary.
RULES = (
    ("vocab", "model"),
    ("inner", "model"),
    ("heads", "model"),
    ("embed", None),
    ("layers", None),
    ("state", None),
    ("dt_rank", None),
    ("position", None),
    ("class", None),
    ("adaln_group", None),
    ("adaln_part", None),
    ("modulation", None),
)
BATCH = PartitionSpec("data")


def parameter_rules(fsdp: bool = False):
    """`RULES`, or with the embed axis sharded over "data" as well (fully sharded parameters)."""
    return tuple((name, "data" if fsdp and name == "embed" else axis) for name, axis in RULES)


def make_mesh(data: int = -1, model: int = 1, devices=None) -> Mesh:
    """Mesh ('data', 'model') over all devices; -1 takes what the other axis leaves.

    Raises:
      ValueError: data * model is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = len(devices) // model
    if data * model != len(devices):
        raise ValueError(
            f"mesh: data={data} times model={model} is {data * model}, but there are "
            f"{len(devices)} devices; set config.mesh so that the product fits."
        )
    return Mesh(
        np.asarray(devices).reshape(data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )


def partition_specs(boxed, rules=RULES):
    """PartitionSpec of every leaf of a tree boxed with logical axes; unboxed leaves replicate.

    Raises:
      ValueError: a logical axis that the table does not name (it would replicate silently).
    """
    table = dict(rules)

    def mesh_axis(axis, path):
        if axis is not None and axis not in table:
            raise ValueError(
                f"sharding: {jax.tree_util.keystr(path)} has the logical axis {axis!r}, for which "
                f"the rules have no entry; known are {sorted(table)}."
            )
        return table.get(axis)

    def spec(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return PartitionSpec()
        return PartitionSpec(*(mesh_axis(axis, path) for axis in leaf.names))

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(spec, boxed, is_leaf=is_box)


def shardings(boxed, mesh: Mesh, rules=RULES):
    """NamedSharding of every leaf of a (possibly abstract) boxed tree."""
    specs = partition_specs(boxed, rules)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def create_sharded(make, mesh: Mesh, rules=RULES):
    """Runs `make()` under jit so that every array is born sharded, and unboxes the result.

    Args:
      make: a function without arguments that returns a tree, possibly boxed.
    """
    abstract = jax.eval_shape(make)
    return jax.jit(lambda: nn.unbox(make()), out_shardings=shardings(abstract, mesh, rules))()


def devices_of(tree) -> list[jax.Device]:
    """The devices that hold the arrays of a tree, by number; while tracing, the default one."""
    leaf = jax.tree.leaves(tree)[0]
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return [jax.devices()[0]]
    return sorted(leaf.sharding.device_set, key=lambda device: device.id)


def replicate(tree, mesh: Mesh):
    """A whole copy of every array on every device of the mesh; every process gives the same."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x):
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def to_host(tree):
    """Every array whole, as NumPy, on every process; all of them must call this."""

    def fetch(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process's devices hold, and how many parts there are.

    Processes along the other axes hold the same part.

    Raises:
      ValueError: the processes' parts of the data axis are not equal blocks.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    mine = np.flatnonzero((owners == jax.process_index()).any(axis=1))
    first, size, total = int(mine[0]), len(mine), len(owners)
    if total % size or first % size or not np.array_equal(mine, np.arange(first, first + size)):
        raise ValueError(
            f"mesh: this process holds the rows {mine.tolist()} of the data axis of {total}; "
            "expected an equal block for every process. Choose config.mesh.model so that it "
            "divides, or is a multiple of, the number of devices of a process."
        )
    return first // size, total // size


def shard_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's part of a batch, see `batch_share` -> arrays split over the data axis."""
    sharding = NamedSharding(mesh, BATCH)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
