"""Parameters of model directories as safetensors, the form of models on hubs.

All parts of a model are in `model.safetensors`. A larger model is in files of at most 5 GB, and
`model.safetensors.index.json` names the file of each array, as the hub's own libraries write it.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from aim_jax.utils.files import write_json
from aim_jax.weights.formats.file_names import SAFETENSORS
from aim_jax.weights.formats.tensors import LazyTensor
from aim_jax.weights.parts import PARTS, StoredPart
from aim_jax.weights.pretrained import flatten

INDEX = f"{SAFETENSORS}.index.json"
MOST_BYTES = 5 * 10**9  # of a file


def save_params(directory: Path, params: Mapping[str, dict], most: int = MOST_BYTES) -> list[str]:
    """Write the parameters of the parts of a model; return the names of the files.

    Args:
      directory: Directory to write to.
      params: Parameters by the name of their part.
      most: Largest number of bytes of a file; an array is never split.
    """
    from aim_jax.weights.formats.files import write_safetensors  # not needed for training

    arrays = flatten(dict(params))
    groups: list[dict] = [{}]
    sizes = [0]
    for name, array in sorted(arrays.items()):
        if groups[-1] and sizes[-1] + array.nbytes > most:
            groups.append({})
            sizes.append(0)
        groups[-1][name] = array
        sizes[-1] += array.nbytes
    stem, _, ending = SAFETENSORS.partition(".")
    count = len(groups)
    names = [f"{stem}-{i:05d}-of-{count:05d}.{ending}" for i in range(1, count + 1)]
    if count == 1:
        names = [SAFETENSORS]
    for name, group in zip(names, groups, strict=True):
        shapes = {key: (array.shape, np.dtype(array.dtype)) for key, array in group.items()}
        tensors = ((key, np.asarray(array)) for key, array in group.items())
        write_safetensors(directory / name, shapes, tensors, {"format": "aim_jax"})
    if count > 1:
        places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        write_json(directory / INDEX, index)
        names.append(INDEX)
    return names


def open_params(directory: Path, in_several: bool = False) -> dict[str, StoredPart]:
    """Open the parameters in the files of a directory, by the name of their part.

    Args:
      directory: The directory.
      in_several: Read the files of the index, instead of the single one.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is damaged, or holds what belongs to no part.
    """
    from aim_jax.weights.formats.files import open_weights  # not needed for training

    opened = open_weights(directory / (INDEX if in_several else SAFETENSORS))
    by_part: dict[str, dict[str, LazyTensor]] = {part: {} for part in PARTS}
    for key, tensor in opened.tensors.items():
        part, _, name = key.partition(".")
        if part not in by_part:
            raise ValueError(f"{directory}: {key} belongs to no part of a model.")
        by_part[part][name] = tensor
    return {
        part: StoredPart(
            directory,
            {name: tensor.shape for name, tensor in tensors.items()},
            sum(math.prod(x.shape) * x.dtype.itemsize for x in tensors.values()),
            functools.partial(_load, tensors),
        )
        for part, tensors in by_part.items()
        if tensors
    }


def _load(tensors: Mapping[str, LazyTensor], abstract: dict, as_stored: bool) -> dict:
    device = jax.local_devices()[0]

    def read(tensor: LazyTensor) -> np.ndarray | jax.Array:
        array = np.asarray(tensor)
        return array if as_stored else jax.device_put(array.astype(np.float32, copy=False), device)

    arrays = {tuple(name.split(".")): read(tensors[name]) for name in flatten(abstract)}
    return unflatten_dict(arrays)
