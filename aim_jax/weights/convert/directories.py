"""Whole checkpoints: official files into a model directory, and a model directory into them."""

import dataclasses
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
from aim_jax.utils.logging import say
from aim_jax.weights.adapt import rearrange_adaln
from aim_jax.weights.convert import configs, files, rules
from aim_jax.weights.convert.files import LazyTensor, WeightsError
from aim_jax.weights.pretrained import Pretrained, find_model, load_pretrained, save_model

# Official tensors that are no weights, kept beside them so that the way back gives the same file.
LEFTOVERS = "official_buffers.safetensors"
# What the authors sample with (README of the official code).
SAMPLING = {"cfg_scale": 5.0, "temperature": 1.0, "top_k": 600, "top_p": 0.98}
# Checkpoints of a part alone leave its prefix out.
AIM_MODULES = ("backbone", "lm_head")
VQ_MODULES = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
BESIDES = {rules.TIED_HEAD, rules.USAGE_HISTORY}  # no parameters of their own
WRAPPERS = ("module.", "_orig_mod.")  # of data-parallel and of compiled modules

Config = TypeVar("Config", AiMConfig, VQConfig)


def official_keys(
    tensors: Mapping[str, LazyTensor], where: str | os.PathLike
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Tensors of AiM and of the tokenizer by official key, whatever a training program prepended.

    Raises:
      WeightsError: keys of neither part, or two that become one.
    """
    aim: dict[str, LazyTensor] = {}
    vq: dict[str, LazyTensor] = {}
    strange = []
    seen = set()
    for key, tensor in tensors.items():
        name = key
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        first = name.split(".", 1)[0]
        if first in AIM_MODULES:
            name = rules.AIM_PREFIX + name
        elif first in VQ_MODULES:
            name = rules.VQ_PREFIX + name
        if name in seen:
            raise WeightsError(f"{where}: {key} is there under two names.")
        seen.add(name)
        if name.startswith(rules.AIM_PREFIX):
            aim[name] = tensor
        elif name.startswith(rules.VQ_PREFIX):
            vq[name] = tensor
        else:
            strange.append(key)
    if strange:
        raise WeightsError(
            f"{where}: {len(strange)} keys belong neither to AiM ({rules.AIM_PREFIX}*) nor to its "
            f"tokenizer ({rules.VQ_PREFIX}*): {', '.join(sorted(strange)[:10])}"
        )
    return aim, vq


def load_official(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Reads official weights whole.

    Args:
      path: see `open_weights`.

    Returns:
      The tensors of AiM and those of the tokenizer, by official key; one of them may be empty.

    Raises:
      FileNotFoundError, WeightsError: as `open_weights`; or keys that belong to neither part.
    """
    aim, vq = official_keys(files.open_weights(path).tensors, path)
    return _arrays(aim), _arrays(vq)


def _arrays(tensors: Mapping[str, LazyTensor]) -> dict[str, np.ndarray]:
    return {key: np.asarray(tensor) for key, tensor in tensors.items()}


def aim_config(tensors: Mapping, config: Mapping | None, **overrides: Any) -> AiMConfig:
    """Shape of an AiM from its config.json if there is one, else from its tensors."""
    return _config(
        tensors, config, configs.aim_config_from_official, configs.infer_aim_config, **overrides
    )


def vq_config(tensors: Mapping, config: Mapping | None) -> VQConfig:
    """Shape of a tokenizer from its config.json if there is one, else from its tensors."""
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
        where = "" if config is None else f"{files.CONFIG}: "
        raise WeightsError(f"{where}{str(error).rstrip('.')}.") from None
    # Before anything is built from a size that no file could fill.
    size = sum(math.prod(tensor.shape) for tensor in tensors.values())
    for field in dataclasses.fields(shape):
        value, kind = getattr(shape, field.name), type(field.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise WeightsError(f"{files.CONFIG}: {field.name}={value!r}; expected {kind.__name__}.")
        if isinstance(value, int) and value > size:
            raise WeightsError(f"{files.CONFIG}: {field.name}={value} is more than all weights.")
        depth: Any = len(value) if isinstance(value, tuple) else value
        if field.name in ("n_layer", "num_res_blocks", "ch_mult") and depth > len(tensors):
            raise WeightsError(f"{files.CONFIG}: {field.name}={value} is more than all tensors.")
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
) -> Path:
    """Converts official weights into a model directory, which appears only when it is whole.

    Never holds more than the parameters and one tensor.

    Args:
      weights: AiM with or without its tokenizer, or a tokenizer alone; see `open_weights`.
      out: the model directory to make.
      vq: tokenizer to take instead of the one in `weights`.
      config: config.json of `weights`, if it does not lie beside them.
      position_offset: 1 samples as the official sampler does, 0 as the official training does.
      adaln, num_groups: another adaLN arrangement, see `rearrange_adaln`.
      approximate: allows an arrangement that changes the model.
      dtype: storage type; None keeps that of the file.
      class_names: by default those of ImageNet where there are 1000 classes, else none.

    Raises:
      FileNotFoundError: a file is missing.
      WeightsError, ValueError: `out` exists, or the files or the tensors in them are not those of a
        model.
    """
    _check_free(Path(out))
    aim, tokenizer, sources = _open_parts(weights, vq, config)
    model = Pretrained(
        name=str(weights),
        aim_config=aim_config(*aim, position_offset=position_offset) if aim.tensors else None,
        vq_config=vq_config(*tokenizer) if tokenizer.tensors else None,
    )
    classes = model.aim_config.num_classes if model.aim_config else 0
    names = imagenet_classes() if class_names is None and classes == 1000 else class_names or ()
    if names and len(names) != classes:
        raise WeightsError(f"{len(names)} class names for {classes} classes.")

    changes: dict[str, Any] = {"class_names": tuple(names), "sampling": dict(SAMPLING)}
    with ThreadPoolExecutor(1) as pool:
        hashes = pool.map(files.sha256, sources)
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
                for path, digest in zip(sources, hashes, strict=True)
            ],
            "converter": f"aim_jax {__version__}",
        }
    model = dataclasses.replace(model, **changes)
    info = {"data": _describe_data(model), "provenance": provenance}
    leftovers: dict[str, Callable[[Path], None]] = {}
    if rules.USAGE_HISTORY in tokenizer.tensors:
        history = np.asarray(tokenizer.tensors[rules.USAGE_HISTORY])
        leftovers[LEFTOVERS] = lambda path: _write_history(path, history)
    return save_model(out, dataclasses.replace(model, info=info), None, leftovers)


class Part(NamedTuple):
    """Tensors of AiM or of a tokenizer by official key, and their config.json if there is one."""

    tensors: dict[str, LazyTensor]
    config: dict | None


def _open_parts(
    weights: str | os.PathLike,
    vq: str | os.PathLike | None,
    config: str | os.PathLike | None,
) -> tuple[Part, Part, tuple[Path, ...]]:
    """AiM, its tokenizer (either may be empty), and the files that they come from."""
    opened = files.open_weights(weights)
    flat = opened.config if config is None else files.read_json(Path(config))
    aim_tensors, vq_tensors = official_keys(opened.tensors, weights)
    if not aim_tensors and not vq_tensors:
        raise WeightsError(f"{weights}: holds neither an AiM nor a tokenizer.")
    aim = Part(aim_tensors, flat)
    if vq is None:
        # A file with both parts describes its AiM only.
        return aim, Part(vq_tensors, None if aim_tensors else flat), opened.files
    other = files.open_weights(vq)
    unused, tensors = official_keys(other.tensors, vq)
    if not tensors:
        raise WeightsError(f"{vq}: holds no tokenizer.")
    if not aim_tensors:
        raise WeightsError(f"{weights}: holds no AiM for which {vq} would be the tokenizer.")
    if vq_tensors:
        say(f"the tokenizer in {weights} is left aside for {vq}")
    if unused:
        say(f"the AiM in {vq} is left aside for {weights}")
    return aim, Part(tensors, None if unused else other.config), (*opened.files, *other.files)


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise WeightsError(f"{out} exists already; remove it, or choose another place.")


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
    say(f"adaLN rewritten; relative error of its maps: {error:.3g}")
    return params, target


def _write_history(path: Path, history: np.ndarray) -> None:
    shapes = {rules.USAGE_HISTORY: (history.shape, history.dtype)}
    files.write_safetensors(path, shapes, [(rules.USAGE_HISTORY, history)], {"format": "pt"})


def _describe_data(model: Pretrained) -> dict:
    """Pictures that the model is for: those of ImageNet, at the size of its code grid."""
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
    """Converts a model directory into official weights, which appear only when they are whole.

    Args:
      checkpoint: model directory, training workdir or bundled model.
      out: by its ending
        *.safetensors: every part, as the hub holds them, with the tied output matrix left out;
        *.bin: every part, as a pickle of torch, output matrix included;
        *.pt: the tokenizer alone, as LlamaGen holds it: a pickle {"model": ...} without prefixes;
        no ending: a directory with config.json and model.safetensors, which the official
        `from_pretrained` takes.
      dtype: of the tensors; None keeps the stored one.

    Raises:
      WeightsError: `out` exists or has another ending, a pickle is asked for without torch, or the
        model lacks the part.
    """
    out = Path(out)
    _check_free(out)
    if out.suffix not in (".safetensors", ".bin", ".pt", ""):
        raise WeightsError(f"{out}: expected *.safetensors, *.bin, *.pt, or a directory's name.")
    if out.suffix in (".bin", ".pt"):
        files.import_torch(out, "writing")
    directory = find_model(checkpoint)
    model = load_pretrained(checkpoint, as_stored=True)
    if out.suffix == ".pt" and not model.vq_config:
        raise WeightsError(f"{checkpoint}: holds no tokenizer, which is what *.pt files are for.")
    if model.vq_config and not model.vq_config.l2_norm and (model.aim_config or out.suffix):
        raise WeightsError(
            f"{checkpoint}: its tokenizer has l2_norm=False, which can only be said in the "
            "config.json of a directory with a tokenizer alone."
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
    work.mkdir(parents=True)
    try:
        files.write_safetensors(
            work / files.SAFETENSORS,
            {key.removeprefix(prefix): shape for key, shape in shapes.items()},
            _cast(itertools.chain(*streams), shapes, prefix),
            {"format": "pt"} | tied,  # this entry is how the hub's loader finds the tied matrix
        )
        del model, parts, streams  # a pickle is made from the file, not from a second copy
        if out.suffix == "":
            (work / files.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            os.replace(work, out)
        elif out.suffix == ".safetensors":
            os.replace(work / files.SAFETENSORS, out)
        else:
            nest = "model" if out.suffix == ".pt" else None
            files.write_torch(
                work / files.TORCH, work / files.SAFETENSORS, {} if prefix else tied, nest
            )
            os.replace(work / files.TORCH, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _cast(tensors: Iterable, shapes: Mapping, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """(key without prefix, array in the announced type), refusing what does not fit the type."""
    for key, tensor in tensors:
        dtype = shapes[key][1]
        with np.errstate(over="ignore"):
            cast = tensor.astype(dtype, copy=False)
        if not np.isfinite(cast).all():
            raise WeightsError(f"{key}: holds numbers that {dtype} cannot.")
        yield key.removeprefix(prefix), cast


def _read_history(directory: Path) -> np.ndarray:
    """The official buffer of codebook usage: the one that was converted, or an unused one."""
    kept = directory / LEFTOVERS
    if kept.is_file():
        return np.asarray(files.open_weights(kept).tensors[rules.USAGE_HISTORY])
    return np.zeros(HISTORY_LENGTH, np.float32)
