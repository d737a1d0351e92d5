"""Parameters of model directories as Orbax checkpoints."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax.utils.endings import closing_all, patient_event_loops
from aim_jax.utils.names import reason_of
from aim_jax.weights.parts import StoredPart
from aim_jax.weights.pretrained import flatten

CHUNK_BYTES = 8 * 2**20  # size of a write
LARGE_BYTES = 64 * 2**20  # larger arrays are read one at a time


def save_params(path: Path, params: dict) -> None:
    """Write parameters as a checkpoint, whose files name no path of this machine."""
    # An array is packed in memory before it is written, so large arrays are written in chunks.
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    args = ocp.args.PyTreeSave(
        params, save_args=save_args, ocdbt_target_data_file_size=2 * CHUNK_BYTES
    )
    with patient_event_loops(), closing_all() as at_end:
        checkpointer = _checkpointer(alone=True)
        at_end(checkpointer.close)
        checkpointer.save(path, args=args)
    for file in path.rglob("commit_success.txt"):
        file.write_text("")  # Orbax writes the local path there, which should stay private


def open_params(path: Path) -> StoredPart:
    """Open the parameters of a checkpoint.

    Raises:
      ValueError: It is damaged.
    """
    with _checkpointer() as checkpointer, _unreadable(path):
        stored = checkpointer.metadata(path.absolute()).item_metadata
        if stored is None:
            raise ValueError("its metadata is damaged or missing")
        shapes = {name: tuple(array.shape) for name, array in flatten(stored.tree).items()}
        size = sum(file.stat().st_size for file in path.rglob("*"))
    return StoredPart(path, shapes, size, functools.partial(_load, path))


def _load(path: Path, abstract: dict, as_stored: bool) -> dict:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore_args = (
        ocp.RestoreArgs(restore_type=np.ndarray)
        if as_stored
        else ocp.ArrayRestoreArgs(dtype=jnp.float32, sharding=sharding)
    )
    restored: dict = {}
    with _checkpointer() as checkpointer:
        for group in _large_alone(flatten_dict(abstract)):
            args = ocp.args.PyTreeRestore(
                unflatten_dict(group),
                restore_args=unflatten_dict(dict.fromkeys(group, restore_args)),
                partial_restore=True,
            )
            with _unreadable(path):
                restored |= flatten_dict(checkpointer.restore(path.absolute(), args=args))
            _give_back_freed_memory()
    return unflatten_dict(restored)


def _checkpointer(alone: bool = False) -> ocp.Checkpointer:
    """Return a checkpointer of parameter trees that holds no second copy of them.

    Orbax copies NumPy arrays before it saves them, because they usually change during a save. With
    `alone`, the first process works without waiting for others.
    """
    processes = {"primary_host": 0, "active_processes": {0}} if alone else {}
    options = ocp.options.MultiprocessingOptions(**processes, barrier_sync_key_prefix="model")
    # One process writes. It takes replicated arrays from one device instead of a part from each,
    # for which Orbax would compile and run a slice per array and device.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, arrays),
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=handlers, multiprocessing_options=options
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Raise ValueError in one line for the many kinds of errors of Orbax, TensorStore and JAX."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, OSError):  # of the device or the disk, not of the content
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {reason_of(error)}") from error


def _give_back_freed_memory() -> None:
    """Return freed memory to the system; glibc keeps it otherwise, which adds up over arrays."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _large_alone(leaves: dict) -> Iterator[dict]:
    """Yield groups of arrays to restore together: large ones alone, largest first, then the rest.

    An array needs its size a second time while it is unpacked, so large ones do not share a group.
    """
    large = {k: x for k, x in leaves.items() if x.size * x.dtype.itemsize > LARGE_BYTES}
    for key in sorted(large, key=lambda key: -large[key].size):
        yield {key: large[key]}
    yield {k: x for k, x in leaves.items() if k not in large}
