"""Files of PyTorch, read and written without PyTorch.

`torch.save` writes a pickle and the raw numbers of its tensors: since version 1.6 in a zip file,
before that one after the other. TorchScript uses the same zip file. A pickle is a program that may
name any function of Python and call it, so this reader lets it name only what `_ALLOWED` lists:
tensors, plain containers and names. Anything else is refused, and nothing of it is run.
"""

import io
import itertools
import math
import operator
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from aim_jax.utils.names import reason_of
from aim_jax.weights.formats.errors import WeightsError
from aim_jax.weights.formats.tensors import LazyTensor

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"  # of the files before zip files
# First numbers of the files before zip files (torch/serialization.py).
LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)
ZIP_HEADER = 30  # bytes of the header of an entry, before its name
ALIGNMENT = 64  # of numbers in a zip file, as torch.save aligns them
MOST_AXES = 32  # of a tensor
MOST_KEY = 8  # parts of a key that is a tuple

# Storage classes of torch, and the names of its dtypes.
DTYPES = {
    "Double": ("float64", np.float64),
    "Float": ("float32", np.float32),
    "Half": ("float16", np.float16),
    "BFloat16": ("bfloat16", ml_dtypes.bfloat16),
    "Long": ("int64", np.int64),
    "Int": ("int32", np.int32),
    "Short": ("int16", np.int16),
    "Char": ("int8", np.int8),
    "Byte": ("uint8", np.uint8),
    "Bool": ("bool", np.bool_),
}
OF_STORAGE = {f"{name}Storage": np.dtype(dtype) for name, (_, dtype) in DTYPES.items()}
OF_NAME = {f"torch.{name}": np.dtype(dtype) for name, dtype in DTYPES.values()}
# Other dtypes, and schemes of quantization.
OTHER_NAMES = re.compile(r"torch\.(?:complex|float\d|u?int\d|bits\d|qu?int\d|per_)\w*")
STORAGE_OF = {dtype: name for name, dtype in OF_STORAGE.items()}


class UnsupportedTensor(NamedTuple):
    """A tensor of a kind that no weights here have: sparse, quantized, complex, repeated, ..."""

    kind: str


class Module:
    """Stand-in for a module of TorchScript, with attributes and nothing else."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


def load_torch(path: Path) -> Any:
    """Return the content of a file of torch.save, with a `LazyTensor` for every tensor.

    Tensors of other kinds are `UnsupportedTensor`. No code of the file is run.

    Raises:
      WeightsError: The file is damaged, or holds more than tensors and plain containers.
    """
    with path.open("rb") as file:
        zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if zipped:
        check_zip(path)
    try:
        return _load_zip(path, scripted=False) if zipped else _load_legacy(path)
    except _RefusedError as error:
        raise WeightsError(
            f"{path}: is refused, because it holds {reason_of(error)} beside tensors, which could "
            "run code when loaded; save the tensors alone (torch.save(model.state_dict(), FILE)) "
            "or as safetensors. None of its code was run."
        ) from None
    except Exception as error:  # a damaged or hostile pickle can make the loader raise anything
        raise WeightsError(
            f"{path}: is damaged, or not a file of torch.save ({reason_of(error)[:300]}). None of "
            "its code was run."
        ) from None


def is_torchscript(path: Path) -> bool:
    """Return whether a zip file is a TorchScript archive; raise the errors of `check_zip`."""
    check_zip(path)
    with zipfile.ZipFile(path) as archive:
        return any(re.fullmatch(r"[^/]+/constants\.pkl", n) for n in archive.namelist())


def read_torchscript(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a TorchScript archive, by the path of their attributes.

    Raises:
      WeightsError: The file is damaged, or holds more than modules and tensors.
    """
    check_zip(path)
    try:
        content = _load_zip(path, scripted=True)
        if not isinstance(content, Module):
            raise ValueError("it holds no module")
        tensors = dict(_tensors_of(content, set()))
        check_size(path, tensors)
        return {name: np.asarray(tensor) for name, tensor in tensors.items()}
    except WeightsError:
        raise
    except Exception as error:  # a damaged or hostile pickle can make the loader raise anything
        raise WeightsError(
            f"{path}: is not a TorchScript archive of tensors ({reason_of(error)[:300]}). None of "
            "its code was run."
        ) from None


def _tensors_of(
    module: Module, seen: set[int], prefix: str = ""
) -> Iterator[tuple[str, LazyTensor]]:
    """Yield the tensors of a module by name; a module under two names counts once."""
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Module) and id(value) not in seen:
            yield from _tensors_of(value, seen, f"{prefix}{name}.")
        elif isinstance(value, LazyTensor):
            yield prefix + name, value


def check_size(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Refuse tensors that are far larger than their file, as views of the same numbers can be.

    Views may repeat a little stored data: an output matrix tied to the embedding is a view.

    Raises:
      WeightsError: They are.
    """
    stored = path.stat().st_size
    if sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values()) > 2 * stored:
        raise WeightsError(
            f"{path}: declares more numbers than its {stored:,} bytes hold: many views of the same "
            "numbers."
        )


def check_zip(path: Path) -> None:
    """Refuse zip files that torch.save would not write: compressed, damaged, with duplicates.

    Raises:
      WeightsError: It is such a file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    # zipfile raises NotImplementedError for versions of the format that it cannot read.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise WeightsError(
            f"{path}: is not a complete zip file ({error}); download or copy it again."
        ) from None
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise WeightsError(f"{path}: holds several entries of the same name.")
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise WeightsError(f"{path}: holds compressed entries, which torch.save does not write.")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise WeightsError(f"{path}: declares entries larger than the file.")


# Files


def _load_zip(path: Path, scripted: bool) -> Any:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {entry.filename: entry for entry in archive.infolist()}
        root = _root(entries)
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        content = archive.read(f"{root}data.pkl")
        places = {
            name.removeprefix(f"{root}data/"): _place(file, entry)
            for name, entry in entries.items()
            if name.startswith(f"{root}data/")
        }
    reader = _Reader(path, io.BytesIO(content), places, scripted)
    result = reader.load()
    reader.check_tensors()
    return result


def _root(names: Iterable[str]) -> str:
    """Return the folder inside a zip file, with its slash."""
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if not roots:
        raise ValueError("it holds no data.pkl")
    return min(roots, key=len)


def _place(file: BinaryIO, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return first byte and size of the content of an entry."""
    file.seek(entry.header_offset + ZIP_HEADER - 4)
    lengths = struct.unpack("<HH", file.read(4))  # of the name and of further fields
    return entry.header_offset + ZIP_HEADER + sum(lengths), entry.file_size


def _load_legacy(path: Path) -> Any:
    """Load a file of torch.save before zip files: pickles, then sizes and numbers by turns."""
    places: dict[str, tuple[int, int]] = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        start = tuple(_Reader(path, file, places).load() for _ in LEGACY_START)
        if start != LEGACY_START:
            raise ValueError("it does not start as torch.save does")
        system = _Reader(path, file, places).load()
        if not isinstance(system, dict) or not system.get("little_endian"):
            raise ValueError("its numbers are big-endian")
        reader = _Reader(path, file, places)
        result = reader.load()
        for key in _Reader(path, file, places).load():
            if not isinstance(key, str):
                raise ValueError("a storage is not named as torch does")
            (count,) = struct.unpack("<q", file.read(8))
            itemsize = reader.itemsizes.get(key, 1)
            place = file.tell(), count * itemsize
            if count < 0 or sum(place) > size:
                raise ValueError(f"storage {key} is incomplete")
            places[key] = place
            file.seek(sum(place))
    reader.check_tensors()
    return result


# Pickles


class _RefusedError(Exception):
    """A pickle that holds more than tensors; its message names the refused type."""


class _Function:
    """A function that a pickle may call. Attributes of a plain one could be set by a pickle."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a function")


class _Dict(dict):
    """Stand-in for the dictionaries of collections; their attributes are left out."""

    def __init__(self, content: Any = ()):
        pairs = list(content.items() if isinstance(content, dict) else content)
        super().__init__((_hashed(key), value) for key, value in pairs)

    def __setstate__(self, state: Any) -> None:
        pass


class _Namespace(Module):
    """Stand-in for argparse.Namespace, in which programs store their arguments."""


class _Storage(NamedTuple):
    """Numbers that tensors are views of; the dtype is None if NumPy has none like it."""

    key: str
    dtype: np.dtype | None
    kind: str
    length: int


def _unsupported(kind: str) -> _Function:
    return _Function(lambda *_: UnsupportedTensor(kind))


def _hashed(value: Any, parts: int = MOST_KEY) -> Any:
    """Return a key of a dictionary or an element of a set.

    The hash of tuples in tuples can take time and stack without end, so they are refused.
    """
    plain = str | bytes | int | float | complex | None
    if isinstance(value, tuple) and len(value) <= parts:
        return tuple(_hashed(part, 0) for part in value)
    if not isinstance(value, plain):
        raise ValueError(f"a key is a {type(value).__name__}")
    return value


def _default_dict(_factory: Any = None, content: Any = ()) -> _Dict:
    return _Dict(content)


def _set(elements: Any = ()) -> set:
    return {_hashed(element) for element in list(elements)}


def _encode(text: str, encoding: str = "latin-1") -> bytes:
    """Return bytes, which a pickle of protocol 2 holds as text."""
    if not isinstance(text, str) or encoding not in ("latin-1", "latin1"):
        raise ValueError("bytes are not written as pickle does")
    return text.encode("latin-1")


def _device(kind: str, index: int = 0) -> str:
    if not (isinstance(kind, str) and isinstance(index, int)):
        raise ValueError("a device is not described as torch does")
    return f"{kind}:{index}"


_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "collections.Counter": _Dict,
    "collections.defaultdict": _Function(_default_dict),
    "argparse.Namespace": _Namespace,
    "builtins.set": _Function(_set),
    "builtins.complex": _Function(complex),
    "builtins.bytearray": _Function(_encode),
    "_codecs.encode": _Function(_encode),
    **{f"builtins.{name}": name for name in ("list", "dict", "int", "float")},  # of defaultdict
    "torch.Size": _Function(tuple),
    "torch.device": _Function(_device),
    "torch.serialization._get_layout": _Function(lambda name: name),
    "torch.nn.parameter.Parameter": _unsupported("Parameter"),
    "torch.Tensor": _unsupported("Tensor"),
    "torch._utils._rebuild_parameter": _Function(lambda tensor, *_: tensor),
    "torch._utils._rebuild_parameter_with_state": _Function(lambda tensor, *_: tensor),
    "torch._tensor._rebuild_from_type_v2": _Function(
        lambda function, _type, arguments, _state: function(*arguments)
    ),
    "torch._utils._rebuild_sparse_tensor": _unsupported("sparse"),
    "torch._utils._rebuild_nested_tensor": _unsupported("nested"),
    "torch._utils._rebuild_qtensor": _unsupported("quantized"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unsupported("meta"),
}
# Functions of TorchScript that give a type to a list.
_TYPED_LISTS = frozenset({"build_intlist", "build_doublelist", "build_boollist",
                          "build_tensorlist", "restore_type_tag"})  # fmt: skip


_Loader: Any = pickle._Unpickler  # type checkers do not know its stack


class _Reader(_Loader):
    """Reads one pickle of a file of torch; see the module.

    The loader in Python, whose steps can be changed: the one in C makes a list as long as the
    largest number that a pickle gives an object, and takes keys of any depth.

    Args:
      path: The file.
      stream: Where the pickle starts.
      places: First byte and size of every storage in the file by key; needed once tensors are read.
      scripted: Allow modules of TorchScript.
    """

    dispatch: ClassVar[dict] = dict(_Loader.dispatch)

    def __init__(
        self,
        path: Path,
        stream: BinaryIO,
        places: Mapping[str, tuple[int, int]],
        scripted: bool = False,
    ):
        self.itemsizes: dict[str, int] = {}
        self._path = path
        self._places = places
        self._scripted = scripted
        self._storages: set[_Storage] = set()
        super().__init__(stream, encoding="utf-8")

    def _check_pair(self) -> None:
        _hashed(self.stack[-2])
        super().load_setitem()

    def _check_pairs(self) -> None:
        for key in self.stack[::2]:  # the items since the last mark
            _hashed(key)
        super().load_setitems()

    def _check_elements(self) -> None:
        for element in self.stack:
            _hashed(element)
        super().load_additems()

    def _refuse(self) -> None:
        raise ValueError("it holds an opcode that torch.save does not write")

    dispatch[pickle.SETITEM[0]] = _check_pair
    dispatch[pickle.SETITEMS[0]] = _check_pairs
    dispatch[pickle.ADDITEMS[0]] = _check_elements
    for opcode in (pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER):
        dispatch[opcode[0]] = _refuse

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 writes it
        full = f"{module}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if full in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return _Function(self._tensor)
        if full == "torch._utils._rebuild_tensor_v3":
            return _Function(self._tensor_of_dtype)
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            return name
        if full in OF_NAME or OTHER_NAMES.fullmatch(full):
            return full  # as text, which runs nothing
        if self._scripted and module.split(".")[0] == "__torch__":
            return Module
        if self._scripted and module == "torch.jit._pickle" and name in _TYPED_LISTS:
            return _Function(lambda values, *_: values)
        raise _RefusedError(full)

    def persistent_load(self, pid: tuple) -> _Storage:
        _, kind, key, _, count, *view = pid
        if any(part is not None for part in view):
            raise ValueError("it holds views of storages, as torch 0.x wrote them")
        if not (isinstance(kind, str) and isinstance(key, str) and type(count) is int):
            raise ValueError("a storage is not described as torch does")
        dtype = np.dtype(np.uint8) if kind == "UntypedStorage" else OF_STORAGE.get(kind)
        self.itemsizes[key] = dtype.itemsize if dtype else _other_itemsize(kind)
        return _Storage(key, dtype, kind, count)

    def _tensor_of_dtype(
        self, storage: _Storage, offset: int, shape: tuple, strides: tuple, _grad: Any, _hooks: Any,
        dtype: str, *_: Any,
    ) -> LazyTensor | UnsupportedTensor:  # fmt: skip
        known = OF_NAME.get(dtype) if isinstance(dtype, str) else None
        itemsize = known.itemsize if known else 1
        typed = _Storage(storage.key, known, dtype, storage.length // itemsize)
        return self._tensor(typed, offset, shape, strides)

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any
    ) -> LazyTensor | UnsupportedTensor:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor does not refer to a storage of the file")
        if storage.dtype is None:
            return UnsupportedTensor(storage.kind)
        numbers = (offset, *shape, *strides)
        is_shape = len(shape) == len(strides) <= MOST_AXES
        if not is_shape or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers):
            raise ValueError("the shape of a tensor is not one")
        count = math.prod(shape)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if count else 0
        if offset + extent > storage.length:
            raise ValueError("a tensor is larger than its storage")
        if count > storage.length:
            return UnsupportedTensor("repeated numbers")
        self._storages.add(storage)

        def read() -> np.ndarray:
            return self._read(storage, offset, tuple(shape), tuple(strides), extent)

        return LazyTensor(tuple(shape), storage.dtype, read)

    def check_tensors(self) -> None:
        """Check that the storages of all tensors are in the file, once the places are known."""
        for storage in self._storages:
            assert storage.dtype is not None
            _, size = self._places.get(storage.key, (0, -1))
            if storage.length * storage.dtype.itemsize > size:
                raise ValueError(f"storage {storage.key} declares more numbers than the file holds")

    def _read(
        self, storage: _Storage, offset: int, shape: tuple, strides: tuple, extent: int
    ) -> np.ndarray:
        assert storage.dtype is not None
        start, _ = self._places[storage.key]
        size = storage.dtype.itemsize
        with self._path.open("rb") as file:
            file.seek(start + offset * size)
            raw = np.fromfile(file, np.uint8, extent * size)
        if raw.size < extent * size:
            raise WeightsError(f"{self._path}: became shorter while it was read.")
        steps = tuple(size * s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
        view = np.lib.stride_tricks.as_strided(raw.view(storage.dtype), shape, steps)
        return np.ascontiguousarray(view).reshape(shape)


def _other_itemsize(kind: str) -> int:
    return {"ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "QInt32Storage": 4}.get(kind, 1)


# Writing


def write_torch(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    aliases: Mapping[str, str],
    nest: str | None,
) -> None:
    """Write a file as torch.save does, one tensor at a time.

    Args:
      path: File to write; the caller gives it its final name once it is complete.
      tensors: Tensors by key.
      aliases: Further keys, and the keys whose tensors they share.
      nest: Key of an outer dictionary that holds the tensors, or None for no nesting.
    """
    numbers = {key: str(number) for number, key in enumerate(tensors)}
    pairs = [*((key, key) for key in tensors), *aliases.items()]
    items = (_value(key) + _tensor_of(tensors[of], numbers[of]) for key, of in pairs)
    content = _dictionary(items)
    if nest is not None:
        content = _dictionary([_value(nest) + content])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.PROTO + b"\x02" + content + pickle.STOP)
        archive.writestr("archive/byteorder", "little")
        for key, tensor in tensors.items():
            entry = zipfile.ZipInfo(f"archive/data/{numbers[key]}")
            entry.file_size = math.prod(tensor.shape) * tensor.dtype.itemsize
            entry.extra = _padding(archive, entry)
            with archive.open(entry, "w") as file:
                file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _value(value: Any) -> bytes:
    """Return the opcodes of a plain value, without start and stop."""
    return pickle.dumps(value, 2)[2:-1]


def _dictionary(items: Iterable[bytes]) -> bytes:
    return pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS


def _tensor_of(tensor: LazyTensor, key: str) -> bytes:
    """Return the opcodes of a tensor that fills the storage `key`."""
    strides = list(itertools.accumulate(tensor.shape[:0:-1], operator.mul, initial=1))[::-1]
    storage = b"".join(
        [
            pickle.MARK,
            _value("storage"),
            _global("torch", STORAGE_OF[tensor.dtype]),
            *map(_value, (key, "cpu", math.prod(tensor.shape))),
            pickle.TUPLE + pickle.BINPERSID,
        ]
    )
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    view = (0, tensor.shape, tuple(strides[: len(tensor.shape)]), False)
    arguments = storage + b"".join(map(_value, view)) + hooks
    rebuild = _global("torch._utils", "_rebuild_tensor_v2")
    return rebuild + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _padding(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return a field for the header of the next entry, after which its numbers are aligned."""
    start = archive.start_dir + ZIP_HEADER + len(entry.filename.encode()) + 4
    length = -start % ALIGNMENT
    return struct.pack("<2sH", b"FB", length) + bytes(length)
