"""Conversion of complete checkpoints: official files to model directories, and back."""

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from aim_jax import __version__
from aim_jax.data.imagenet import imagenet_classes
from aim_jax.models.codebook import HISTORY_LENGTH
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.utils.checksums import sha256
from aim_jax.utils.endings import closing_all
from aim_jax.utils.files import writing
from aim_jax.utils.logging import say
from aim_jax.weights.adapt import rearrange_adaln
from aim_jax.weights.convert import configs, rules
from aim_jax.weights.directories import find_directory, load_directory, save_model
from aim_jax.weights.formats import file_names, files, state_dicts, torch_files
from aim_jax.weights.formats.errors import WeightsError
from aim_jax.weights.formats.tensors import LazyTensor
from aim_jax.weights.model_files import LEFTOVERS
from aim_jax.weights.pretrained import Pretrained

# Sampling settings of the authors (README of the official code).
SAMPLING = {"cfg_scale": 5.0, "temperature": 1.0, "top_k": 600, "top_p": 0.98}
# Checkpoints of a single part omit its prefix.
AIM_MODULES = ("backbone", "lm_head")
VQ_MODULES = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
BESIDES = {rules.TIED_HEAD, rules.USAGE_HISTORY}  # not parameters of their own

Config = TypeVar("Config", AiMConfig, VQConfig)


def official_keys(
    tensors: Mapping[str, LazyTensor], where: str | os.PathLike, prefix: str = ""
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Split tensors into those of AiM and of the tokenizer, by official key without wrappers.

    Args:
      tensors: Tensors by the key in the file.
      where: The file, for messages.
      prefix: See `state_dicts.plain_names`.

    Raises:
      WeightsError: Keys belong to neither part, or two keys become the same.
    """
    aim: dict[str, LazyTensor] = {}
    vq: dict[str, LazyTensor] = {}
    unknown = []
    for plain, (key, tensor) in state_dicts.plain_names(tensors, where, prefix).items():
        first = plain.split(".", 1)[0]
        name = plain
        if first in AIM_MODULES:
            name = rules.AIM_PREFIX + plain
        elif first in VQ_MODULES:
            name = rules.VQ_PREFIX + plain
        if name in aim or name in vq:
            raise WeightsError(f"{where}: {key} occurs under two names.")
        if name.startswith(rules.AIM_PREFIX):
            aim[name] = tensor
        elif name.startswith(rules.VQ_PREFIX):
            vq[name] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise WeightsError(
            f"{where}: {len(unknown)} keys belong neither to AiM ({rules.AIM_PREFIX}*) nor to its "
            f"tokenizer ({rules.VQ_PREFIX}*): {', '.join(sorted(unknown)[:10])}. If the weights "
            "have names with another prefix, pass it as --prefix."
        )
    return aim, vq


def load_official(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read official weights completely.

    Args:
      path: See `open_weights`.

    Returns:
      The tensors of AiM and those of the tokenizer, by official key; one of them may be empty.

    Raises:
      FileNotFoundError, WeightsError: See `open_weights`; or keys belong to neither part.
    """
    aim, vq = official_keys(files.open_weights(path).tensors, path)
    return _arrays(aim), _arrays(vq)


def _arrays(tensors: Mapping[str, LazyTensor]) -> dict[str, np.ndarray]:
    return {key: np.asarray(tensor) for key, tensor in tensors.items()}


def aim_config(tensors: Mapping, config: Mapping | None, **overrides: Any) -> AiMConfig:
    """Return the configuration of an AiM from its config.json if present, else its tensors."""
    return _config(
        tensors, config, configs.aim_config_from_official, configs.infer_aim_config, **overrides
    )


def vq_config(tensors: Mapping, config: Mapping | None) -> VQConfig:
    """Return the configuration of a tokenizer from its config.json if present, else its tensors."""
    return _config(tensors, config, configs.vq_config_from_official, configs.infer_vq_config)


def _config(
    tensors: Mapping,
    config: Mapping | None,
    read: Callable[..., Config],
    infer: Callable[..., Config],
    **overrides: Any,
) -> Config:
    try:
        if config is None:
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            return infer(shapes, **overrides)
        shape = read(config, **overrides)
    except (TypeError, OverflowError, ValueError) as error:
        prefix = "" if config is None else f"{file_names.CONFIG}: "
        raise WeightsError(f"{prefix}{str(error).rstrip('.')}.") from None
    # Refuse impossible sizes before anything is built from them.
    size = sum(math.prod(tensor.shape) for tensor in tensors.values())
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        kind = type(field.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise WeightsError(
                f"{file_names.CONFIG}: {field.name}={value!r}; expected {kind.__name__}."
            )
        if isinstance(value, int) and value > size:
            raise WeightsError(
                f"{file_names.CONFIG}: {field.name}={value} exceeds the total number of weights."
            )
        depth: Any = len(value) if isinstance(value, tuple) else value
        if field.name in ("n_layer", "num_res_blocks", "ch_mult") and depth > len(tensors):
            raise WeightsError(
                f"{file_names.CONFIG}: {field.name}={value} exceeds the total number of tensors."
            )
    return shape


def to_jax(
    weights: str | os.PathLike,
    out: str | os.PathLike,
    *,
    vq: str | os.PathLike | None = None,
    config: str | os.PathLike | None = None,
    position_offset: int = 1,
    adaln: str | None = None,
    num_groups: int = 1,
    approximate: bool = False,
    dtype: str | None = None,
    class_names: tuple[str, ...] | None = None,
    weights_key: str = "",
    prefix: str = "",
    vq_weights_key: str = "",
    vq_prefix: str = "",
    write: Callable[..., Any] = save_model,
) -> Path:
    """Convert official weights into a model directory, which is written atomically.

    Memory holds at most the parameters and one tensor.

    Args:
      weights: AiM with or without its tokenizer, or a tokenizer alone; see `open_weights`.
      out: Model directory to create.
      vq: Tokenizer to use instead of the one in `weights`.
      config: config.json of `weights`, if it is not beside them.
      position_offset: 1 samples as the official sampler does, 0 as the official training does.
      adaln, num_groups: Another adaLN arrangement; see `rearrange_adaln`.
      approximate: Allow an arrangement that changes the model.
      dtype: Storage dtype; None keeps the dtypes of the file.
      class_names: By default the names of ImageNet for 1000 classes, else none.
      weights_key: Dictionary of the pickle `weights` to read; see `open_weights`.
      prefix: Prefix of the names of the tensors to take; see `state_dicts.plain_names`.
      vq_weights_key, vq_prefix: The same for `vq`.
      write: Writes the model directory, as `save_model`.

    Raises:
      FileNotFoundError: A file is missing.
      WeightsError, ValueError: `out` exists, or the files or their tensors are not those of a
        model.
    """
    _check_free(Path(out))
    if vq is None and (vq_weights_key or vq_prefix):
        raise WeightsError("vq_weights_key and vq_prefix describe the file vq, which is not given.")
    opened = _open_source(weights, weights_key, prefix)
    other = None if vq is None else _open_source(vq, vq_weights_key, vq_prefix)
    aim, tokenizer = _parts(opened, other, config)
    sources = [(path, source.key) for source in (opened, other) if source for path in source.files]
    model = Pretrained(
        name=str(weights),
        aim_config=aim_config(*aim, position_offset=position_offset) if aim.tensors else None,
        vq_config=vq_config(*tokenizer) if tokenizer.tensors else None,
    )
    classes = model.aim_config.num_classes if model.aim_config else 0
    names = imagenet_classes() if class_names is None and classes == 1000 else class_names or ()
    if names and len(names) != classes:
        raise WeightsError(
            f"{len(names)} class names for {classes} classes; expected one per class."
        )

    changes: dict[str, Any] = {"class_names": tuple(names), "sampling": dict(SAMPLING)}
    with ThreadPoolExecutor(1) as pool:
        hashes = pool.submit(sha256, [path for path, _ in sources])
        if model.aim_config:
            _describe("AiM", aim.tensors, model.aim_config)
            shape = model.aim_config
            params = rules.convert_aim(aim.tensors, shape, dtype)
            if adaln is not None:
                params, shape = _rearrange(params, shape, adaln, num_groups, approximate)
            changes |= {"aim_params": params, "aim_config": shape}
        if model.vq_config:
            _describe("tokenizer", tokenizer.tensors, model.vq_config)
            changes["vq_params"] = rules.convert_vq(tokenizer.tensors, model.vq_config, dtype)
        provenance = {
            "sources": [
                {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
                | ({"weights_key": key} if key else {})
                for (path, key), digest in zip(sources, hashes.result(), strict=True)
            ],
            "converter": f"aim_jax {__version__}",
        }
    model = dataclasses.replace(model, **changes)
    info = {"data": _describe_data(model), "provenance": provenance}
    extra_files: dict[str, Callable[[Path], None]] = {}
    if rules.USAGE_HISTORY in tokenizer.tensors:
        history = np.asarray(tokenizer.tensors[rules.USAGE_HISTORY])
        extra_files[LEFTOVERS] = lambda path: _write_history(path, history)
    write(Path(out), dataclasses.replace(model, info=info), None, extra_files)
    return Path(out)


class Part(NamedTuple):
    """Tensors of AiM or of a tokenizer by official key, and their config.json or None."""

    tensors: dict[str, LazyTensor]
    config: dict | None


class Source(NamedTuple):
    """Opened weights.

    Attributes:
      path: The file or directory that was named.
      aim, vq: Tensors of AiM and of a tokenizer by official key; either may be empty.
      config: Content of the config.json beside them, or None.
      files: Files that hold the tensors.
      key: Dictionary of the file that they were taken from, or "".
    """

    path: str | os.PathLike
    aim: dict[str, LazyTensor]
    vq: dict[str, LazyTensor]
    config: dict | None
    files: tuple[Path, ...]
    key: str


def _open_source(path: str | os.PathLike, weights_key: str, prefix: str) -> Source:
    opened = files.open_weights(path, weights_key)
    aim, vq = official_keys(opened.tensors, path, prefix)
    return Source(path, aim, vq, opened.config, opened.files, opened.weights_key)


def _parts(
    opened: Source, other: Source | None, config: str | os.PathLike | None
) -> tuple[Part, Part]:
    """Return AiM and its tokenizer, which may be in a file of its own; either may be empty."""
    content = opened.config if config is None else files.read_object(Path(config))
    if not opened.aim and not opened.vq:
        raise WeightsError(f"{opened.path}: holds neither an AiM nor a tokenizer.")
    aim = Part(opened.aim, content)
    if other is None:
        # The config.json of a file with both parts describes only the AiM.
        return aim, Part(opened.vq, None if opened.aim else content)
    if not other.vq:
        raise WeightsError(f"{other.path}: holds no tokenizer.")
    if not opened.aim:
        raise WeightsError(
            f"{opened.path}: holds no AiM that the tokenizer {other.path} could belong to."
        )
    if opened.vq:
        say(f"ignoring the tokenizer in {opened.path} in favour of {other.path}")
    if other.aim:
        say(f"ignoring the AiM in {other.path} in favour of {opened.path}")
    return aim, Part(other.vq, None if other.aim else other.config)


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise WeightsError(f"{out} exists already; remove it, or choose another path.")


def _describe(what: str, tensors: Mapping, config: AiMConfig | VQConfig) -> None:
    size = sum(math.prod(tensors[key].shape) for key in tensors.keys() - BESIDES)
    say(f"{what} with {size:,} parameters: {config}")


def _rearrange(
    params: dict, config: AiMConfig, adaln: str, num_groups: int, approximate: bool
) -> tuple[dict, AiMConfig]:
    params, target, error = rearrange_adaln(params, config, adaln, num_groups)
    if error and not approximate:
        raise WeightsError(
            f"adaLN {adaln!r} with {target.num_groups} group(s) cannot express this model: its "
            f"maps would change by {error:.1%}; allow it with approximate (as a start for "
            "training), or choose 'layer', which is exact."
        )
    say(f"adaLN rearranged; relative error of its maps: {error:.3g}")
    return params, target


def _write_history(path: Path, history: np.ndarray) -> None:
    shapes = {rules.USAGE_HISTORY: (history.shape, history.dtype)}
    files.write_safetensors(path, shapes, [(rules.USAGE_HISTORY, history)], {"format": "pt"})


def _describe_data(model: Pretrained) -> dict:
    """Return the data section of the model's images: ImageNet, at the size of its token grid."""
    factor = model.vq_config.downsampling if model.vq_config else 16
    side = math.isqrt(model.aim_config.num_tokens) * factor if model.aim_config else 256
    return {
        "name": "imagenet2012" if len(model.class_names) in (0, 1000) else "",
        "image_size": side,
        "channels": model.vq_config.in_channels if model.vq_config else 3,
        "fit": "resize",
        "resize_size": 0,
        "random_crop": False,
        "random_flip": False,
    }


def to_torch(
    checkpoint: str | os.PathLike, out: str | os.PathLike, dtype: str | None = None
) -> Path:
    """Convert a model directory into official weights, which are written atomically.

    Args:
      checkpoint: Model directory, training workdir or bundled model.
      out: File or directory to create. The suffix determines the format:
        *.safetensors: every part, as on the hub, without the tied output matrix;
        *.bin: every part, as a torch pickle, with the output matrix;
        *.pt: the tokenizer alone, as in LlamaGen: a pickle {"model": ...} without prefixes;
        no suffix: a directory with config.json and model.safetensors, which the official
        `from_pretrained` reads.
      dtype: Dtype of the tensors; None keeps the stored one.

    Raises:
      WeightsError: `out` exists or has another suffix, or the model lacks the part.
    """
    out = Path(out)
    _check_free(out)
    if out.suffix not in (".safetensors", ".bin", ".pt", ""):
        raise WeightsError(f"{out}: expected *.safetensors, *.bin, *.pt, or a directory's name.")
    directory = find_directory(checkpoint)
    if directory is None:
        raise FileNotFoundError(f"no model {str(checkpoint)!r}: expected a model directory.")
    model = load_directory(directory, str(checkpoint), as_stored=True, verify=True)
    if out.suffix == ".pt" and not model.vq_config:
        raise WeightsError(f"{checkpoint}: holds no tokenizer, but *.pt files need one.")
    if model.vq_config and not model.vq_config.l2_norm and (model.aim_config or out.suffix):
        raise WeightsError(
            f"{checkpoint}: its tokenizer has l2_norm=False, which only the config.json of "
            "a directory with a tokenizer alone can record."
        )

    parts: list[tuple[AiMConfig | VQConfig, dict]] = []
    if model.aim_config and out.suffix != ".pt":
        parts.append(model.aim())
    if model.vq_config:
        parts.append(model.vq())
    config = (
        configs.official_aim_config(model.aim_config)
        if model.aim_config
        else configs.official_vq_config(model.vq()[0])
    )
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    streams: list[Iterable[tuple[str, np.ndarray]]] = []
    for shape, params in parts:
        described, stream = rules.stream_official(params, shape)
        shapes |= {
            key: (size, stored if dtype is None else jnp.dtype(dtype))
            for key, (size, stored) in described.items()
        }
        streams.append(stream)
    if model.vq_config:
        history = _read_history(directory)
        shapes[rules.USAGE_HISTORY] = (history.shape, history.dtype)
        streams.append([(rules.USAGE_HISTORY, history)])
    prefix = rules.VQ_PREFIX if out.suffix == ".pt" else ""
    tied = {rules.TIED_HEAD: rules.TOKEN_EMBEDDING} if rules.TOKEN_EMBEDDING in shapes else {}

    work = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    with writing(out), closing_all() as at_end:
        at_end(functools.partial(shutil.rmtree, work, ignore_errors=True))
        work.mkdir(parents=True)
        files.write_safetensors(
            work / file_names.SAFETENSORS,
            {key.removeprefix(prefix): shape for key, shape in shapes.items()},
            _cast(itertools.chain(*streams), shapes, prefix),
            {"format": "pt"} | tied,  # tells the hub's loader where the tied matrix is
        )
        del model, parts, streams  # a pickle is made from the file, without a second copy in memory
        if out.suffix == "":
            (work / file_names.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            os.replace(work, out)
        elif out.suffix == ".safetensors":
            os.replace(work / file_names.SAFETENSORS, out)
        else:
            nest = "model" if out.suffix == ".pt" else None
            tensors = files.open_weights(work / file_names.SAFETENSORS).tensors
            torch_files.write_torch(work / file_names.TORCH, tensors, {} if prefix else tied, nest)
            os.replace(work / file_names.TORCH, out)
    return out


def _cast(tensors: Iterable, shapes: Mapping, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key without prefix, array in the announced dtype); refuse values that overflow it."""
    for key, tensor in tensors:
        dtype = shapes[key][1]
        with np.errstate(over="ignore"):
            cast = tensor.astype(dtype, copy=False)
        if not np.isfinite(cast).all():
            raise WeightsError(f"{key}: holds values that {dtype} cannot represent.")
        yield key.removeprefix(prefix), cast


def _read_history(directory: Path) -> np.ndarray:
    """Return the official buffer of codebook usage: the converted one, or an unused one."""
    buffers = directory / LEFTOVERS
    if buffers.is_file():
        return np.asarray(files.open_weights(buffers).tensors[rules.USAGE_HISTORY])
    return np.zeros(HISTORY_LENGTH, np.float32)
