"""Trained models: self-describing directories on disk, and what they hold in memory.

A model directory holds `model.json` (configurations, class names, sampling defaults, provenance)
and the parameters of one or both parts as `aim/` and `vq/`, written by Orbax.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
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

from aim_jax.models import aim, vq
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.parallel.sharding import to_host
from aim_jax.utils.files import replacing
from aim_jax.weights import hub

MODEL_FILE = "model.json"
FORMAT_VERSION = 1
CHUNK_BYTES = 8 * 2**20  # written at once
LARGE_BYTES = 64 * 2**20  # read alone
EXPORT_DTYPES = ("float32", "float16", "bfloat16")  # what parameters are stored in
MOST_CLASSES = 20  # of a model with many, those that programs draw and name unasked


def flatten(tree: dict) -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    return flatten_dict(tree, sep=".")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model directory in memory; a part that it lacks is None.

    Attributes:
      name: where it came from.
      aim_config, aim_params: the autoregressive model; float32 unless loaded as stored.
      vq_config, vq_params: the tokenizer; float32 unless loaded as stored.
      class_names: one per class, or empty.
      sampling: its own values of fields of `aim_jax.sampling.SamplingConfig`.
      info: everything else that the directory says of itself (data set, image size, provenance).
    """

    name: str
    aim_config: AiMConfig | None = None
    aim_params: dict | None = None
    vq_config: VQConfig | None = None
    vq_params: dict | None = None
    class_names: tuple[str, ...] = ()
    sampling: dict = dataclasses.field(default_factory=dict)
    info: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.aim_config and self.vq_config):
            return
        if self.aim_config.vocab_size != self.vq_config.n_embed:
            raise ValueError(
                f"{self.name}: the AiM has a vocabulary of {self.aim_config.vocab_size}, but the "
                f"tokenizer has {self.vq_config.n_embed} codes; they do not belong together."
            )

    def aim(self) -> tuple[AiMConfig, dict]:
        """Configuration and parameters of the autoregressive model.

        Raises:
          ValueError: the model has none.
        """
        if self.aim_config is None or self.aim_params is None:
            raise ValueError(f"{self.name} holds no AiM.")
        return self.aim_config, self.aim_params

    def vq(self) -> tuple[VQConfig, dict]:
        """Configuration and parameters of the tokenizer.

        Raises:
          ValueError: the model has none.
        """
        if self.vq_config is None or self.vq_params is None:
            raise ValueError(f"{self.name} holds no tokenizer.")
        return self.vq_config, self.vq_params

    def with_position_offset(self, offset: int) -> "Pretrained":
        """The same model with position row j + `offset` for code j; see `AiMConfig`."""
        if self.aim_config is None:
            raise ValueError(f"{self.name} holds no AiM, so it has no positions.")
        config = dataclasses.replace(self.aim_config, position_offset=offset)
        return dataclasses.replace(self, aim_config=config)

    def with_tokenizer(self, other: "Pretrained") -> "Pretrained":
        """The same AiM with another tokenizer of the same codes, whose decoder was trained on.

        Raises:
          ValueError: `other` has no tokenizer, or one whose codes mean something else.
        """
        if self.vq_params is None or other.vq_params is None:
            raise ValueError(f"{self.name} and {other.name}: expected a tokenizer in both.")
        ours, theirs = (
            flatten(vq.encoder_params(params)) for params in (self.vq_params, other.vq_params)
        )
        same = ours.keys() == theirs.keys()
        dtypes = {m.vq_config.compute_dtype for m in (self, other) if m.vq_config is not None}
        same &= len(dtypes) == 1
        if not same or not all(np.array_equal(ours[name], theirs[name]) for name in ours):
            raise ValueError(
                f"{other.name} has another encoder, codebook or compute dtype than {self.name}, so "
                "that its codes mean something else. Train its decoder with config.init and "
                "config.decoder_only=True."
            )
        info = self.info | {k: other.info[k] for k in ("data", "vq_steps") if k in other.info}
        return dataclasses.replace(
            self, vq_config=other.vq_config, vq_params=other.vq_params, info=info
        )

    def with_compute_dtype(self, dtype: str) -> "Pretrained":
        """The same model, both parts, computing in "float32" or "bfloat16"."""
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute dtype {dtype!r}: expected float32 or bfloat16.")
        changed = {
            name: dataclasses.replace(config, compute_dtype=dtype)
            for name in ("aim_config", "vq_config")
            if (config := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **changed)


def class_ids(model: Pretrained, classes: Sequence[str]) -> list[int]:
    """Class names or numbers -> ids; nothing given means all, or the first 20 of many.

    Names are compared without case; underscores and spaces are the same. What is a name is never
    taken as a number.

    Raises:
      ValueError: an unknown name or a number out of range, with what there is; or a model without
        an AiM.
    """
    if model.aim_config is None:
        raise ValueError(f"{model.name} holds a tokenizer alone; what samples is an AiM.")
    count = model.aim_config.num_classes
    if not classes:
        return list(range(min(count, MOST_CLASSES)))
    plain = lambda name: name.strip().lower().replace("_", " ")  # noqa: E731
    by_name = {plain(name): i for i, name in enumerate(model.class_names)}
    ids = []
    for item in classes:
        number = by_name.get(plain(item), int(item) if item.strip().isdecimal() else -1)
        if not 0 <= number < count:
            known = ", ".join(model.class_names[:MOST_CLASSES]) or f"ids 0 to {count - 1}"
            raise ValueError(f"unknown class {item!r}; {model.name} knows {known}.")
        ids.append(number)
    return ids


def save_model(
    path: str | os.PathLike, model: Pretrained, dtype: str | None = "float32", files: Mapping = {}
) -> Path:
    """Writes a model directory; it appears, or replaces an older one, only when it is whole.

    Where there are several processes all of them call this, and the first one writes.

    Args:
      path: the directory.
      model: what to write; parameters that are NumPy arrays already are written without a copy.
      dtype: storage type of the parameters, such as "float16" for half the size; None keeps theirs.
      files: further files, by name: functions that write to the path they are given.

    Raises:
      FileExistsError: the path is something else than a model directory or an empty one.
      ValueError: another dtype than float32, float16 or bfloat16.
    """
    path = Path(path).absolute()
    if dtype not in (None, *EXPORT_DTYPES):
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(EXPORT_DTYPES)}, or None.")
    if (
        path.exists()
        and not (path / MODEL_FILE).is_file()
        and (not path.is_dir() or any(path.iterdir()))
    ):
        raise FileExistsError(f"{path} exists, and is no model directory; name another one.")
    if jax.process_count() > 1:
        params = {name: to_host(getattr(model, name)) for name in ("aim_params", "vq_params")}
        model = dataclasses.replace(model, **params)
    if jax.process_index() == 0:
        _write_model(path, model, dtype, files)
    return path


def _write_model(path: Path, model: Pretrained, dtype: str | None, files: Mapping) -> None:
    leaves = jax.tree.leaves((model.aim_params, model.vq_params))
    stored = [dtype] if dtype else sorted({str(x.dtype) for x in leaves})
    content = {
        "format": "aim_jax model",
        "version": FORMAT_VERSION,
        "dtype": stored[0] if len(stored) == 1 else stored,
        "aim": model.aim_config and dataclasses.asdict(model.aim_config),
        "vq": model.vq_config and dataclasses.asdict(model.vq_config),
        "class_names": list(model.class_names),
        "sampling": model.sampling,
        "info": model.info,
    }
    with replacing(path) as partial:
        partial.mkdir()
        for part, params in (("aim", model.aim_params), ("vq", model.vq_params)):
            if params is not None:
                _save_params(partial / part, params, dtype)
        for file in partial.rglob("commit_success.txt"):
            file.write_text("")  # Orbax notes the local path there, which is nobody's business
        for name, write in files.items():
            write(partial / name)
        (partial / MODEL_FILE).write_text(json.dumps(content, indent=1) + "\n")


def bundled_models() -> dict[str, Path]:
    """Models that come with the package, by name."""
    root = Path(str(resources.files("aim_jax"))) / "bundled"
    return {file.parent.name: file.parent for file in sorted(root.glob(f"*/{MODEL_FILE}"))}


def find_model(name_or_path: str | os.PathLike) -> Path:
    """The model directory that a bundled name, a directory, a workdir or a hub address means.

    Raises:
      FileNotFoundError: no such model.
    """
    if str(name_or_path).startswith(hub.PREFIX):  # the network is used only when it is asked for
        name_or_path = hub.download(str(name_or_path))
    bundled = bundled_models()
    path = bundled.get(str(name_or_path), Path(name_or_path))
    if not (path / MODEL_FILE).is_file() and (path / "model" / MODEL_FILE).is_file():
        path = path / "model"
    if not (path / MODEL_FILE).is_file():
        raise FileNotFoundError(
            f"no model {str(name_or_path)!r}: expected a directory with {MODEL_FILE} (a training "
            f"workdir has one in model/ after its first export), or one of {sorted(bundled)}."
        )
    return path


def load_pretrained(name_or_path: str | os.PathLike, *, as_stored: bool = False) -> Pretrained:
    """Loads a bundled model by name, or a model directory.

    Args:
      name_or_path: "fashion_mnist", "cifar10", ...; a model directory; or a training workdir, whose
        newest exported model (`model/`) is taken; or "hf://owner/name[@revision]" on the hub, which
        needs the extra `hub` and is fetched once.
      as_stored: parameters as NumPy arrays in the types that they are stored in, instead of float32
        on the first device.

    Raises:
      FileNotFoundError: no such model.
      ValueError: the directory is not a whole model of a version that this library reads.
    """
    path = find_model(name_or_path)
    try:
        content = json.loads((path / MODEL_FILE).read_text())
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']}; this library reads {FORMAT_VERSION}")
        aim_config = content["aim"] and AiMConfig(**content["aim"])
        vq_config = content["vq"] and VQConfig(**content["vq"])
        class_names, info = tuple(content["class_names"]), content["info"]
        sampling = dict(content["sampling"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / MODEL_FILE} cannot be read as a model: {error}") from error
    load = functools.partial(_load_params, as_stored=as_stored)
    aim_params = load(path / "aim", aim.init_params, aim_config) if aim_config else None
    vq_params = load(path / "vq", vq.init_params, vq_config) if vq_config else None
    return Pretrained(
        name=str(name_or_path),
        aim_config=aim_config,
        aim_params=aim_params,
        vq_config=vq_config,
        vq_params=vq_params,
        class_names=class_names,
        sampling=sampling,
        info=info,
    )


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by the string of their path."""
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def _checkpointer(alone: bool = False) -> ocp.Checkpointer:
    """Reads and writes parameter trees without holding a second copy of them.

    Orbax copies NumPy arrays before it saves them, because it usually saves while they change. With
    `alone` the first process works without waiting for others.
    """
    processes = {"primary_host": 0, "active_processes": {0}} if alone else {}
    options = ocp.options.MultiprocessingOptions(**processes, barrier_sync_key_prefix="model")
    # One process writes: it takes replicated arrays from one device instead of a share from each,
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
    # A whole array is packed in memory before it is written, so large ones go in pieces.
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    args = ocp.args.PyTreeSave(
        params, save_args=save_args, ocdbt_target_data_file_size=2 * CHUNK_BYTES
    )
    with _checkpointer(alone=True) as checkpointer:
        checkpointer.save(path, args=args)


def _load_params(
    path: Path, init_params: Callable[..., dict], config: AiMConfig | VQConfig, as_stored: bool
) -> dict:
    """Parameters, checked against the shapes that the configuration asks for."""
    abstract = jax.eval_shape(lambda: nn.unbox(init_params(config, jax.random.key(0))))
    if not path.is_dir():
        raise ValueError(f"{path} is missing; the model directory is not whole.")
    with _checkpointer() as checkpointer:
        stored = checkpointer.metadata(path.absolute()).item_metadata
        found, wanted = by_path(stored.tree), by_path(abstract)
        wrong = [f"{k}: missing" for k in sorted(wanted.keys() - found.keys())]
        wrong += [f"{k}: unexpected" for k in sorted(found.keys() - wanted.keys())]
        wrong += [
            f"{k}: shape {tuple(found[k].shape)}, expected {wanted[k].shape}"
            for k in sorted(wanted.keys() & found.keys())
            if tuple(found[k].shape) != wanted[k].shape
        ]
        if wrong:
            raise ValueError(
                f"{path} does not fit its configuration ({len(wrong)} arrays): "
                f"{'; '.join(wrong[:5])}"
            )
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        how = (
            ocp.RestoreArgs(restore_type=np.ndarray)
            if as_stored
            else ocp.ArrayRestoreArgs(dtype=jnp.float32, sharding=sharding)
        )
        restored: dict = {}
        for group in _large_alone(flatten_dict(abstract)):
            args = ocp.args.PyTreeRestore(
                unflatten_dict(group),
                restore_args=unflatten_dict(dict.fromkeys(group, how)),
                partial_restore=True,
            )
            restored |= flatten_dict(checkpointer.restore(path.absolute(), args=args))
            _give_back_freed_memory()
    return unflatten_dict(restored)


def _give_back_freed_memory() -> None:
    """glibc keeps what threads freed, which adds up with every large array."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _large_alone(leaves: dict) -> Iterator[dict]:
    """Groups of arrays to restore together: every large one alone, largest first, then the rest.

    While it is unpacked an array needs its size again, so not all of them may be at once.
    """
    large = {k: x for k, x in leaves.items() if x.size * x.dtype.itemsize > LARGE_BYTES}
    for key in sorted(large, key=lambda key: -large[key].size):
        yield {key: large[key]}
    yield {k: x for k, x in leaves.items() if k not in large}
