"""Reading of constants in stored graphs, without the frameworks that wrote them.

TensorFlow's frozen GraphDef and ONNX are protocol buffers. No code in a file is executed.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aim_jax.weights.formats.errors import WeightsError

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
