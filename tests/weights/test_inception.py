"""The Inception of 2015 against torch, and the forms of its weights."""

import zipfile

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.evaluation.image_sets import NpzImages
from aim_jax.models import inception
from aim_jax.weights.convert import WeightsError
from aim_jax.weights.convert.inception import BLOCKS, load_inception
from aim_jax.weights.formats.files import save_tensors
from aim_jax.weights.pretrained import flatten
from tests.conftest import ROOT
from tests.inception_weights import seeded_images, seeded_weights
from tests.torch_archives import Module, saved


@pytest.fixture(scope="module")
def weights():
    return seeded_weights()


@pytest.fixture(scope="module")
def params(weights, tmp_path_factory):
    return load_inception(write_torchscript(weights, tmp_path_factory.mktemp("w") / "a.pt"))


@pytest.fixture(scope="module")
def extract(params):
    return FeatureExtractor(params, batch_size=8)


def test_features_are_those_of_the_public_network(extract):
    """tests/golden/inception.npz: the TorchScript network with these weights, in float64."""
    with np.load(ROOT / "tests" / "golden" / "inception.npz") as golden:
        found = extract(seeded_images())
        for name in ("pool", "spatial", "logits"):
            ours, theirs = getattr(found, name), golden[name]
            assert ours.shape == theirs.shape and ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("side", [8, 299, 340])
def test_pictures_are_interpolated_from_pixel_corners(side):
    rng = np.random.default_rng(side)
    image = rng.integers(0, 256, (1, side, 5, 3), dtype=np.uint8)
    found = np.asarray(inception.preprocess(image))
    assert found.shape == (1, 299, 299, 3)
    for i, j in ((0, 0), (17, 298), (298, 150)):
        y, x = i * side / 299, j * 5 / 299
        low_y, low_x = int(y), int(x)
        high_y, high_x = min(low_y + 1, side - 1), min(low_x + 1, 4)
        pixels = image[0].astype(np.float64)
        upper = pixels[low_y, low_x] * (1 - x + low_x) + pixels[low_y, high_x] * (x - low_x)
        lower = pixels[high_y, low_x] * (1 - x + low_x) + pixels[high_y, high_x] * (x - low_x)
        expected = upper * (1 - y + low_y) + lower * (y - low_y)
        np.testing.assert_allclose(found[0, i, j] * 128 + 128, expected, atol=2e-3)


def test_sets_of_images_and_their_cache(extract, tmp_path, capsys):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (11, 6, 6, 1), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images)
    made = extract.of_cached(NpzImages(tmp_path / "a.npz"), 9, tmp_path / "cache")
    single = extract(np.repeat(images[:8], 3, axis=3))
    assert made.count == 11 and made.indices.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    np.testing.assert_allclose(made.features[:7], single.pool[made.indices[:7]], rtol=1e-5)
    assert made.inception_score[0] >= 1
    nothing = extract(images[:0])  # a process's share of a last batch
    assert nothing.pool.shape == (0, 2048) and nothing.spatial.shape == (0, 2023)
    everything = np.concatenate([extract(images[:8]).spatial, extract(images[8:]).spatial])
    np.testing.assert_allclose(made.spatial.mean, everything.mean(0), rtol=1e-4, atol=1e-6)
    (file,) = (tmp_path / "cache").glob("*.npz")
    written = file.stat().st_mtime_ns
    again = extract.of_cached(NpzImages(tmp_path / "a.npz"), 9, tmp_path / "cache")
    assert file.stat().st_mtime_ns == written and again.inception_score == made.inception_score
    chex.assert_trees_all_equal(again, made)
    file.write_bytes(file.read_bytes()[:1000])
    jax.tree.map(
        np.testing.assert_array_equal,
        extract.of_cached(NpzImages(tmp_path / "a.npz"), 9, tmp_path / "cache"), made,
    )  # fmt: skip
    assert "computing it again" in capsys.readouterr().err


# Forms


def write_torchscript(weights, path):
    """A TorchScript archive of the network, modules within modules, without torch."""
    root = Module()
    root.layers = Module()
    for layer, parts in weights.items():
        module = root if layer == "softmax" else root.layers
        for name in ["output"] if layer == "softmax" else _graph_path(layer):
            if not hasattr(module, name):
                setattr(module, name, Module())
            module = getattr(module, name)
        for part, array in parts.items():
            setattr(module, part, array)
    return saved(root, path, scripted=True)


def _graph_path(layer: str) -> list[str]:
    """mixed_9_tower_1_mixed_conv_1 -> mixed_9, tower_1, mixed, conv_1."""
    path = []
    for word in layer.split("_"):
        if word.isdigit():
            path[-1] += f"_{word}"
        else:
            path.append(word)
    return path


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def write_graphdef(weights, path):
    def constant(name, array):
        shape = b"".join(_field(2, _field(1, n)) for n in array.shape)
        tensor = _field(1, 1) + _field(2, shape) + _field(4, array.astype("<f4").tobytes())
        attribute = _field(1, "value") + _field(2, _field(8, tensor))
        return _field(1, _field(1, name) + _field(2, "Const") + _field(5, attribute))

    with path.open("wb") as file:
        file.write(_field(1, _field(1, "ExpandDims") + _field(2, "ExpandDims")))
        names = {"beta": "batchnorm/beta", "mean": "batchnorm/moving_mean",
                 "var": "batchnorm/moving_variance"}  # fmt: skip
        for layer, parts in weights.items():
            if layer == "softmax":
                file.write(constant("softmax/weights", parts["weight"].T))
                continue
            where = "/".join(_graph_path(layer))
            file.write(constant(f"{where}/conv2d_params", parts["weight"].transpose(2, 3, 1, 0)))
            for part, name in names.items():
                if part in parts:
                    file.write(constant(f"{where}/{name}", parts[part]))
    return path


def torchvision_name(layer: str) -> str:
    """The module of torchvision's Inception v3 for a layer of the graph, written out by hand."""
    if layer == "softmax":
        return "fc"
    blocks = {v: k for k, v in BLOCKS.items()}
    if layer in blocks:
        return blocks[layer]
    block = max((b for b in blocks if layer.startswith(b + "_")), key=len)
    rest = layer.removeprefix(block + "_")
    number = int(block.removeprefix("mixed").removeprefix("_") or 0)
    dbl = lambda i: f"branch3x3dbl_{i}"  # noqa: E731
    plain = {"conv": "branch1x1", "tower_2_conv": "branch_pool"}
    if number <= 2:
        names = plain | {"tower_conv": "branch5x5_1", "tower_conv_1": "branch5x5_2",
                         "tower_1_conv": dbl(1), "tower_1_conv_1": dbl(2),
                         "tower_1_conv_2": dbl(3)}  # fmt: skip
    elif number == 3:
        names = {"conv": "branch3x3", "tower_conv": dbl(1), "tower_conv_1": dbl(2),
                 "tower_conv_2": dbl(3)}  # fmt: skip
    elif number <= 7:
        names = plain | {"tower_conv": "branch7x7_1", "tower_1_conv": "branch7x7dbl_1"}
        names |= {f"tower_conv_{i}": f"branch7x7_{i + 1}" for i in (1, 2)}
        names |= {f"tower_1_conv_{i}": f"branch7x7dbl_{i + 1}" for i in (1, 2, 3, 4)}
    elif number == 8:
        names = {"tower_conv": "branch3x3_1", "tower_conv_1": "branch3x3_2",
                 "tower_1_conv": "branch7x7x3_1"}  # fmt: skip
        names |= {f"tower_1_conv_{i}": f"branch7x7x3_{i + 1}" for i in (1, 2, 3)}
    else:
        names = plain | {
            "tower_conv": "branch3x3_1", "tower_mixed_conv": "branch3x3_2a",
            "tower_mixed_conv_1": "branch3x3_2b", "tower_1_conv": dbl(1), "tower_1_conv_1": dbl(2),
            "tower_1_mixed_conv": "branch3x3dbl_3a", "tower_1_mixed_conv_1": "branch3x3dbl_3b",
        }  # fmt: skip
    return f"{blocks[block]}.{names[rest]}"


def write_torchvision(weights, path):
    names = {"beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    tensors = {}
    for layer, parts in weights.items():
        module = torchvision_name(layer)
        if layer == "softmax":
            tensors |= {"fc.weight": parts["weight"], "fc.bias": np.ones(1008, np.float32)}
            continue
        tensors[f"{module}.conv.weight"] = parts["weight"]
        tensors[f"{module}.bn.weight"] = np.ones_like(parts["beta"])
        tensors |= {f"{module}.{name}": parts[part] for part, name in names.items()}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return path


def write_onnx(weights, path):
    """Batch norms folded and names lost, as exporters write it."""

    def tensor(name, array):
        dims = _field(1, b"".join(map(_varint, array.shape)))  # packed
        return _field(5, dims + _field(2, 1) + _field(8, name) + _field(9, array.tobytes()))

    nodes, tensors = b"", b""
    for i, (layer, parts) in enumerate(weights.items()):
        if layer == "softmax":
            nodes += _field(1, _field(1, "x") + _field(1, "fc.weight") + _field(4, "Gemm"))
            tensors += tensor("fc.weight", parts["weight"])
            continue
        scale = 1 / np.sqrt(parts["var"].astype(np.float64) + 1e-3)
        kernel = (parts["weight"] * scale[:, None, None, None]).astype(np.float32)
        bias = (parts["beta"] - parts["mean"] * scale).astype(np.float32)
        inputs = _field(1, f"x{i}") + _field(1, f"onnx::Conv_{i}") + _field(1, f"b{i}")
        nodes += _field(1, inputs + _field(4, "Conv")) + _field(1, _field(4, "Relu"))
        tensors += tensor(f"onnx::Conv_{i}", kernel) + tensor(f"b{i}", bias)
    path.write_bytes(_field(1, 8) + _field(7, nodes + tensors))
    return path


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_graphdef, "a.pb"), (write_torchvision, "a.safetensors"), (write_onnx, "a.onnx")],
)
def test_every_form_gives_the_same_parameters(write, name, weights, params, tmp_path):
    found = load_inception(write(weights, tmp_path / name))
    assert found.keys() == params.keys()
    for key, array in flatten(found).items():
        expected = flatten(params)[key]
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6, err_msg=key)


def test_ours_are_read_back_and_scores_need_the_last_layer(params, tmp_path):
    path = save_tensors(params, tmp_path / "ours.safetensors")
    chex.assert_trees_all_equal(load_inception(path), params)
    without = {k: v for k, v in params.items() if k != "softmax"}
    found = load_inception(save_tensors(without, path))
    images = seeded_images()
    assert FeatureExtractor(found, 8)(images).logits is None


def test_other_files_are_refused(weights, params, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*TorchScript"):
        load_inception(tmp_path / "none.pt")
    few = {k: v for k, v in weights.items() if k != "mixed_5_conv"}
    with pytest.raises(WeightsError, match=r"missing mixed_5_conv.bias.*model zoos"):
        load_inception(write_torchscript(few, tmp_path / "few.pt"))
    plain = {k: {"weight": v["weight"]} for k, v in weights.items()}
    with pytest.raises(WeightsError, match=r"missing conv.bias"):  # batch norms that nobody found
        load_inception(write_graphdef(plain, tmp_path / "plain.pb"))
    wide = weights | {"conv": {k: np.concatenate([v, v]) for k, v in weights["conv"].items()}}
    with pytest.raises(WeightsError, match=r"conv.kernel has the shape \(3, 3, 3, 64\)"):
        load_inception(write_graphdef(wide, tmp_path / "wide.pb"))
    broken = {k: dict(v) for k, v in params.items()}
    broken["mixed_conv"]["bias"] = np.full_like(broken["mixed_conv"]["bias"], np.nan)
    with pytest.raises(WeightsError, match=r"mixed_conv\.bias is not finite"):
        load_inception(save_tensors(broken, tmp_path / "nan.safetensors"))
    whole = (tmp_path / "wide.pb").read_bytes()
    for name, content, message in (
        ("cut.pb", whole[: len(whole) // 2], "is not a frozen TensorFlow graph.*truncated"),
        ("none.onnx", b"", "is not an ONNX model"),
        ("group.pb", _varint(1 << 3 | 3) + b"xx", "a field of unknown wire type 3"),
        ("page.pth", b"<html>", "neither a safetensors file nor one of torch.save"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            load_inception(tmp_path / name)


def test_a_torchscript_archive_that_is_compressed(tmp_path):
    path = write_torchscript({"conv": {"weight": np.zeros(1, np.float32)}}, tmp_path / "a.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name) + bytes(1000))
    with pytest.raises(WeightsError, match="holds compressed entries"):
        load_inception(packed)
