"""Files of PyTorch without PyTorch: golden files of torch.save, hostile ones, and writing."""

import collections
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from aim_jax.weights.formats import torch_files
from aim_jax.weights.formats.errors import WeightsError
from aim_jax.weights.formats.files import open_weights
from tests.conftest import ROOT
from tests.torch_archives import Module, View, saved

GOLDEN = ROOT / "tests" / "golden" / "torch_files"
ONES = np.ones(4, np.float32)


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        array = np.asarray(tensor)
        assert (tensor.dtype, tensor.shape) == (array.dtype, array.shape)
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape), name
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_golden_files(form, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    expected = load_file(GOLDEN / "all.safetensors")
    content = torch_files.load_torch(GOLDEN / f"{form}.pt")
    linear = {f"linear.{k}": x for k, x in content["linear"].items()}
    assert_same(content["weights"] | linear, expected)
    assert vars(content["args"]) == {"lr": 1e-4, "sizes": [1, (2, 3)], "device": "cuda:0"}
    assert content["seen"] == {"a": 2, "b": 1}
    assert (content["dtype"], content["size"]) == ("torch.bfloat16", (1, 2))
    assert content["optimizer"]["param_groups"][0]["params"] == [0, 1]
    strange = {"repeated": "repeated numbers", "complex": "ComplexFloatStorage"}
    if form == "zip":
        strange |= {"sparse": "sparse", "meta": "meta", "quantized": "quantized"}
        strange |= {"float8": "torch.float8_e4m3fn", "uint16": "torch.uint16"}
    assert {k: x.kind for k, x in content["strange"].items()} == strange


def test_strange_tensors_matter_only_where_they_are_taken():
    opened = open_weights(GOLDEN / "zip.pt", "linear")
    assert set(opened.tensors) == {"weight", "bias"}
    with pytest.raises(WeightsError, match=r"unsupported kinds of tensors: .*sparse \(sparse\)"):
        open_weights(GOLDEN / "zip.pt", "strange")


@pytest.mark.parametrize("nest", [None, "model"])
def test_what_is_written_is_read(nest, tmp_path):
    path = tmp_path / "w.pt"
    tensors = open_weights(GOLDEN / "all.safetensors").tensors
    torch_files.write_torch(path, tensors, {"again": "base"}, nest)
    content = torch_files.load_torch(path)
    written = content if nest is None else content[nest]
    expected = load_file(GOLDEN / "all.safetensors")
    assert_same(written, expected | {"again": expected["base"]})
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = [name for name in archive.namelist() if "/data/" in name]
        starts = [torch_files._place(file, archive.getinfo(name))[0] for name in names]
    assert len(starts) == len(tensors) and not any(start % 64 for start in starts)


@pytest.mark.parametrize("nest", [None, "model"])
def test_torch_reads_what_is_written(nest, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install torch")
    path = tmp_path / "w.pt"
    tensors = open_weights(GOLDEN / "all.safetensors").tensors
    torch_files.write_torch(path, tensors, {"again": "base"}, nest)
    from safetensors.torch import load_file as load_tensors

    expected = load_tensors(GOLDEN / "all.safetensors")
    for mmap in (False, True):
        content = torch.load(path, weights_only=True, mmap=mmap)
        content = content if nest is None else content[nest]
        assert content["again"].data_ptr() == content["base"].data_ptr()
        assert content.keys() == expected.keys() | {"again"}
        for name, tensor in expected.items():
            assert torch.equal(content[name], tensor) and content[name].dtype == tensor.dtype


class Calls:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("scripted", [False, True])
def test_nothing_of_a_pickle_is_run(scripted, tmp_path):
    read = torch_files.read_torchscript if scripted else torch_files.load_torch
    for function, name in ((print, r"\w+.print"), (exec, r"\w+.exec"), (eval, r"\w+.eval")):
        path = saved({"w": ONES, "x": Calls(function, "1")}, tmp_path / "evil.pt", scripted)
        with pytest.raises(WeightsError, match=rf"holds {name}|\({name}\)") as caught:
            read(path)
        assert "None of its code was run" in str(caught.value) and "\n" not in str(caught.value)


def raw(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickled)
    return path


STATE = pickle.dumps({"__defaults__": (1,)}, 2)[2:-1]
SIZE = b"ctorch\nSize\n"
HOSTILE = {
    # A list of two thousand million numbered objects.
    "deep key": (b"\x80\x02})" + b"\x85" * 10**5 + b"Ns.", "a key is a tuple"),
    "wide key": (b"\x80\x02})q\x01" + b"h\x01h\x01\x86q\x01" * 60 + b"Ns.", "a key is a tuple"),
    "keys in an OrderedDict": (
        b"\x80\x02ccollections\nOrderedDict\n])\x85\x85\x85N\x86a\x85R.",
        "a key is a tuple",
    ),
    "keys in a set": (b"\x80\x02c__builtin__\nset\n])\x85\x85\x85a\x85R.", "a key is a tuple"),
    "attributes of a function": (b"\x80\x02" + SIZE + STATE + b"b.", "it changes a function"),
    "attributes of a class": (b"\x80\x02ccollections\nOrderedDict\n" + STATE + b"b.", "damaged"),
    "name as a function": (b"\x80\x02ctorch\nfloat32\n)R.", "damaged"),
    "extension": (b"\x80\x02\x82\x01.", "an opcode that torch.save does not write"),
    "huge bytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".", "damaged"),
    "cut": (b"\x80\x02}", "damaged"),
    "no storage": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR.", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(case, tmp_path):
    pickled, message = HOSTILE[case]
    with pytest.raises(WeightsError, match=message):
        torch_files.load_torch(raw(tmp_path / "x.pt", pickled))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(ONES, 0, (5,), (1,)), "larger than its storage"),
        (View(ONES, 1, (2, 2), (2, 1)), "larger than its storage"),
        (View(ONES, -1, (2,), (1,)), "the shape of a tensor is not one"),
        (View(ONES, 0, (2,), (-1,)), "the shape of a tensor is not one"),
        (View(ONES, 0, (2, 2), (1,)), "the shape of a tensor is not one"),
        (View(ONES, 0, (2.0,), (1,)), "the shape of a tensor is not one"),
        (View(ONES, 0, (0,) * 70, (1,) * 70), "the shape of a tensor is not one"),
        (View(ONES, 0, (256**255,) * 1000, (1,) * 1000), "the shape of a tensor is not one"),
    ],
)
def test_a_tensor_has_no_more_than_what_is_stored(view, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        torch_files.load_torch(saved({"w": view}, tmp_path / "w.pt"))
    module = Module()
    module.w = view
    with pytest.raises(WeightsError, match=message):
        torch_files.read_torchscript(saved(module, tmp_path / "s.pt", scripted=True))


def test_plain_values_beside_tensors_are_read(tmp_path):
    plain = {"set": {1, "a"}, "bytes": b"\xff", "complex": 1j, 3: (None, 2.5), (1, "a"): True}
    plain["default"] = collections.defaultdict(list, {"a": [1]})
    plain["counter"] = collections.Counter("aa")
    content = torch_files.load_torch(saved(plain | {"w": ONES}, tmp_path / "w.pt"))
    np.testing.assert_array_equal(content.pop("w"), ONES)
    assert content == plain


def test_strides_of_axes_of_one_do_not_matter(tmp_path):
    view = View(ONES, 0, (1, 4), (2**47, 1))
    content = torch_files.load_torch(saved({"w": view}, tmp_path / "w.pt"))
    np.testing.assert_array_equal(content["w"], ONES[None])


def test_a_torchscript_archive_of_many_names_for_one_tensor(tmp_path):
    module = Module()
    numbers = np.zeros(1000, np.float32)
    for name in range(1000):
        setattr(module, f"w{name}", View(numbers, 0, (1000,), (1,)))
    with pytest.raises(WeightsError, match="many views of the same numbers"):
        torch_files.read_torchscript(saved(module, tmp_path / "w.pt", scripted=True))
    inner = Module()
    inner.w = ONES
    for _ in range(60):
        outer = Module()
        outer.a = outer.b = inner
        inner = outer
    tensors = torch_files.read_torchscript(saved(inner, tmp_path / "w.pt", scripted=True))
    assert list(tensors) == ["a." * 60 + "w"]


def test_a_storage_that_is_shorter_than_it_says(tmp_path):
    saved({"w": ONES}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "short.pt", "w") as file:
        for name, data in entries.items():
            file.writestr(name, data[:-1] if name.endswith("data/0") else data)
    with pytest.raises(WeightsError, match="declares more numbers than the file holds"):
        torch_files.load_torch(tmp_path / "short.pt")


def test_files_that_are_cut_off_or_of_another_machine(tmp_path):
    whole = (GOLDEN / "legacy.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for size in (1, 20, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match="is damaged, or not a file of torch"):
            torch_files.load_torch(cut)
    assert whole.count(b"little_endianq\x02\x88") == 1
    cut.write_bytes(whole.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    with pytest.raises(WeightsError, match="big-endian"):
        torch_files.load_torch(cut)
    with zipfile.ZipFile(cut, "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps({}, 2))
        archive.writestr("net/byteorder", b"big")
    with pytest.raises(WeightsError, match="big-endian"):
        torch_files.load_torch(cut)


def test_a_checkpoint_that_contains_itself_or_is_deep(tmp_path):
    content = {"model": {"w": ONES}}
    content["self"] = content
    assert set(open_weights(saved(content, tmp_path / "w.pt")).tensors) == {"w"}
    deep = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 3000 + b"}" + b"s" * 3000 + b"."
    with pytest.raises(WeightsError, match="nested too deeply"):
        open_weights(raw(tmp_path / "deep.pt", deep))
