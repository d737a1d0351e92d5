"""Files of PyTorch weights, read tensor by tensor, and refused completely if any part is invalid.

A checkpoint may be larger than half of the memory, so this module never holds more than one tensor
of it. Files are untrusted, and nothing in them is run.
"""

import errno
import functools
import json
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aim_jax.utils.files import replacing
from aim_jax.utils.json_files import anything, dict_of, parse_json, read_json
from aim_jax.utils.logging import say
from aim_jax.utils.names import MOST_NAME, check_text, reason_of, short_list
from aim_jax.weights.formats import state_dicts, torch_files
from aim_jax.weights.formats.errors import WeightsError
from aim_jax.weights.formats.file_names import CONFIG, HUB_FILES
from aim_jax.weights.formats.tensors import LazyTensor
from aim_jax.weights.pretrained import flatten

MOST_FILE = 200  # characters of the name of a file in an index
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightFiles(NamedTuple):
    """An opened checkpoint.

    Attributes:
      tensors: Tensors by the key in the file.
      files: Files that hold the tensors.
      config: Content of the config.json beside them, or None.
      weights_key: Dotted name of the dictionary in a pickle that holds the tensors, or "".
    """

    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    config: dict | None = None
    weights_key: str = ""


def open_weights(path: str | os.PathLike, weights_key: str = "") -> WeightFiles:
    """Open weights without reading any tensor.

    Args:
      path: A .safetensors file; a file of torch.save (.bin, .pt, .pth); an index of several such
        files (*.index.json); or a directory that holds one of them under its usual name.
      weights_key: Dictionary of a pickle to read, with dots between nested names. By default a
        moving average if there is one ("ema"), else the model.

    Raises:
      FileNotFoundError: There is no such file.
      WeightsError: The file is invalid.
    """
    path = Path(path)
    if _kind(path) == "directory":
        candidates = [path / name for name in HUB_FILES if _kind(path / name, missing=True)]
        if not candidates:
            raise FileNotFoundError(
                f"{path}: holds no weights; expected one of {', '.join(HUB_FILES)}, or the path of "
                "the file itself."
            )
        path = candidates[0]
    # A config.json belongs to the weights only if they have one of the hub's names.
    config_file = path.parent / CONFIG
    belongs = path.name in HUB_FILES and _kind(config_file, missing=True)
    config = read_object(config_file) if belongs else None
    if path.name.endswith(".index.json"):
        return _open_index(path, weights_key)._replace(config=config)
    tensors, key = _open_file(path, weights_key)
    return WeightFiles(tensors, (path,), config, key)


def read_object(path: Path) -> dict:
    """Read the JSON object in a file; raise WeightsError if it is none, or repeats a name."""
    try:
        return read_json(path, dict_of(anything), "cannot be read", allow_nan=True)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def _kind(path: Path, missing: bool = False) -> str | None:
    """Return "file" or "directory"; or None if `missing` is allowed and the path does not exist."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if missing:
            return None
        raise FileNotFoundError(f"{path}: no such file or directory.") from None
    except OSError as error:
        reason = "is a symbolic link in a loop" if error.errno == errno.ELOOP else error.strerror
        raise WeightsError(f"{path}: {reason}.") from None
    except ValueError as error:  # a null character in the name
        raise WeightsError(f"{str(path)!r}: {error}.") from None
    if stat.S_ISDIR(mode):
        return "directory"
    if not stat.S_ISREG(mode):
        raise WeightsError(f"{path}: is neither a file nor a directory.")
    return "file"


def _open_file(path: Path, weights_key: str = "") -> tuple[dict[str, LazyTensor], str]:
    """Return the tensors of a file, and the name of the dictionary that holds them."""
    if _kind(path) == "directory":
        raise WeightsError(f"{path}: is a directory, expected a file of weights.")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        if weights_key:
            raise WeightsError(
                f"{path}: is a safetensors file, which holds no dictionaries to choose from with "
                f"--weights_key {weights_key}; --prefix chooses tensors by name."
            )
        return _open_safetensors(path), ""
    # The length of a safetensors header may start with the same byte as a pickle.
    if start.startswith((torch_files.ZIP_MAGIC, torch_files.PICKLE_MAGIC)):
        return _open_torch(path, weights_key)
    raise WeightsError(
        f"{path}: is neither a safetensors file nor one of torch.save (it starts with "
        f"{start[:8].hex(' ') or 'nothing'}). If a web page was saved in its place, download the "
        "file again."
    )


def _open_index(path: Path, weights_key: str) -> WeightFiles:
    """Open several files and the index that maps keys to files."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: has no weight_map, so it is not an index of weights.")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise WeightsError(f"{path}: names files outside its directory: {short_list(outside, 5)}.")
    for name in names:
        _check_key(path, name, MOST_FILE)
    missing = [name for name in names if not _kind(path.parent / name, missing=True)]
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(names)} files are missing: {short_list(missing, 5)}."
        )
    shards = {name: _open_file(path.parent / name, weights_key) for name in names}
    tensors = {}
    problems = []
    for name, (shard, _) in shards.items():
        for key, tensor in shard.items():
            if weight_map.get(key) != name:
                problems.append(f"{key}: in {name}, expected in {weight_map.get(key, 'no file')}")
            tensors[key] = tensor
    problems += [f"{key}: not in {name}" for key, name in weight_map.items() if key not in tensors]
    if problems:
        raise WeightsError(
            f"{path}: does not describe its files ({len(problems)} keys): {short_list(problems, 5)}"
        )
    return WeightFiles(tensors, tuple(path.parent / name for name in names))


# safetensors


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Open the tensors of a safetensors file.

    The library checks sizes and offsets; names are checked here. A tensor is read through a
    separate memory map, because the pages of a map stay in memory.
    """

    def damaged(reason: str) -> WeightsError:
        return WeightsError(
            f"{path}: is not a complete safetensors file ({reason}); download or copy it again."
        )

    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
            raise damaged(f"its header claims to have {length:,} bytes")
        header = file.read(length)
    try:
        parse_json(header, dict_of(anything))
    except ValueError as error:
        raise WeightsError(f"{path}, header: {error}") from None
    try:
        with safe_open(path, "numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            described = {k: (tuple(s.get_shape()), str(s.get_dtype())) for k, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise damaged(reason_of(error)) from None

    def read(key: str) -> np.ndarray:
        try:
            with safe_open(path, "numpy") as file:
                return np.array(file.get_tensor(key))
        except (SafetensorError, OSError) as error:
            raise damaged(reason_of(error)) from None

    unknown = [f"{k}: {dtype}" for k, (_, dtype) in described.items() if dtype not in DTYPES]
    if unknown:
        raise WeightsError(
            f"{path}: tensors of unsupported dtypes: {short_list(unknown, 5)}; "
            f"expected {', '.join(DTYPES)}."
        )
    return {
        key: LazyTensor(shape, DTYPES[dtype], functools.partial(read, key))
        for key, (shape, dtype) in described.items()
    }


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file one tensor at a time (the library needs all of them in memory).

    Args:
      path: File to write; the caller gives it its final name once it is complete.
      shapes: Shape and dtype by key, in the order of `tensors`.
      tensors: Pairs of key and array.
      metadata: Strings for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, (shape, dtype) in shapes.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        name = DTYPE_NAMES[np.dtype(dtype)]
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (key, array), (expected, (shape, dtype)) in zip(tensors, shapes.items(), strict=True):
            if (key, array.shape, array.dtype) != (expected, tuple(shape), dtype):
                raise ValueError(f"{key}: {array.dtype}{array.shape} does not match `shapes`.")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


# Files of torch


def read_tensors(path: Path, weights_key: str = "", prefix: str = "") -> dict[str, np.ndarray]:
    """Read all tensors of a small file by plain name.

    Args:
      path: The file.
      weights_key: See `open_weights`.
      prefix: See `state_dicts.plain_names`.

    Raises:
      FileNotFoundError, WeightsError: See `open_weights`.
    """
    opened = open_weights(path, weights_key).tensors
    plain = state_dicts.plain_names(opened, path, prefix)
    return {name: np.asarray(tensor) for name, (_, tensor) in plain.items()}


def save_tensors(params: dict, path: str | os.PathLike) -> Path:
    """Write nested dicts of arrays as safetensors, atomically."""
    with replacing(path) as partial:
        save_file({k: np.ascontiguousarray(v) for k, v in flatten(params).items()}, partial)
    return Path(path)


def _open_torch(path: Path, weights_key: str) -> tuple[dict[str, LazyTensor], str]:
    """Open the tensors of a file of torch.save; return them and the dictionary they are in."""
    chosen = _choose(path, torch_files.load_torch(path), weights_key)
    if chosen.others:
        say(
            f"{path}: took the weights under {chosen.key!r}; the file also holds "
            f"{', '.join(chosen.others)} (--weights_key chooses)"
        )
    tensors = _tensors(path, chosen.content)
    torch_files.check_size(path, tensors)
    return tensors, chosen.key


def _choose(path: Path, content: Any, weights_key: str) -> state_dicts.StateDict:
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{path}: expected tensors by name, alone or under names such as 'model' or "
            f"'state_dict'; got {type(content).__name__.strip('_').lower()}."
        )
    try:
        return state_dicts.choose(content, _is_tensor, weights_key)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}.") from None
    except RecursionError:
        raise WeightsError(f"{path}: its dictionaries are nested too deeply.") from None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, LazyTensor | torch_files.UnsupportedTensor)


def _tensors(path: Path, content: Mapping) -> dict[str, LazyTensor]:
    """Return the tensors of a dictionary, which must hold nothing else but bookkeeping."""
    tensors = {}
    wrong = []
    unsupported = []
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, LazyTensor):
            _check_key(path, key)
            tensors[key] = value
        elif isinstance(key, str) and isinstance(value, torch_files.UnsupportedTensor):
            unsupported.append(f"{key} ({value.kind})")
        elif key not in state_dicts.BOOKKEEPING or not isinstance(value, int | float | None):
            wrong.append(key if isinstance(key, str) else repr(key))
    if unsupported:
        raise WeightsError(f"{path}: unsupported kinds of tensors: {short_list(unsupported, 5)}.")
    if wrong or not tensors:
        problem = f"entries that are not tensors: {short_list(wrong, 5)}" if wrong else "no tensors"
        raise WeightsError(f"{path}: holds {problem}.")
    return tensors


def _check_key(path: Path, name: str, most: int = MOST_NAME) -> None:
    """Raise WeightsError if `check_text` refuses the name of a tensor or file."""
    try:
        check_text("name of a tensor or file", name, most)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
