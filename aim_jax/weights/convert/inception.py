"""Loading of the weights of the 2015 Inception network, from any of its common files."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aim_jax.models import inception
from aim_jax.weights.formats import graphs, torch_files
from aim_jax.weights.formats.errors import WeightsError
from aim_jax.weights.formats.files import read_tensors
from aim_jax.weights.pretrained import flatten

EPSILON = 1e-3  # epsilon of its batch norms, which have no scale
EXPECTED = (
    "the TorchScript file (inception-2015-12-05.pt), the state dict of pytorch-fid or "
    "torch-fidelity (*inception-2015-12-05*.pth), TensorFlow's frozen graph "
    "(classify_image_graph_def.pb), an ONNX export of any of them, or a .safetensors that this "
    "library wrote"
)

# Names of torchvision's modules -> names in the TensorFlow graph.
BLOCKS = {
    "Conv2d_1a_3x3": "conv", "Conv2d_2a_3x3": "conv_1", "Conv2d_2b_3x3": "conv_2",
    "Conv2d_3b_1x1": "conv_3", "Conv2d_4a_3x3": "conv_4",
    "Mixed_5b": "mixed", "Mixed_5c": "mixed_1", "Mixed_5d": "mixed_2", "Mixed_6a": "mixed_3",
    "Mixed_6b": "mixed_4", "Mixed_6c": "mixed_5", "Mixed_6d": "mixed_6", "Mixed_6e": "mixed_7",
    "Mixed_7a": "mixed_8", "Mixed_7b": "mixed_9", "Mixed_7c": "mixed_10", "fc": "softmax",
}  # fmt: skip
BRANCHES = {
    r"branch1x1": "conv",
    r"branch(?:5x5|7x7|3x3)_(\d)": "tower_conv_{}",
    r"branch(?:3x3dbl|7x7dbl|7x7x3)_(\d)": "tower_1_conv_{}",
    r"branch3x3_2([ab])": "tower_mixed_conv_{}",
    r"branch3x3dbl_3([ab])": "tower_1_mixed_conv_{}",
    r"branch_pool": "tower_2_conv",
}
# Names that mean another branch in the block with strides, mixed_3.
STRIDED = {"branch3x3": "conv", **{f"branch3x3dbl_{i}": f"tower_conv_{i}" for i in (1, 2, 3)}}
PARTS = {
    "weight": "weight", "conv2d_params": "weight", "weights": "weight",
    "beta": "beta", "mean": "mean", "var": "var", "bias": "bias", "biases": "bias",
    "gamma": "gamma", "moving_mean": "mean", "moving_variance": "var",
    "running_mean": "mean", "running_var": "var",
}  # fmt: skip


def load_inception(path: str | os.PathLike, weights_key: str = "", prefix: str = "") -> dict:
    """Load parameters of `aim_jax.models.inception.Inception` from any file of the 2015 network.

    Args:
      path: A file as described by `EXPECTED`. The last layer may be missing, which rules out the
        Inception Score.
      weights_key, prefix: For pickles of torch and safetensors; see `files.read_tensors`.

    Returns:
      float32 arrays by layer and "kernel" or "bias", with the batch norms folded in.

    Raises:
      FileNotFoundError: There is no such file.
      WeightsError: The file is not this network.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. The weights of Inception are {EXPECTED}.")
    tensors = _read(path, weights_key, prefix)
    shapes = flatten(inception.shapes(with_logits=True))
    if set(tensors) <= set(shapes) and path.suffix == ".safetensors":
        flat = dict(tensors)
    else:
        layers = {name.rsplit(".", 1)[0] for name in shapes}
        flat = _fold(_by_layer(tensors, layers), path)
    optional = {"softmax.kernel"}
    missing = set(shapes) - set(flat) - optional
    wrong = {k: v.shape for k, v in flat.items() if v.shape != shapes[k].shape}
    broken = [k for k, v in flat.items() if not np.all(np.isfinite(v))]
    if missing or wrong or broken:
        problems = [f"missing {k}" for k in sorted(missing)]
        problems += [f"{k} has the shape {v}, not {shapes[k].shape}" for k, v in wrong.items()]
        problems += [f"{k} is not finite" for k in broken]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"{path}: is not the Inception of 2015 ({'; '.join(problems[:3])}{more}). Expected "
            f"{EXPECTED}. The Inception of today's model zoos is a different network."
        )
    params: dict = {}
    for name, array in flat.items():
        layer, part = name.rsplit(".", 1)
        params.setdefault(layer, {})[part] = np.asarray(array, np.float32)
    return params


def _read(path: Path, weights_key: str, prefix: str) -> Mapping[str, np.ndarray]:
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix == ".onnx":
        return graphs.read_onnx(path)
    if path.suffix == ".pb":
        return graphs.read_graphdef(path)
    if start[:2] == b"PK" and torch_files.is_torchscript(path):
        return torch_files.read_torchscript(path)
    return read_tensors(path, weights_key, prefix)


def _by_layer(tensors: Mapping, layers: set[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return tensors by layer and part, with kernels still in any order of axes."""
    by_layer: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        *module, part = re.split(r"[./]", name)
        module = [m for m in module if m not in ("bn", "batchnorm", "net", "layers", "model")]
        torchvision = bool(module) and module[0] in BLOCKS
        # torchvision calls the shift of a batch norm "bias", like that of the last layer.
        part = PARTS.get(part, "")
        if torchvision and re.search(r"\bbn\b", name):
            part = {"bias": "beta", "weight": "gamma"}.get(part, part)
        layer = _from_torchvision(module) if torchvision else "_".join(module)
        layer = "softmax" if layer in ("output", "softmax_logits") else layer
        if layer in layers and part:
            by_layer.setdefault(layer, {})[part] = tensor
    return by_layer if by_layer.keys() - {"softmax"} else _by_order(tensors)


def _from_torchvision(module: list[str]) -> str:
    block, *branch_names = [m for m in module if m != "conv"]
    name = BLOCKS[block]
    if not branch_names:
        return name
    if name == "mixed_3" and branch_names[0] in STRIDED:
        branch = STRIDED[branch_names[0]]
    else:
        for pattern, branch in BRANCHES.items():
            if match := re.fullmatch(pattern, branch_names[0]):
                branch = branch.format(*match.groups())
                break
        else:
            return ""
    # torchvision counts from 1 or a; the graph leaves the first number out.
    number = {"1": "", "a": ""} | {str(i): f"_{i - 1}" for i in range(2, 6)} | {"b": "_1"}
    return f"{name}_" + re.sub(r"(?<=conv)_(\w)$", lambda m: number[m[1]], branch)


def _by_order(tensors: Mapping) -> dict[str, dict[str, np.ndarray]]:
    """Return unnamed tensors by layer, which are in the order that the network applies them."""
    by_layer: dict[str, dict[str, np.ndarray]] = {}
    for number, layer in enumerate([*inception.shapes(with_logits=True)]):
        parts = {part: tensors.get(f"#{number}.{part}") for part in ("weight", "bias")}
        by_layer[layer] = {part: tensor for part, tensor in parts.items() if tensor is not None}
    return by_layer


def _fold(layers: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> dict[str, np.ndarray]:
    """Fold the batch norms into kernels and biases."""
    flat = {}
    for layer, parts in layers.items():
        if "weight" not in parts:
            continue
        kernel = np.asarray(parts["weight"], np.float64)
        if layer == "softmax":
            flat["softmax.kernel"] = (
                kernel.T if kernel.shape[0] == inception.NUM_CLASSES else kernel
            )
            continue
        if path.suffix != ".pb":
            kernel = kernel.transpose(2, 3, 1, 0)  # torch's order (out, in, h, w)
        if "var" in parts:
            scale = parts.get("gamma", 1.0) / np.sqrt(np.float64(parts["var"]) + EPSILON)
            bias = parts["beta"] - parts["mean"] * scale
        elif "bias" in parts:
            scale = 1.0
            bias = parts["bias"]
        else:
            continue  # no batch norm was recognised by name; the layer counts as missing
        flat[f"{layer}.kernel"] = kernel * scale
        flat[f"{layer}.bias"] = bias
    return flat
