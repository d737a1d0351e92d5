"""Mesh and shardings: one table maps the logical axes of parameters and activations to mesh axes.

- Data parallelism splits batches over "data", and over "slice" where a slower network connects
  several slices of a pod.
- FSDP also splits the embed axis of parameters over "data".
- Tensor parallelism splits heads, inner channels and vocabulary over "model".

The sequence is not split.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.linen.spmd import RulesFallback
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes
Axes = tuple[str | None, ...]  # logical axes of an array
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data"),
    "length": (),
    "vocab": ("model",),
    "inner": ("model",),
    "heads": ("model",),
    "embed": (),  # of parameters; ("data",) with FSDP
    "layers": (),
    "state": (),
    "dt_rank": (),
    "position": (),
    "class": (),
    "caption_vocab": (),
    "caption_feature": (),
    "adaln_group": (),
    "adaln_part": (),
    "modulation": (),
}


def axis_rules(mesh: Mesh, fsdp: bool = False) -> dict[str, tuple[str, ...]]:
    """Return `RULES` restricted to the axes of a mesh.

    Args:
      fsdp: shard the embed axis of parameters over "data", within slices and never across them.
    """
    rules = RULES | ({"embed": ("data",)} if fsdp else {})
    return {name: tuple(a for a in axes if a in mesh.shape) for name, axes in rules.items()}


def make_mesh(
    data: int = -1,
    model: int = 1,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a mesh ("data", "model"), or ("slice", "data", "model") over several slices.

    Neighbours along "model" are devices of one process, which share the fastest links. JAX numbers
    the chips of some slices across hosts, so the order is not that of the device ids.

    Args:
      data, model, slices: sizes of the axes. data=-1 uses all devices that the others leave.
      devices: devices of the mesh, by default all.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or `slices` is not the
        number of slices that the devices belong to.
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
    # Only on TPUs: on other platforms JAX numbers hosts as slices. Without an index, TPU devices
    # belong to one slice.
    indices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(indices) > 1:
        if len(indices) != slices:
            raise ValueError(
                f"mesh: slices={slices}, but the devices belong to {len(indices)} slices; set "
                f"config.mesh.slices={len(indices)}."
            )
        devices = sorted(devices, key=lambda d: (d.slice_index, d.process_index, d.id))
    axes = {"slice": slices, "data": data, "model": model}
    if slices == 1:
        del axes["slice"]
    grid = np.asarray(devices).reshape(*axes.values())
    return Mesh(grid, (*axes,), axis_types=(AxisType.Auto,) * len(axes))


def partition_specs(boxed: Any, rules: Rules) -> Any:
    """Return the PartitionSpec of every leaf of a tree boxed with logical axes.

    Args:
      boxed: tree whose leaves are boxed with logical axes; unboxed leaves are replicated.
      rules: from `axis_rules`.

    Raises:
      ValueError: a logical axis has no rule (it would be replicated silently).
    """

    def mesh_axis(axis: str | None, path: tuple) -> str | tuple[str, ...] | None:
        if axis is None:
            return None
        if axis not in rules:
            raise ValueError(
                f"sharding: {jax.tree_util.keystr(path)} has the logical axis {axis!r}, for which "
                f"the rules have no entry; expected one of {sorted(rules)}."
            )
        return _entry(rules[axis])

    def spec(path: tuple, leaf: Any) -> PartitionSpec:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return PartitionSpec()
        return PartitionSpec(*(mesh_axis(axis, path) for axis in leaf.names))

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(spec, boxed, is_leaf=is_box)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """Return mesh axes as an entry of a PartitionSpec."""
    return axes[0] if len(axes) == 1 else axes or None


def shardings(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """Return the NamedSharding of every leaf of a (possibly abstract) boxed tree."""
    specs = partition_specs(boxed, rules)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an activation by logical axes; a no-op outside `sharded_jit`.

    Raises:
      ValueError: an axis has no rule.
    """
    return nn.with_logical_constraint(x, axes, fallback=RulesFallback.RAISE_ERROR)


def active_mesh() -> AbstractMesh | None:
    """Return the mesh that a `sharded_jit` function is traced for; None outside of one."""
    return jax.sharding.get_abstract_mesh() if nn.get_logical_axis_rules() else None


def mesh_parts(axis: str) -> int:
    """Return the number of parts that a logical axis is split into; 1 outside `sharded_jit`."""
    mesh = active_mesh()
    if mesh is None:
        return 1
    (entry,) = nn.logical_to_mesh_axes((axis,))
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def per_device(fn: Callable, arguments: Mapping[str, Axes], results: Sequence[Axes]) -> Callable:
    """Make every device call `fn` with its own parts; return `fn` itself outside `sharded_jit`.

    The compiler cannot partition custom kernels. `fn` must treat the entries along split axes
    independently of each other.

    Args:
      fn: function of a dictionary of arrays, some of which may be None; it returns a tuple.
      arguments: logical axes of the arrays, by name.
      results: logical axes of the results. All axes of the mesh must occur in each of them.
    """
    mesh = active_mesh()
    if mesh is None or mesh.size == 1:
        return fn
    specs = {name: nn.logical_to_mesh_axes(axes) for name, axes in arguments.items()}
    out_specs = tuple(map(nn.logical_to_mesh_axes, results))
    return jax.shard_map(fn, in_specs=(specs,), out_specs=out_specs, check_vma=False)


class ShardedFunction:
    """Jitted function that is traced with a mesh and rules set; see `sharded_jit`."""

    def __init__(self, jitted: Any, mesh: Mesh, rules: Rules):
        self._jitted = jitted
        self._mesh = mesh
        self._table = tuple((name, _entry(axes)) for name, axes in rules.items())

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(self._table):
            yield

    def __call__(self, *args: Any) -> Any:
        """Run the function."""
        with self._context():
            return self._jitted(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lower the function for concrete or abstract arguments."""
        with self._context():
            return self._jitted.lower(*args)


def sharded_jit(fn: Callable, mesh: Mesh, rules: Rules, **options: Any) -> ShardedFunction:
    """Jit a function so that it is traced with the mesh and rules that `constrain` needs."""
    return ShardedFunction(jax.jit(fn, **options), mesh, rules)


def create_sharded(make: Callable[[], Any], mesh: Mesh, rules: Rules) -> Any:
    """Run `make()` under jit so that every array is created sharded, and unbox the result.

    Args:
      make: function without arguments that returns a tree, possibly boxed.
      mesh: mesh of the arrays.
      rules: from `axis_rules`.
    """
    abstract = jax.eval_shape(make)
    return jax.jit(lambda: nn.unbox(make()), out_shardings=shardings(abstract, mesh, rules))()


def from_host(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return an array that every process has completely on the devices of a sharding."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def devices_of(tree: Any) -> list[jax.Device]:
    """Return the devices that hold the arrays of a tree; while tracing, the first device.

    The order is the mesh's, because JAX rejects a program over the same devices in another order.
    """
    leaf = jax.tree.leaves(tree)[0]
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return [jax.devices()[0]]
    if isinstance(leaf.sharding, NamedSharding):
        return list(leaf.sharding.mesh.devices.flat)
    return sorted(leaf.sharding.device_set, key=lambda device: device.id)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copy every array to every device of the mesh; all processes must pass the same values."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def to_host(tree: Any) -> Any:
    """Gather every array to every process as NumPy; all processes must call this."""

    def fetch(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, tree)


def local_rows(x: jax.Array) -> np.ndarray:
    """Return this process's part of an array that is split along its first axis."""
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Return (index, number) of the part of every batch that a process's devices hold.

    Processes that differ only along the other axes hold the same part.

    Args:
      mesh: mesh from `make_mesh`.
      process: index of the process, by default this one.

    Raises:
      ValueError: the processes' parts of the data axes are not equal contiguous blocks.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(-1, mesh.shape["model"])
    process = jax.process_index() if process is None else process
    rows = np.flatnonzero((owners == process).any(axis=1))
    first, size, total = int(rows[0]), len(rows), len(owners)
    if total % size or first % size or not np.array_equal(rows, np.arange(first, first + size)):
        raise ValueError(
            f"mesh: process {process} holds the rows {rows.tolist()} of {total} along the data "
            "axes; expected equal contiguous blocks for all processes. Set config.mesh.model to a "
            "divisor or a multiple of the number of devices per process."
        )
    return first // size, total // size


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(_entry(axis_rules(mesh)["batch"])))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raise ValueError unless devices and micro-batches can take equal parts of a batch."""
    parts = mesh.size // mesh.shape["model"]
    if batch_size % (parts * accumulate):
        raise ValueError(
            f"config.batch_size={batch_size} is not a multiple of {parts * accumulate}: {parts} "
            f"devices along the batch times config.accumulate={accumulate}."
        )


def shard_batch(batch: dict, mesh: Mesh) -> dict:
    """Make global arrays, split over the data axes, from this process's part of a batch.

    See `batch_share` for the part that a process must pass.
    """
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def micro_batches(batch: Any, parts: int) -> Any:
    """Reshape arrays (b, ...) to (parts, b / parts, ...).

    Part i has the examples i, i + parts, ..., so that every part has examples of all devices.
    """
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def joined(outputs: Any) -> Any:
    """Reshape outputs for `micro_batches` to arrays (b, ...) in the order of the batch."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)


def summed(sums: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """Compute `sums(batch)`, a tree of sums over examples, in `parts` micro-batches."""
    partial_sums = jax.lax.map(sums, micro_batches(batch, parts))
    return jax.tree.map(lambda x: x.sum(axis=0), partial_sums)
