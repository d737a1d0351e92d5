"""Mesh and shardings: one table maps the logical axes of parameters and activations to mesh axes.

Data parallelism splits batches over "data" (and "slice", where slices of a pod are joined by a
slower network); FSDP splits the embed axis of parameters over "data" as well; tensor parallelism
splits heads, inner channels and vocabulary over "model". The sequence stays whole.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.linen.spmd import RulesFallback
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data"),
    "length": (),
    "vocab": ("model",),
    "inner": ("model",),
    "heads": ("model",),
    "embed": (),  # of parameters; with FSDP ("data",)
    "layers": (),
    "state": (),
    "dt_rank": (),
    "position": (),
    "class": (),
    "adaln_group": (),
    "adaln_part": (),
    "modulation": (),
}


def axis_rules(mesh: Mesh, fsdp: bool = False) -> dict[str, tuple[str, ...]]:
    """`RULES` for the axes that a mesh has.

    Args:
      fsdp: shard the embed axis of parameters over "data": inside a slice, never across slices.
    """
    rules = RULES | ({"embed": ("data",)} if fsdp else {})
    return {name: tuple(a for a in axes if a in mesh.shape) for name, axes in rules.items()}


def make_mesh(
    data: int = -1,
    model: int = 1,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh ('data', 'model') over all devices, or ('slice', 'data', 'model') over several slices.

    Neighbours along "model" are devices of one process, which share the fastest links. JAX numbers
    the chips of some slices across hosts, so the order is not that of the numbers.

    Args:
      data, model, slices: sizes; data = -1 takes what the others leave.
      devices: all by default.

    Raises:
      ValueError: the product is not the number of devices, or the slices are not whole ones.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = len(devices) // (model * slices)
    if slices * data * model != len(devices):
        raise ValueError(
            f"mesh: slices={slices} times data={data} times model={model} is "
            f"{slices * data * model}, but there are {len(devices)} devices; set config.mesh so "
            "that the product fits."
        )
    # JAX numbers the hosts of other platforms as if they were slices.
    found = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(found) > 1:  # devices without a number are of one slice
        if len(found) != slices:
            raise ValueError(
                f"mesh: slices={slices}, but the devices are of {len(found)} slices; set "
                f"config.mesh.slices={len(found)}."
            )
        devices = sorted(devices, key=lambda d: (d.slice_index, d.process_index, d.id))
    axes = {"slice": slices, "data": data, "model": model}
    if slices == 1:
        del axes["slice"]
    grid = np.asarray(devices).reshape(*axes.values())
    return Mesh(grid, (*axes,), axis_types=(AxisType.Auto,) * len(axes))


def partition_specs(boxed: Any, rules: Rules) -> Any:
    """PartitionSpec of every leaf of a tree boxed with logical axes; unboxed leaves replicate.

    Args:
      rules: from `axis_rules`.

    Raises:
      ValueError: a logical axis that the table does not name (it would replicate silently).
    """

    def mesh_axis(axis: str | None, path: tuple) -> str | tuple[str, ...] | None:
        if axis is None:
            return None
        if axis not in rules:
            raise ValueError(
                f"sharding: {jax.tree_util.keystr(path)} has the logical axis {axis!r}, for which "
                f"the rules have no entry; known are {sorted(rules)}."
            )
        return _entry(rules[axis])

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return PartitionSpec()
        return PartitionSpec(*(mesh_axis(axis, path) for axis in leaf.names))

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(spec, boxed, is_leaf=is_box)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Mesh axes as an entry of a PartitionSpec."""
    return axes[0] if len(axes) == 1 else axes or None


def shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedSharding of every leaf of a (possibly abstract) boxed tree."""
    specs = partition_specs(boxed, rules)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says by logical axes how an activation is sharded; without `sharded_jit` it changes nothing.

    Raises:
      ValueError: an axis without a rule.
    """
    return nn.with_logical_constraint(x, axes, fallback=RulesFallback.RAISE_ERROR)


class ShardedFunction:
    """A jitted function whose traces know the mesh and the rules; see `sharded_jit`."""

    def __init__(self, jitted: Any, mesh: Mesh, rules: Rules):
        self._jitted = jitted
        self._mesh = mesh
        self._table = tuple((name, _entry(axes)) for name, axes in rules.items())

    @contextlib.contextmanager
    def _known(self) -> Iterator[None]:
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(self._table):
            yield

    def __call__(self, *args: Any) -> Any:
        """Runs the function."""
        with self._known():
            return self._jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers the function for arguments that may be abstract."""
        with self._known():
            return self._jitted.lower(*args)


def sharded_jit(fn: Callable, mesh: Mesh, rules: Rules, **options: Any) -> ShardedFunction:
    """`jax.jit` whose traces know the mesh and the rules, so that `constrain` acts."""
    return ShardedFunction(jax.jit(fn, **options), mesh, rules)


def create_sharded(make: Callable[[], Any], mesh: Mesh, rules: Rules) -> Any:
    """Runs `make()` under jit so that every array is born sharded, and unboxes the result.

    Args:
      make: a function without arguments that returns a tree, possibly boxed.
    """
    abstract = jax.eval_shape(make)
    return jax.jit(lambda: nn.unbox(make()), out_shardings=shardings(abstract, mesh, rules))()


def devices_of(tree: Any) -> list[jax.Device]:
    """The devices that hold the arrays of a tree, in their order; while tracing, the default one.

    The order is the mesh's: a program over the same devices in another order is an error of JAX.
    """
    leaf = jax.tree.leaves(tree)[0]
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return [jax.devices()[0]]
    if isinstance(leaf.sharding, NamedSharding):
        return list(leaf.sharding.mesh.devices.flat)
    return sorted(leaf.sharding.device_set, key=lambda device: device.id)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A whole copy of every array on every device of the mesh; every process gives the same."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """Every array whole, as NumPy, on every process; all of them must call this."""

    def fetch(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's part of an array that is split along its first axis."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of every batch a process's devices hold, and how many parts there are.

    Processes along the other axes hold the same part.

    Args:
      process: this one by default.

    Raises:
      ValueError: the processes' parts of the data axis are not equal blocks.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(-1, mesh.shape["model"])
    process = jax.process_index() if process is None else process
    mine = np.flatnonzero((owners == process).any(axis=1))
    first, size, total = int(mine[0]), len(mine), len(owners)
    if total % size or first % size or not np.array_equal(mine, np.arange(first, first + size)):
        raise ValueError(
            f"mesh: process {process} holds the rows {mine.tolist()} of the data axes of {total}; "
            "expected an equal block for every process. Choose config.mesh.model so that it "
            "divides, or is a multiple of, the number of devices of a process."
        )
    return first // size, total // size


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(_entry(axis_rules(mesh)["batch"])))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError where devices and micro-batches cannot have equal parts of a batch."""
    parts = mesh.size // mesh.shape["model"]
    if batch_size % (parts * accumulate):
        raise ValueError(
            f"config.batch_size={batch_size} is not a multiple of {parts * accumulate}: {parts} "
            f"devices along the batch times config.accumulate={accumulate}."
        )


def shard_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's part of a batch, see `batch_share` -> arrays split over the data axes."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def micro_batches(batch: Any, parts: int) -> Any:
    """Arrays (b, ...) -> (parts, b / parts, ...), each part with examples of all devices.

    Part i is examples i, i + parts, ...
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def joined(outputs: Any) -> Any:
    """What was computed for `micro_batches` -> arrays (b, ...) in the order of the batch."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)


def summed(sums: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """`sums(batch)`, a tree of sums over examples, of a batch taken in `parts` one by one."""
    found = jax.lax.map(sums, micro_batches(batch, parts))
    return jax.tree.map(lambda x: x.sum(axis=0), found)
