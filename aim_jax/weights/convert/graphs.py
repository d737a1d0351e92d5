"""Reading of constants in stored graphs, without the frameworks that wrote them.

TensorFlow's frozen GraphDef and ONNX are protocol buffers. A TorchScript archive is a zip file with
a pickle, of which only names, numbers and tensors are accepted. No code in a file is executed.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aim_jax.weights.convert.errors import WeightsError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FLOAT = 1  # in the enumerations of both TensorFlow and ONNX


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of every field of a protocol buffer; a value is an int or bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(message) or shift > 63:
                raise ValueError("truncated")
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == VARINT:
            yield number, varint()
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(wire)
        if length is None:
            if wire != BYTES:
                raise ValueError(f"has a field of unknown wire type {wire}")
            length = varint()
        if length > len(message) - position:
            raise ValueError("truncated")
        yield number, message[position : position + length]
        position += length


def _grouped(message: memoryview) -> dict[int, list]:
    values: dict[int, list] = {}
    for number, value in fields(message):
        values.setdefault(number, []).append(value)
    return values


def _text(values: list) -> str:
    return bytes(values[-1]).decode()


def _numbers(values: list) -> Iterator[int]:
    """Yield the integers of a repeated field, packed or not."""
    for value in values:
        if isinstance(value, int):
            yield value
        else:  # packed varints, each of which is read as the value of a field 0
            remaining = bytes(value)
            while remaining:
                length = next(i for i, byte in enumerate(remaining) if byte < 128) + 1
                yield from _numbers([next(fields(memoryview(b"\0" + remaining[:length])))[1]])
                remaining = remaining[length:]


def _floats(name: str, shape: tuple[int, ...], raw: list) -> np.ndarray:
    flat = np.frombuffer(b"".join(bytes(part) for part in raw), "<f4")
    if flat.size != math.prod(shape):
        raise ValueError(f"{name} has {flat.size} numbers, but its shape is {shape}")
    return flat.reshape(shape)


def read_graphdef(path: Path) -> dict[str, np.ndarray]:
    """Read the float32 constants of a frozen TensorFlow graph, by node name."""

    def constants(graph: memoryview) -> Iterator[tuple[str, np.ndarray]]:
        for node in map(_grouped, _grouped(graph).get(1, [])):
            if _text(node.get(2, [b""])) != "Const":
                continue
            name = _text(node[1])
            attributes = {_text(a[1]): _grouped(a[2][-1]) for a in map(_grouped, node.get(5, []))}
            tensor = _grouped(attributes["value"][8][-1])
            if tensor.get(1) != [FLOAT]:
                continue
            dims = _grouped(tensor[2][-1]).get(2, []) if 2 in tensor else []
            shape = tuple(_grouped(dim).get(1, [0])[-1] for dim in dims)
            yield name, _floats(name, shape, tensor.get(4) or tensor.get(5, []))

    return _read(path, "a frozen TensorFlow graph", constants)


def read_onnx(path: Path) -> dict[str, np.ndarray]:
    """Read the float32 initializers of an ONNX model.

    Unnamed initializers of convolutions and matrix products are called `#i.weight` and `#i.bias`,
    where i is the number of the operation in the order of the graph.
    """

    def initializers(model: memoryview) -> Iterator[tuple[str, np.ndarray]]:
        graph = _grouped(_grouped(model)[7][-1])
        arrays = {}
        for tensor in map(_grouped, graph.get(5, [])):
            name = _text(tensor[8])
            if 13 in tensor:
                raise ValueError("keeps its tensors in another file; save it as one file")
            if tensor.get(2) == [FLOAT]:
                shape = tuple(_numbers(tensor.get(1, [])))
                arrays[name] = _floats(name, shape, tensor.get(9) or tensor.get(4, []))
        nodes = [_grouped(node) for node in graph.get(1, [])]
        products = [node for node in nodes if _text(node[4]) in ("Conv", "Gemm", "MatMul")]
        for number, node in enumerate(products):
            names = [bytes(name).decode() for name in node.get(1, [])]
            for name, part in zip(names[1:], ("weight", "bias"), strict=False):
                if name in arrays:
                    yield f"#{number}.{part}", arrays[name]
        yield from arrays.items()

    return _read(path, "an ONNX model", initializers)


def _read(
    path: Path, kind: str, parse: Callable[[memoryview], Iterator[tuple[str, np.ndarray]]]
) -> dict[str, np.ndarray]:
    try:
        return dict(parse(memoryview(path.read_bytes())))
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{path}: is not {kind} ({error!r}).") from None


class _Module:
    """Stand-in for any class of a TorchScript archive, with attributes and nothing else."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


class _Reader(pickle.Unpickler):
    """Unpickler that accepts only tensors, containers and `_Module`s."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        self._archive = archive
        self._root = root
        super().__init__(io.BytesIO(self._entry("data.pkl")))

    def _entry(self, name: str) -> bytes:
        name = f"{self._root}/{name}"
        if self._archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, which torch does not do")
        return self._archive.read(name)

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        if module == "torch.jit._pickle":
            return lambda values, *_: values
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, storage, key, *_ = pid
        dtypes = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "LongStorage": "<i8",
                  "HalfStorage": "<f2"}  # fmt: skip
        return np.frombuffer(self._entry(f"data/{key}"), dtypes[storage])


def _tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    # A view made by an earlier call is not a storage: its size is not that of its memory.
    if not (isinstance(storage, np.ndarray) and storage.ndim == 1 and storage.flags.c_contiguous):
        raise ValueError("a tensor does not refer to a storage of the archive")
    end = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if min((offset, *shape, *strides), default=0) < 0 or (count and max(end, count) > storage.size):
        raise ValueError("a tensor is larger than its storage")
    steps = tuple(s * storage.itemsize for s in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(shape), steps, writeable=False)


def is_torchscript(path: Path) -> bool:
    """Return whether a zip file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(re.fullmatch(r"[^/]+/constants\.pkl", n) for n in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_torchscript(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a TorchScript archive, by the path of their attributes."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            content = _Reader(archive, root).load()
        if not isinstance(content, _Module):
            raise ValueError("it holds no module")
        return dict(_tensors(content))
    except Exception as error:  # a hostile pickle can make a loader raise anything
        raise WeightsError(
            f"{path}: is not a TorchScript archive of tensors ({error}). None of its code was run."
        ) from None


def _tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, np.ndarray):
            yield prefix + name, value
