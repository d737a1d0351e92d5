"""Trained models: self-describing directories on disk, and their contents in memory.

A model directory holds `model.json` (configurations, class names, sampling defaults, provenance,
checksums), the parameters of one or both parts as `aim/` and `vq/`, written by Orbax, and the text
tokenizer of captions, if captions condition the model, as `text_tokenizer.json`.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax.data.features import FeatureFile
from aim_jax.data.text import TEXT_TOKENIZER_FILE, TextTokenizer
from aim_jax.models import aim, vq
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.parallel.sharding import to_host
from aim_jax.utils.checks import check_arguments, shown
from aim_jax.utils.endings import closing_all, patient_event_loops
from aim_jax.utils.files import replacing
from aim_jax.utils.names import match_name, reason_of, short_list
from aim_jax.weights import hub, seal
from aim_jax.weights.model_files import (
    FORMAT,
    FORMAT_VERSION,
    LEFTOVERS,
    MODEL_FILE,
    check_content,
    check_sizes,
    read_model_file,
)

CHUNK_BYTES = 8 * 2**20  # size of a write
LARGE_BYTES = 64 * 2**20  # larger arrays are read one at a time
EXPORT_DTYPES = ("float32", "float16", "bfloat16")  # storage dtypes of parameters
MOST_CLASSES = 20  # classes of a large model that programs sample and list by default


def flatten(tree: dict) -> dict[str, Any]:
    """Flatten nested dicts to one dict with dotted keys."""
    return flatten_dict(tree, sep=".")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model directory in memory; missing parts are None.

    Attributes:
      name: Name or path that the model was loaded from.
      aim_config, aim_params: The autoregressive model; float32 unless loaded as stored.
      vq_config, vq_params: The tokenizer; float32 unless loaded as stored.
      class_names: One name per class, or empty.
      text: The text tokenizer of captions, if their tokens condition the AiM; or the features that
        do, which belong to no model directory.
      sampling: The model's own values of fields of `aim_jax.sampling.SamplingConfig`.
      info: Further metadata of the directory (dataset, image size, provenance).
      prepared: What `aim_jax.generate` keeps of the model, by implementation.
    """

    name: str
    aim_config: AiMConfig | None = None
    aim_params: dict | None = None
    vq_config: VQConfig | None = None
    vq_params: dict | None = None
    class_names: tuple[str, ...] = ()
    sampling: dict = dataclasses.field(default_factory=dict)
    info: dict = dataclasses.field(default_factory=dict)
    text: TextTokenizer | FeatureFile | None = None
    prepared: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = 0 if self.text is None else self.text.vocab_size
        expected = 0 if self.aim_config is None else self.aim_config.caption_vocab
        if known != expected:
            raise ValueError(
                f"{self.name}: the AiM has a vocabulary of captions of {expected}, but the text "
                f"tokenizer has {known} (0: there is none); they do not belong together."
            )
        if not (self.aim_config and self.vq_config):
            return
        if self.aim_config.vocab_size != self.vq_config.n_embed:
            raise ValueError(
                f"{self.name}: the AiM has a vocabulary of {self.aim_config.vocab_size}, but the "
                f"tokenizer has {self.vq_config.n_embed} codebook entries; they do not belong "
                "together."
            )

    def aim(self) -> tuple[AiMConfig, dict]:
        """Return configuration and parameters of the autoregressive model.

        Raises:
          ValueError: The model has no AiM.
        """
        if self.aim_config is None or self.aim_params is None:
            raise ValueError(f"{self.name} holds no AiM.")
        return self.aim_config, self.aim_params

    def vq(self) -> tuple[VQConfig, dict]:
        """Return configuration and parameters of the tokenizer.

        Raises:
          ValueError: The model has no tokenizer.
        """
        if self.vq_config is None or self.vq_params is None:
            raise ValueError(f"{self.name} holds no tokenizer.")
        return self.vq_config, self.vq_params

    def with_position_offset(self, offset: int) -> "Pretrained":
        """Return the model with position row j + `offset` for token j; see `AiMConfig`."""
        if self.aim_config is None:
            raise ValueError(f"{self.name} holds no AiM, so it has no positions.")
        config = dataclasses.replace(self.aim_config, position_offset=offset)
        return dataclasses.replace(self, aim_config=config)

    def with_tokenizer(self, other: "Pretrained") -> "Pretrained":
        """Return the model with another tokenizer of the same tokens, whose decoder was trained on.

        Raises:
          ValueError: `other` has no tokenizer, or its tokens have another meaning.
        """
        if self.vq_params is None or other.vq_params is None:
            raise ValueError(f"{self.name} and {other.name}: both must hold a tokenizer.")
        own, others = (
            flatten(vq.encoder_params(params)) for params in (self.vq_params, other.vq_params)
        )
        same = own.keys() == others.keys()
        dtypes = {m.vq_config.compute_dtype for m in (self, other) if m.vq_config is not None}
        same &= len(dtypes) == 1
        if not same or not all(np.array_equal(own[name], others[name]) for name in own):
            raise ValueError(
                f"{other.name} has another encoder, codebook or compute dtype than {self.name}, so "
                "its tokens have another meaning. Train its decoder with config.init and "
                "config.decoder_only=True."
            )
        info = self.info | {k: other.info[k] for k in ("data", "vq_steps") if k in other.info}
        return dataclasses.replace(
            self, vq_config=other.vq_config, vq_params=other.vq_params, info=info
        )

    def with_caption_features(self, path: str | os.PathLike) -> "Pretrained":
        """Return the model with a file of features, so that it takes the captions of the file.

        Raises:
          ValueError: The model takes no features, or features of another width.
          OSError: The file cannot be read.
        """
        width = self.aim_config.caption_features if self.aim_config else 0
        if not width:
            raise ValueError(f"{self.name} takes no features of captions.")
        file = FeatureFile(path)
        if file.width != width:
            raise ValueError(
                f"{file.path} has features of {file.width} values; {self.name} takes {width}."
            )
        return dataclasses.replace(self, text=file)

    def with_compute_dtype(self, dtype: str) -> "Pretrained":
        """Return the model with both parts computing in "float32" or "bfloat16"."""
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute dtype {dtype!r}: expected float32 or bfloat16.")
        changed = {
            name: dataclasses.replace(config, compute_dtype=dtype)
            for name in ("aim_config", "vq_config")
            if (config := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **changed)


def class_ids(model: Pretrained, classes: Sequence[str]) -> list[int]:
    """Return the class ids of names or numbers; without any, all ids, or the first 20 of many.

    Names are matched by `aim_jax.utils.names.match_name`. An item that is a class name is never
    read as a number.

    Raises:
      ValueError: A name is unknown or fits several classes, or a number is out of range; the
        message lists the classes. Or the model holds no AiM, or has no classes.
    """
    if model.aim_config is None:
        raise ValueError(f"{model.name} holds only a tokenizer; sampling needs an AiM.")
    if model.aim_config.is_text:
        raise ValueError(f"{model.name} generates from captions and has no classes; pass captions.")
    count = model.aim_config.num_classes
    if not classes:
        return list(range(min(count, MOST_CLASSES)))
    ids = []
    for item in classes:
        number = match_name(item, model.class_names)
        if number is None:
            number = int(item) if item.strip().isdecimal() else -1
        if not 0 <= number < count:
            known = short_list(model.class_names, MOST_CLASSES) or f"ids 0 to {count - 1}"
            raise ValueError(f"unknown class {shown(item)}; {model.name} has the classes {known}.")
        ids.append(number)
    return ids


@check_arguments
def save_model(
    path: str | os.PathLike, model: Pretrained, dtype: str | None = "float32", files: Mapping = {}
) -> Path:
    """Write a model directory atomically, replacing an older one.

    With several processes, all of them call this function, and the first one writes.

    Args:
      path: The directory.
      model: Model to write. Parameters that are NumPy arrays are written without a copy.
      dtype: Storage dtype of the parameters, such as "float16" for half the size; None keeps the
        dtypes of the parameters.
      files: Further files by name: functions that write to the path they are called with.

    Raises:
      FileExistsError: The path is neither a model directory nor an empty directory.
      ValueError: The dtype is not float32, float16 or bfloat16.
    """
    path = Path(path).absolute()
    if dtype not in (None, *EXPORT_DTYPES):
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(EXPORT_DTYPES)}, or None.")
    if (
        path.exists()
        and not (path / MODEL_FILE).is_file()
        and (not path.is_dir() or any(path.iterdir()))
    ):
        raise FileExistsError(f"{path} exists and is not a model directory; choose another path.")
    if jax.process_count() > 1:
        params = {name: to_host(getattr(model, name)) for name in ("aim_params", "vq_params")}
        model = dataclasses.replace(model, **params)
    if jax.process_index() == 0:
        _write_model(path, model, dtype, files)
    return path


def _write_model(path: Path, model: Pretrained, dtype: str | None, files: Mapping) -> None:
    leaves = jax.tree.leaves((model.aim_params, model.vq_params))
    dtypes = [dtype] if dtype else sorted({str(x.dtype) for x in leaves})
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
        "aim": model.aim_config and model.aim_config.fields(),
        "vq": model.vq_config and dataclasses.asdict(model.vq_config),
        "class_names": list(model.class_names),
        "sampling": model.sampling,
        "info": model.info,
    }
    with replacing(path) as partial, patient_event_loops():
        partial.mkdir()
        for part, params in (("aim", model.aim_params), ("vq", model.vq_params)):
            if params is not None:
                _save_params(partial / part, params, dtype)
        for file in partial.rglob("commit_success.txt"):
            file.write_text("")  # Orbax writes the local path there, which should stay private
        if isinstance(model.text, TextTokenizer):
            content["text"] = model.text.fingerprint
            files = {**files, TEXT_TOKENIZER_FILE: model.text.save}
        for name, write in files.items():
            write(partial / name)
        file = partial / MODEL_FILE
        content[seal.FILES] = seal.file_sums(file, files.keys())
        check_content(content)
        seal.write_description(file, content)


def bundled_models() -> dict[str, Path]:
    """Return the directories of the models that come with the package, by name."""
    root = Path(str(resources.files("aim_jax"))) / "bundled"
    return {file.parent.name: file.parent for file in sorted(root.glob(f"*/{MODEL_FILE}"))}


@check_arguments
def find_model(name_or_path: str | os.PathLike) -> Path:
    """Return the model directory of a bundled name, a directory, a workdir or a hub address.

    Raises:
      FileNotFoundError: There is no such model.
    """
    if str(name_or_path).startswith(hub.PREFIX):  # only these need the network
        name_or_path = hub.download(str(name_or_path))
    bundled = bundled_models()
    # An absolute path stays the same model: "./cifar10" is not the bundled one.
    path = bundled.get(str(name_or_path), Path(name_or_path).absolute())
    if not (path / MODEL_FILE).is_file() and (path / "model" / MODEL_FILE).is_file():
        path = path / "model"
    if not (path / MODEL_FILE).is_file() and (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"no model {str(name_or_path)!r}: this training run ended before it wrote one. Repeat "
            "its training command, which resumes it; the model is written at the end, and after "
            "Ctrl-C."
        )
    if not (path / MODEL_FILE).is_file():
        raise FileNotFoundError(
            f"no model {str(name_or_path)!r}: expected a directory with {MODEL_FILE} (a training "
            f"workdir has one in model/ after its first export), or one of {sorted(bundled)}."
        )
    return path


@check_arguments
def load_pretrained(
    name_or_path: str | os.PathLike, *, as_stored: bool = False, verify: bool = True
) -> Pretrained:
    """Load a bundled model by name, or a model directory.

    Args:
      name_or_path: "fashion_mnist", "cifar10", ...; a model directory; a training workdir, whose
        newest exported model (`model/`) is loaded; or "hf://owner/name[@revision]" on the hub,
        which needs the extra `hub` and is downloaded once.
      as_stored: Return parameters as NumPy arrays in their stored dtypes, instead of float32 on the
        first device.
      verify: Check the SHA-256 of all files first. A directory of the first version has none, which
        is said.

    Raises:
      FileNotFoundError: There is no such model.
      ValueError: The directory is incomplete, damaged, or of a version that this library cannot
        read; or `model.json` was edited and not sealed.
    """
    path = find_model(name_or_path)
    content = read_model_file(path)
    if verify:
        seal.check_model(path / MODEL_FILE, content)
    aim_config = None if content["aim"] is None else AiMConfig(**content["aim"])
    vq_config = None if content["vq"] is None else VQConfig(**content["vq"])
    load = functools.partial(_load_params, as_stored=as_stored)
    aim_params = load(path / "aim", aim.param_shapes, aim_config) if aim_config else None
    vq_params = load(path / "vq", vq.param_shapes, vq_config) if vq_config else None
    text = _load_text(path, content["text"]) if "text" in content else None
    return Pretrained(
        name=str(name_or_path),
        aim_config=aim_config,
        aim_params=aim_params,
        vq_config=vq_config,
        vq_params=vq_params,
        class_names=tuple(content["class_names"]),
        sampling=content["sampling"],
        info=content["info"],
        text=text,
    )


def _load_text(path: Path, fingerprint: str) -> TextTokenizer:
    """Load the text tokenizer of a model directory, and compare it with its fingerprint."""
    file = path / TEXT_TOKENIZER_FILE
    if not file.is_file():
        raise ValueError(f"{file} is missing; the model directory is incomplete.")
    tokenizer = TextTokenizer.load(file)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{file} is not the text tokenizer of the model's training; get the model again."
        )
    return tokenizer


@check_arguments
def seal_model(name_or_path: str | os.PathLike) -> Path:
    """Write the checksums of a model directory again, after an edit of its `model.json`.

    A directory of the first version gets checksums of its files as well.

    Returns:
      The path of `model.json`.

    Raises:
      FileNotFoundError: There is no such model.
      ValueError: Its files are not those that were written, or the model is not the user's own.
    """
    if str(name_or_path) in bundled_models() or str(name_or_path).startswith(hub.PREFIX):
        raise ValueError(
            f"{name_or_path} is read-only; make a copy with aim-jax publish --checkpoint "
            f"{name_or_path} --out DIR, and edit and seal the copy."
        )
    file = find_model(name_or_path) / MODEL_FILE
    content = read_model_file(file.parent)
    sealed = seal.is_sealed(content)
    if sealed:
        seal.check_files(file, content)
    load_pretrained(file.parent, as_stored=True, verify=False)  # an edit that cannot be read fails
    if not sealed:
        content |= {"version": FORMAT_VERSION, seal.FILES: seal.file_sums(file, (LEFTOVERS,))}
    seal.write_description(file, content)
    return file


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by the string of their path."""
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def _checkpointer(alone: bool = False) -> ocp.Checkpointer:
    """Return a checkpointer of parameter trees that holds no second copy of them.

    Orbax copies NumPy arrays before it saves them, because they usually change during a save. With
    `alone`, the first process works without waiting for others.
    """
    processes = {"primary_host": 0, "active_processes": {0}} if alone else {}
    options = ocp.options.MultiprocessingOptions(**processes, barrier_sync_key_prefix="model")
    # One process writes. It takes replicated arrays from one device instead of a part from each,
    # for which Orbax would compile and run a slice per array and device.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, arrays),
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=handlers, multiprocessing_options=options
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _save_params(path: Path, params: dict, dtype: str | None) -> None:
    params = nn.unbox(params)
    if dtype is not None:
        params = jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), params)
    # An array is packed in memory before it is written, so large arrays are written in chunks.
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    args = ocp.args.PyTreeSave(
        params, save_args=save_args, ocdbt_target_data_file_size=2 * CHUNK_BYTES
    )
    with closing_all() as at_end:
        checkpointer = _checkpointer(alone=True)
        at_end(checkpointer.close)
        checkpointer.save(path, args=args)


def _load_params(
    path: Path, param_shapes: Callable[..., dict], config: AiMConfig | VQConfig, as_stored: bool
) -> dict:
    """Load parameters after checking them against the shapes of the configuration."""
    if not path.is_dir():
        raise ValueError(f"{path} is missing; the model directory is incomplete.")
    with _checkpointer() as checkpointer:
        with _unreadable(path, "cannot be read"):
            stored = checkpointer.metadata(path.absolute()).item_metadata
            if stored is None:
                raise ValueError("its metadata is damaged or missing")
            actual = by_path(stored.tree)
        with _unreadable(path, "does not fit its configuration"):
            shapes = {name: tuple(array.shape) for name, array in actual.items()}
            check_sizes(config, shapes, sum(x.stat().st_size for x in path.rglob("*")))
            abstract = param_shapes(config)
        expected = by_path(abstract)
        wrong = [f"{k}: missing" for k in sorted(expected.keys() - actual.keys())]
        wrong += [f"{k}: unexpected" for k in sorted(actual.keys() - expected.keys())]
        wrong += [
            f"{k}: shape {tuple(actual[k].shape)}, expected {expected[k].shape}"
            for k in sorted(expected.keys() & actual.keys())
            if tuple(actual[k].shape) != expected[k].shape
        ]
        if wrong:
            raise ValueError(
                f"{path} does not fit its configuration ({len(wrong)} arrays): "
                f"{'; '.join(wrong[:5])}"
            )
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restore_args = (
            ocp.RestoreArgs(restore_type=np.ndarray)
            if as_stored
            else ocp.ArrayRestoreArgs(dtype=jnp.float32, sharding=sharding)
        )
        restored: dict = {}
        for group in _large_alone(flatten_dict(abstract)):
            args = ocp.args.PyTreeRestore(
                unflatten_dict(group),
                restore_args=unflatten_dict(dict.fromkeys(group, restore_args)),
                partial_restore=True,
            )
            with _unreadable(path, "cannot be read"):
                restored |= flatten_dict(checkpointer.restore(path.absolute(), args=args))
            _give_back_freed_memory()
    return unflatten_dict(restored)


@contextlib.contextmanager
def _unreadable(path: Path, what: str) -> Iterator[None]:
    """Raise ValueError in one line for the many kinds of errors of Orbax, TensorStore and JAX."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, OSError):  # of the device or the disk, not of the content
        raise
    except Exception as error:
        raise ValueError(f"{path} {what}: {reason_of(error)}") from error


def _give_back_freed_memory() -> None:
    """Return freed memory to the system; glibc keeps it otherwise, which adds up over arrays."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _large_alone(leaves: dict) -> Iterator[dict]:
    """Yield groups of arrays to restore together: large ones alone, largest first, then the rest.

    An array needs its size a second time while it is unpacked, so large ones do not share a group.
    """
    large = {k: x for k, x in leaves.items() if x.size * x.dtype.itemsize > LARGE_BYTES}
    for key in sorted(large, key=lambda key: -large[key].size):
        yield {key: large[key]}
    yield {k: x for k, x in leaves.items() if k not in large}
