"""Files of torch.save and TorchScript, written without torch; and golden ones, written by torch.

`saved` pickles NumPy arrays as torch pickles its tensors. The golden files hold every dtype and
view, once in each format of torch.save; with PyTorch installed,

  python -m tests.torch_archives tests/golden/torch_files

writes them again, with the same arrays as safetensors.
"""

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(dtype): f"{name}Storage"
    for name, dtype in {
        "Double": np.float64, "Float": np.float32, "Half": np.float16, "Long": np.int64,
        "BFloat16": ml_dtypes.bfloat16,
    }.items()
}  # fmt: skip
MODULES = ("torch", "torch._utils", "__torch__")


def stand_in(module, name):
    """A class or function that is pickled as one of torch."""

    def never(*_):
        raise AssertionError("only its name is used")

    never.__module__, never.__qualname__, never.__name__ = module, name, name
    setattr(sys.modules[module], name, never)
    return never


class View:
    """A tensor that shows a part of an array, or what the array does not hold."""

    def __init__(self, array, offset, shape, strides):
        self.array, self.offset, self.shape, self.strides = array, offset, shape, strides


class Module:
    """A module of TorchScript, with parts as attributes."""


class Storage:
    def __init__(self, array):
        self.array = array


class Pickler(pickle.Pickler):
    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.stored = []
        self.rebuild = stand_in("torch._utils", "_rebuild_tensor_v2")

    def reducer_override(self, value):
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value).reshape(value.shape)
            strides = tuple(s // array.itemsize for s in array.strides)
            value = View(array.reshape(-1), 0, array.shape, strides)
        if isinstance(value, View):
            view = (value.offset, value.shape, value.strides)
            return self.rebuild, (Storage(value.array), *view, False, {})
        return NotImplemented

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        if not any(value.array is array for array in self.stored):
            self.stored.append(value.array)
        key = next(i for i, array in enumerate(self.stored) if array is value.array)
        kind = stand_in("torch", STORAGES[value.array.dtype])
        return ("storage", kind, str(key), "cpu", value.array.size)


def saved(content, path, scripted=False):
    """Write a zip file as torch.save writes it, or as TorchScript does."""
    kept = {name: sys.modules.get(name) for name in MODULES}
    sys.modules.update({name: types.ModuleType(name) for name in MODULES})
    original = Module.__module__
    try:
        Module.__module__ = "__torch__"
        sys.modules["__torch__"].Module = Module
        file = io.BytesIO()
        pickler = Pickler(file)
        pickler.dump(content)
    finally:
        Module.__module__ = original
        for name, module in kept.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", file.getvalue())
        archive.writestr("net/byteorder", b"little")
        if scripted:
            archive.writestr("net/constants.pkl", b"")
        for number, array in enumerate(pickler.stored):
            archive.writestr(f"net/data/{number}", array.tobytes())
    return path


def write_golden(directory):
    import argparse
    import collections

    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    dtypes = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"]
    dtypes += ["uint8", "bool"]
    tensors = {name: (3 * torch.randn(2, 3)).to(getattr(torch, name)) for name in dtypes}
    base = torch.randn(4, 3)
    tensors |= {
        "transposed": torch.randn(3, 4).t(), "part": torch.randn(9)[3:7], "base": base,
        "row": base[1], "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)).detach(),
    }  # fmt: skip
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "weights": tensors | {"parameter": torch.nn.Parameter(tensors["parameter"])},
        "linear": model.state_dict(), "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-4, sizes=[1, (2, 3)], device=torch.device("cuda:0")),
        "seen": collections.Counter("aab"), "dtype": torch.bfloat16, "size": torch.Size([1, 2]),
        "strange": {
            "repeated": torch.zeros(1).expand(100), "complex": torch.zeros(3, dtype=torch.cfloat),
        },
    }  # fmt: skip
    quantized = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    only_in_zip = {
        "sparse": torch.eye(3).to_sparse(), "meta": torch.zeros(3, device="meta"),
        "quantized": quantized, "float8": torch.zeros(4).to(torch.float8_e4m3fn),
        "uint16": torch.zeros(3, dtype=torch.uint16),
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(content, directory / "legacy.pt", _use_new_zipfile_serialization=False)
    content["strange"] |= only_in_zip
    torch.save(content, directory / "zip.pt")
    plain = tensors | {f"linear.{k}": v for k, v in model.state_dict().items()}
    save_file({k: v.clone().contiguous() for k, v in plain.items()}, directory / "all.safetensors")


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]))
