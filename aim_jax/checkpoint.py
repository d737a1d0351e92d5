"""Checkpoints with Orbax: training runs that resume exactly, and self-describing model directories.

A run directory holds `run.json` (its configuration) and `checkpoints/<step>`. A model directory
holds `model.json` (configurations, class names, sampling defaults, provenance) and the parameters
of one or both parts as `aim/` and `vq/`.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from aim_jax.models import aim, vq
from aim_jax.models.aim import AiMConfig
from aim_jax.models.vq import VQConfig
from aim_jax.monitor import say
from aim_jax.sharding import to_host

MODEL_FILE = "model.json"
RUN_FILE = "run.json"
FORMAT_VERSION = 1
CHUNK_BYTES = 8 * 2**20  # written at once
LARGE_BYTES = 64 * 2**20  # read alone
SAMPLING_DEFAULTS = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
# Settings that may change when a run goes on: length, reports, places, devices; not what it learns.
RESUMABLE = (
    "steps", "log_every", "eval_every", "sample_every", "save_every", "export_every", "keep",
    "profile", "codes", "data.dir", "data.workers", "inception", "export_dtype", "sample.images",
    "sample.per_class", "sample.classes", *(f"sample.{name}" for name in SAMPLING_DEFAULTS),
    "optimizer.skip_limit",
    "mesh.slices", "mesh.data", "mesh.model", "mesh.fsdp",
)  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Writes JSON to a temporary name, then renames it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


class SaveError(OSError):
    """A checkpoint could not be written."""


class RunCheckpoints:
    """The checkpoints of one training run: state and data iterator, the newest `keep` of them.

    Each has a list of its files with sizes and CRC-32, by which `restore_newest` tells whether one
    is whole before any process reads it.
    """

    FILES = "files.json"

    def __init__(self, workdir: Path, keep: int):
        self.directory = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._lister: threading.Thread | None = None
        self._closed = threading.Event()

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state, iterator: grain.DatasetIterator) -> None:
        """Saves in the background; a checkpoint counts only once all of it is written.

        Raises:
          SaveError: this or the save before failed; older checkpoints are as they were.
        """
        if step == self.latest_step():
            return
        # Where the iterator is does not depend on the number of processes, so that of one will do.
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(iterator.get_state())
        )
        with self._save_errors():
            self._manager.save(step, args=args)
        self._join_lister()
        self._lister = threading.Thread(target=self._list_files, args=(step,), daemon=True)
        self._lister.start()

    def wait(self) -> None:
        """Waits for the last save.

        Raises:
          SaveError: it failed.
        """
        with self._save_errors():
            self._manager.wait_until_finished()
        self._join_lister()

    def restore_newest(self, state, iterator: grain.DatasetIterator) -> tuple[int, Any]:
        """Step and state of the newest whole checkpoint; step 0 and `state` where there is none.

        Sets the iterator to where it was. Damaged checkpoints are reported and moved to `damaged/`
        in the workdir.

        Args:
          state: of the same shapes; the result takes its shardings.

        Raises:
          ValueError: there are checkpoints, but none is whole.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            if problem := self._problem(step):
                damaged[step] = problem
                self._set_aside(step, problem)
                continue
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            )
            restored = self._manager.restore(step, args=args)
            iterator.set_state(restored["data"])
            say(f"resumed from step {step} in {self.directory.parent}")
            return step, restored["state"]
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.directory} is whole ({'; '.join(damaged.values())}). They "
                "are in damaged/ beside it now; the same command starts from the beginning."
            )
        return 0, state

    def close(self) -> None:
        """Ends the background work; a failure of the last save is not reported here."""
        self._closed.set()
        self._join_lister()
        self._manager.close()

    def _list_files(self, step: int) -> None:
        """Writes the list of a checkpoint's files as soon as it has its final name."""
        path = self.directory / str(step)
        while not path.exists():
            if self._closed.wait(0.05):
                return
        if jax.process_index() == 0:
            write_json(path / self.FILES, _checksums(path))

    def _join_lister(self) -> None:
        if self._lister is not None:
            self._lister.join()
            self._lister = None

    def _problem(self, step: int) -> str:
        """What is wrong with the files of a checkpoint; all processes get the same answer."""
        problem = ""
        if jax.process_index() == 0:
            path = self.directory / str(step)
            file = path / self.FILES  # absent where the run was killed right after the save
            found, listed = _checksums(path), {}
            with contextlib.suppress(FileNotFoundError):
                try:
                    listed = json.loads(file.read_text())
                except ValueError:
                    listed = {self.FILES: "cut short"}
            wrong = sorted(name for name in listed if found.get(name) != listed[name])
            if wrong:
                state = "damaged" if wrong[0] in found else "missing"
                problem = f"step {step}: {state}: {wrong[0]}"
                problem += f" and {len(wrong) - 1} more files" if wrong[1:] else ""
        if jax.process_count() == 1:
            return problem
        text = np.frombuffer(problem.encode()[:500].ljust(500), np.uint8)
        return multihost_utils.broadcast_one_to_all(text).tobytes().decode(errors="replace").strip()

    def _set_aside(self, step: int, problem: str) -> None:
        say(f"checkpoint of {problem}; trying the one before")
        if jax.process_index() == 0:
            target = self.directory.with_name("damaged") / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            os.replace(self.directory / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    @contextlib.contextmanager
    def _save_errors(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            whole = [int(p.name) for p in self.directory.glob("*") if p.name.isdecimal()]
            newest = f"step {max(whole)}" if whole else "none yet"
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise SaveError(
                f"a checkpoint could not be written into {self.directory} ({reason}). The newest "
                f"whole one: {newest}. Make room or mend the disk, and run the same command again."
            ) from error


def _checksums(path: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file under a directory."""
    sums = {}
    for file in filter(Path.is_file, path.rglob("*")):
        size = crc = 0
        with file.open("rb") as opened:
            while data := opened.read(CHUNK_BYTES):
                size, crc = size + len(data), zlib.crc32(data, crc)
        sums[str(file.relative_to(path))] = [size, crc]
    return sums


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run in this directory would go on from a checkpoint, named by its step.

    What a save that was cut short leaves has a longer name.
    """
    return any(path.name.isdecimal() for path in (Path(workdir) / "checkpoints").glob("*"))


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Marks a directory as that of this run, or checks that it already is.

    Raises:
      ValueError: the directory belongs to a run with other settings (each one is named), or holds
        checkpoints of an unknown run.
    """
    workdir = Path(workdir)
    file, new = workdir / RUN_FILE, json.loads(config.to_json_best_effort())
    if file.exists():
        old = json.loads(file.read_text())
        changed = sorted(
            key
            for key in flatten(old).keys() | flatten(new).keys()
            # A run of an older version has no entry for what is off by default.
            if key not in RESUMABLE
            and (flatten(old).get(key) or None) != (flatten(new).get(key) or None)
        )
        if changed:
            lines = [f"{k}: {flatten(old).get(k)!r} -> {flatten(new).get(k)!r}" for k in changed]
            raise ValueError(
                f"{workdir} is the workdir of another run; settings that differ (there -> here): "
                f"{'; '.join(lines)}. Use another --workdir, or the settings of that run."
            )
    elif (workdir / "checkpoints").exists():
        raise ValueError(
            f"{workdir} holds checkpoints but no {RUN_FILE}, so it is not known which run they "
            "belong to; use another --workdir."
        )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(file, new)


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
      sampling: defaults of cfg_scale, temperature, top_k, top_p.
      info: everything else that the directory says of itself (data set, image size, provenance).
    """

    name: str
    aim_config: AiMConfig | None = None
    aim_params: dict | None = None
    vq_config: VQConfig | None = None
    vq_params: dict | None = None
    class_names: tuple[str, ...] = ()
    sampling: dict = dataclasses.field(default_factory=lambda: dict(SAMPLING_DEFAULTS))
    info: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not (self.aim_config and self.vq_config):
            return
        if self.aim_config.vocab_size != self.vq_config.n_embed:
            raise ValueError(
                f"{self.name}: the AiM has a vocabulary of {self.aim_config.vocab_size}, but the "
                f"tokenizer has {self.vq_config.n_embed} codes; they do not belong together."
            )

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
        if not same or not all(np.array_equal(ours[name], theirs[name]) for name in ours):
            raise ValueError(
                f"{other.name} has another encoder or codebook than {self.name}, so that its codes "
                "mean something else. Train its decoder with config.init and "
                "config.decoder_only=True."
            )
        return dataclasses.replace(self, vq_config=other.vq_config, vq_params=other.vq_params)

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
    """
    path = Path(path).absolute()
    if jax.process_count() > 1:
        params = {name: to_host(getattr(model, name)) for name in ("aim_params", "vq_params")}
        model = dataclasses.replace(model, **params)
    if jax.process_index() == 0:
        _write_model(path, model, dtype, files)
    return path


def _write_model(path: Path, model: Pretrained, dtype: str | None, files: Mapping) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        leaves = jax.tree.leaves((model.aim_params, model.vq_params))
        content = {
            "format": "aim_jax model",
            "version": FORMAT_VERSION,
            "dtype": dtype or sorted({str(x.dtype) for x in leaves}),
            "aim": model.aim_config and dataclasses.asdict(model.aim_config),
            "vq": model.vq_config and dataclasses.asdict(model.vq_config),
            "class_names": list(model.class_names),
            "sampling": model.sampling,
            "info": model.info,
        }
        for part, params in (("aim", model.aim_params), ("vq", model.vq_params)):
            if params is not None:
                _save_params(partial / part, params, dtype)
        for file in partial.rglob("commit_success.txt"):
            file.write_text("")  # Orbax notes the local path there, which is nobody's business
        for name, write in files.items():
            write(partial / name)
        (partial / MODEL_FILE).write_text(json.dumps(content, indent=1) + "\n")
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def bundled_models() -> dict[str, Path]:
    """Models that come with the package, by name."""
    root = Path(str(resources.files("aim_jax"))) / "pretrained"
    return {file.parent.name: file.parent for file in sorted(root.glob(f"*/{MODEL_FILE}"))}


def find_model(name_or_path: str | os.PathLike) -> Path:
    """The model directory that a bundled name, a directory, a workdir or a hub address means.

    Raises:
      FileNotFoundError: no such model.
    """
    if str(name_or_path).startswith("hf://"):  # the network is used only when it is asked for
        from aim_jax.hub import download

        name_or_path = download(str(name_or_path))
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
        sampling = SAMPLING_DEFAULTS | content["sampling"]
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


def by_path(tree) -> dict[str, Any]:
    """Leaves of a tree by the string of their path."""
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def _checkpointer(alone: bool = False) -> ocp.Checkpointer:
    """Reads and writes parameter trees without holding a second copy of them.

    Orbax copies NumPy arrays before it saves them, because it usually saves while they change. With
    `alone` the first process works without waiting for others.
    """
    processes = {"primary_host": 0, "active_processes": {0}} if alone else {}
    options = ocp.options.MultiprocessingOptions(**processes, barrier_sync_key_prefix="model")
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
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


def _load_params(path: Path, init_params, config, as_stored: bool) -> dict:
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
