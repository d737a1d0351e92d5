"""Damaged and hostile files: accepted with a valid meaning, or refused in one line."""

import contextlib
import hashlib
import io
import json
import math
import signal
import struct
import tarfile
import unicodedata
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from aim_jax.configs.defaults import vq_defaults
from aim_jax.data import TokenCache, open_images
from aim_jax.data.captions import MOST_CAPTION
from aim_jax.data.extraction import CacheWriter
from aim_jax.data.loader import ORDER
from aim_jax.data.preprocessing import image_spec
from aim_jax.evaluation import report as reports
from aim_jax.evaluation import scaling, sweep
from aim_jax.evaluation.image_sets import ImageParts, NpzImages
from aim_jax.models import AiMConfig, VQConfig
from aim_jax.models.lora import LoRA
from aim_jax.sampling import export_runner
from aim_jax.sampling.config import SamplingConfig
from aim_jax.training.checkpoint import FILE_LIST, claim_workdir
from aim_jax.training.monitor import keep_until
from aim_jax.utils.json_files import read_json
from aim_jax.utils.names import check_text, read_names
from aim_jax.weights import hub_files
from aim_jax.weights.adapters import read_adapter_file
from aim_jax.weights.directories import bundled_models
from aim_jax.weights.formats.files import open_weights
from aim_jax.weights.model_files import check_sizes, read_description
from tests.conftest import ROOT
from tests.fuzz.mutations import changed, damaged, written

SECONDS = 5  # most time of one case
MOST_MESSAGE = 2000  # characters


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      name: path of the file inside its directory.
      content: JSON of a good file, or its bytes.
      read: reads the file in the directory, and checks the meaning of what it accepts.
    """

    name: str
    content: object
    read: object


BUNDLED = bundled_models()["fashion_mnist"]
STORED = hub_files.open_params(BUNDLED)


def read_model(directory):
    file, content = read_description(directory)
    for part, kind in (("aim", AiMConfig), ("vq", VQConfig)):
        if content[part] is not None:
            config = kind(**content[part])
            try:
                check_sizes(config, STORED[part].shapes, STORED[part].size)
            except ValueError as error:  # the caller names the file
                raise ValueError(f"{file.name}: {error}") from error
            assert getattr(config, "n_layer", 1) < 10**6
            assert len(getattr(config, "ch_mult", ())) * getattr(config, "num_res_blocks", 1) < 100
    names = content["class_names"]
    assert content["aim"] is None or len(names) in (0, content["aim"].get("num_classes", 1000))
    for name in names:
        check_text("name", name)
    for value in SamplingConfig(**content["sampling"]).numbers().values():
        assert math.isfinite(value)
    if "data" in content["info"]:
        image_spec(ConfigDict(content["info"]["data"]))


def read_adapters(directory):
    content = read_adapter_file(directory)
    assert LoRA(**content["lora"]).rank >= 0 and AiMConfig(**content["aim"]).d_model > 0
    for name in content["class_names"]:
        check_text("name", name)


def read_cache(directory):
    cache = TokenCache.open(directory)
    assert len(cache) == sum(map(len, cache.shards)) == 10
    codes, labels = cache.take(np.arange(10))
    assert codes.shape == (10, 2, 6) and labels.shape == (10,)
    for name in cache.class_names:
        check_text("name", name)


def read_captioned(directory):
    check_captions(open_images("captions", "test", directory.parent))


def read_shards(directory):
    source = open_images("captions", "train", directory)
    check_captions(source)
    for index in range(len(source)):
        with contextlib.suppress(ValueError):  # a damaged image, which is named when it is read
            assert source[index]["image"].dtype == np.uint8


def check_captions(source):
    assert len(source.captions) == len(source) > 0
    for caption in source.captions:
        check_text("caption", caption, MOST_CAPTION)
        caption.encode()
    assert len(source.summary) < 10 * MOST_MESSAGE
    wrong = {unicodedata.category(c) for c in source.summary.replace("\n", "")}
    assert not wrong & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    source.fingerprint()


def read_captions(directory):
    """The captions of a cache whose manifest names them by what they hold, as a stranger can."""
    data = (directory / "captions.jsonl").read_bytes()
    name = f"captions-00000-{hashlib.sha256(data).hexdigest()}.jsonl"
    (directory / name).write_bytes(data)
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"captions": [name]}))
    try:
        captions = TokenCache.open(directory).captions()
    finally:
        (directory / name).unlink()
    assert len(captions) == 3 and all(len(caption) <= MOST_CAPTION for caption in captions)


def read_run(directory):
    claim_workdir(directory, vq_defaults(), {"class_names": ["a"], "train": "0"})


def read_metrics(directory):
    file = directory / "metrics.jsonl"
    last = scaling.last_validation(file)
    assert last is None or (last["val_loss"] > 0 and last["step"] > 0)
    keep_until(file, 15)
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert all(type(step) is int and step <= 15 for step in steps)


def read_report(directory):
    report = reports.read_report(directory)
    reports.check_out(directory, report["title"])
    reports.write_report(directory, report)


def read_sweep(directory):
    rows = sweep.stored_rows(directory / "sweep.json", {"seed": 0})
    if rows:
        with contextlib.suppress(ValueError):  # without a FID
            sweep.table(rows, sweep.best_of(rows, "fid"))


def read_list(directory):
    listed = read_json(directory / "files.json", FILE_LIST)
    assert listed and all(len(pair) == 2 for pair in listed.values())


def read_torch(directory):
    read_weights(directory / "w.pt", "weights")


def read_weights(path, weights_key=""):
    for key, tensor in open_weights(path, weights_key).tensors.items():
        check_text("key", key)
        assert math.prod(tensor.shape) < 1000
        assert np.asarray(tensor).shape == tensor.shape


def read_class_names(directory):
    for name in read_names(directory / "names.txt"):
        assert name and not {unicodedata.category(c) for c in name} & {"Cc", "Cs", "Zl", "Zp"}


def read_export(directory):
    export_runner.HERE = directory
    stored = export_runner.read_settings()
    export_runner.checked_settings({}, stored, 2)
    export_runner.checked_interval(None, stored)


def read_parts(directory):
    ImageParts(directory, directory / "samples.npz", {"seed": 0, "top_p": 0.5})


def read_images(directory):
    images = NpzImages(directory / "images.npz")
    assert sum(len(batch) for batch in images.batches(2)) == len(images)
    images.labels()


NUMBERS = SamplingConfig().numbers()
CONFIG = json.loads(vq_defaults().to_json_best_effort())
ROW = {
    "settings": NUMBERS | {"cfg_schedule": "constant"},
    "metrics": {"fid": 5.0, "kid": [0.1, 0.01]},
    "notes": ["few images"],
}
HEADER = {
    "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"a": "b"},
}  # fmt: skip
OTHER_MODEL = {"name": "cifar10", "fingerprint": "0" * 64}
ADAPTERS = {
    "format": "aim_jax adapter", "version": 1,
    "aim": {"d_model": 32, "headdim": 32, "num_classes": 2},
    "lora": {"rank": 4, "alpha": 0.0}, "base": OTHER_MODEL, "tokenizer": OTHER_MODEL,
    "class_names": ["a", "b"], "sampling": NUMBERS, "info": {}, "sha256": "0" * 64,
}  # fmt: skip
TORCH_FILES = ROOT / "tests" / "golden" / "torch_files"
DESCRIPTION = json.loads((BUNDLED / "config.json").read_text())
OFFICIAL = {"d_model": 16, "ssm_cfg": {"layer": "Mamba2"}}
KINDS = {
    "model": Kind("model.json", DESCRIPTION, read_model),
    "adapters": Kind("adapter.json", ADAPTERS, read_adapters),
    "published model": Kind("config.json", DESCRIPTION, read_model),
    "manifest": Kind("manifest.json", None, read_cache),
    "run": Kind(
        "run.json",
        CONFIG | {"learned_from": {"class_names": ["a"], "train": "0"}, "order": ORDER},
        read_run,
    ),
    "metrics": Kind(
        "metrics.jsonl",
        b"".join(
            json.dumps({"step": 10 * i, "loss": 3.0, "val_loss": 4.0 - i}).encode() + b"\n"
            for i in range(1, 4)
        ),
        read_metrics,
    ),
    "report": Kind(
        "report.json",
        {
            "title": "model",
            "metrics": {"fid": 5.0, "kid": [0.1, 0.01]},
            "notes": ["few images"],
            "settings": {"images": 10},
            "environment": {"jax": "0"},
            "parameters": {"AiM": "0" * 64},
        },
        read_report,
    ),
    "sweep": Kind("sweep.json", {"identity": {"seed": 0}, "rows": [ROW, ROW]}, read_sweep),
    "list of files": Kind("files.json", {"state/a": [10, 20], "state/b": [0, 0]}, read_list),
    "safetensors": Kind("model.safetensors", None, read_weights),
    "config of weights": Kind("config.json", OFFICIAL, read_weights),
    "index of weights": Kind(
        "model.safetensors.index.json", {"weight_map": {"w": "part.safetensors"}}, read_weights
    ),
    "zip file of torch": Kind("w.pt", (TORCH_FILES / "zip.pt").read_bytes(), read_torch),
    "older file of torch": Kind("w.pt", (TORCH_FILES / "legacy.pt").read_bytes(), read_torch),
    "class names": Kind("names.txt", b"boat\nhouse\nold tree\n", read_class_names),
    "export": Kind(
        "settings.json",
        {
            "num_classes": 2,
            "max_caption": 0,
            "class_names": ["a", "b"],
            "settings": NUMBERS,
            "cfg_schedule": "constant",
            "cfg_interval": [0.0, 1.0],
            "dtypes": {k: "int32" if k == "top_k" else "float32" for k in NUMBERS},
        },
        read_export,
    ),
    "settings of samples": Kind("settings.json", {"seed": 0, "top_p": 0.5}, read_parts),
    "images": Kind("images.npz", None, read_images),
    "metadata": Kind(
        "metadata.jsonl",
        b"".join(
            json.dumps({"file_name": f"{i}.png", "text": f"image {i}", "tags": ["a"]}).encode()
            + b"\n"
            for i in range(3)
        ),
        read_captioned,
    ),
    "metadata as csv": Kind(
        "metadata.csv", b"file_name,text\n0.png,zero\n1.png,\"one, two\"\n2.png,\n", read_captioned
    ),
    "text of an image": Kind("0.txt", "ein Bär\n".encode(), read_captioned),
    "shard": Kind("train-0.tar", None, read_shards),
    "captions": Kind("captions.jsonl", b'"a"\n"b \xc3\xa9"\n""\n', read_captions),
}  # fmt: skip


def tar_of_images():
    """A tar file of two images, with a caption as text and one as JSON, and a long name."""
    image = io.BytesIO()
    Image.new("L", (4, 4)).save(image, "PNG")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (
            ("0.png", image.getvalue()), ("0.txt", b"zero"),
            ("é/1.png", image.getvalue()), ("é/1.json", b'{"text": "one"}'),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()[:8192]


def safetensors(header):
    text = written(header)
    return struct.pack("<Q", len(text)) + text + np.arange(6, dtype=np.float32).tobytes()


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory for every kind, with what lies beside its file; and the good file's bytes."""
    made = {}
    for kind, (name, content, _) in KINDS.items():
        directory = tmp_path_factory.mktemp("kind")
        if kind == "manifest":
            writer = CacheWriter(
                directory / "cache", tokenizer="a" * 64, vocab_size=50, grid=(2, 3), shard_size=4,
                class_names=["cat", "dog"], views=["centre", "flip"], num_examples=10,
            )  # fmt: skip
            for shard, rows in enumerate(writer.ranges):
                writer.write(shard, np.ones((len(rows), 2, 6), int), np.zeros(len(rows), int))
            writer.finish()
            directory = directory / "cache"
            content = json.loads((directory / name).read_text())
        elif kind == "run":
            (directory / "checkpoints" / "1").mkdir(parents=True)
        elif kind == "safetensors":
            content = HEADER
        elif kind == "config of weights":
            (directory / "model.safetensors").write_bytes(safetensors(HEADER))
        elif kind == "index of weights":
            (directory / "part.safetensors").write_bytes(safetensors(HEADER))
        elif KINDS[kind].read is read_captioned:
            directory = directory / "test"
            directory.mkdir()
            for number in range(3):
                Image.new("L", (4, 4)).save(directory / f"{number}.png")
            (directory.parent / "train").mkdir()
            Image.new("L", (4, 4)).save(directory.parent / "train" / "0.png")
        elif kind == "shard":
            (directory / name).write_bytes(tar_of_images())
            (directory / "val-0.tar").write_bytes(tar_of_images())
            content = (directory / name).read_bytes()
        elif kind == "captions":
            writer = CacheWriter(
                directory, tokenizer="a" * 64, vocab_size=50, grid=(1, 1), class_names=["image"],
                views=["centre"], num_examples=3, captioned=True,
            )  # fmt: skip
            writer.write(0, np.ones((3, 1, 1), int), np.zeros(3, int), ["a", "b", ""])
            writer.finish()
        elif kind == "images":
            np.savez(
                directory / name, arr_0=np.full((5, 4, 4, 3), 200, np.uint8), labels=np.arange(5)
            )
            content = (directory / name).read_bytes()
        made[kind] = directory, content
    return made


@contextlib.contextmanager
def in_time():
    def stop(*_):
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_accepted(kind, directory, data):
    """Whether a file is accepted; a refusal is one line that names the file and can be printed."""
    file = directory / KINDS[kind].name
    file.write_bytes(data)
    try:
        with in_time():
            KINDS[kind].read(directory)
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(directory) in message or file.name in message, message
        assert len(message) < MOST_MESSAGE and "\n" not in message, message
        wrong = {c for c in message if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
        assert not wrong, message
        return False
    return True


def good(kind, content):
    if isinstance(content, bytes):
        return content
    return safetensors(content) if kind == "safetensors" else written(content)


def mutated(data, kind, content):
    """The bytes of a damaged file."""
    count = data.draw(st.integers(1, 3))
    if not isinstance(content, bytes) and data.draw(st.sampled_from((True, True, True, False))):
        for _ in range(count):
            if isinstance(content, dict | list):
                content = changed(data.draw, content)
        return good(kind, content)
    result = good(kind, content)
    for _ in range(count):
        result = damaged(data.draw, result)
    return result


def fuzz(directories, kind, count):
    directory, content = directories[kind]
    assert is_accepted(kind, directory, good(kind, content))
    seen = set()

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def search(data):
        seen.add(is_accepted(kind, directory, mutated(data, kind, content)))

    search()
    assert False in seen


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_in_one_line(kind, directories):
    fuzz(directories, kind, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_refused_in_one_line(kind, directories):
    fuzz(directories, kind, 2000)
