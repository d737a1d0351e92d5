"""Adapters of a model (`aim_jax.models.lora`) in a directory of their own, a few megabytes.

`adapter.json` describes them and names the model and the tokenizer that they belong to, with the
fingerprints of both; `adapter.safetensors` holds their arrays, float32.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from aim_jax.models.config import AiMConfig
from aim_jax.models.lora import LoRA, adapter_shapes, merge
from aim_jax.parallel.sharding import to_host
from aim_jax.utils.checksums import sha256
from aim_jax.utils.files import replacing, write_json
from aim_jax.utils.json_files import choice, list_of, parse_json, read_json, record, text
from aim_jax.weights.adapt import adapt_aim
from aim_jax.weights.directories import bundled_models, find_directory
from aim_jax.weights.fingerprints import parameter_fingerprints
from aim_jax.weights.hub import PREFIX
from aim_jax.weights.model_files import ADAPTER_FILE, check_sampling, fields_of
from aim_jax.weights.pretrained import Pretrained, flatten

ARRAYS = "adapter.safetensors"
MOST_TOKENS = 2**20  # of an image; no array of adapters bounds them
FORMAT = "aim_jax adapter"
VERSION = 1
OTHER = record({"name": text(), "fingerprint": text()})
ENTRIES = {
    "format": choice(FORMAT),
    "version": choice(VERSION),
    "aim": fields_of(AiMConfig),
    "lora": fields_of(LoRA),
    "base": OTHER,
    "tokenizer": OTHER,
    "class_names": list_of(text()),
    "sampling": check_sampling,
    "info": record({}),
    "sha256": text(),
}


class Origin(NamedTuple):
    """Name and fingerprint of the model that adapters belong to, and of its tokenizer."""

    base: str
    base_fingerprint: str
    tokenizer: str
    tokenizer_fingerprint: str

    @classmethod
    def of(cls, base: Pretrained, tokenizer: Pretrained) -> "Origin":
        """Return the origin of adapters; names of files become absolute.

        Raises:
          ValueError: The base consists of adapters itself.
        """
        _refuse_adapters(base.name)
        return cls(
            _lasting(base.name), parameter_fingerprints(base)["AiM"],
            _lasting(tokenizer.name), parameter_fingerprints(tokenizer)["tokenizer"],
        )  # fmt: skip


def save_adapters(path: Path, model: Pretrained, lora: LoRA, origin: Origin) -> None:
    """Write adapters atomically, replacing older ones; with several processes, all call it.

    Args:
      path: Directory to write.
      model: The adapted model, with its adapters in place of its parameters.
      lora: Their rank and scale.
      origin: What they belong to.
    """
    from aim_jax.weights.formats.files import save_tensors  # not needed for other training

    arrays = to_host(model.aim_params)
    if jax.process_index() != 0:
        return
    content = {
        "format": FORMAT,
        "version": VERSION,
        "aim": model.aim()[0].fields(),
        "lora": dataclasses.asdict(lora),
        "base": {"name": origin.base, "fingerprint": origin.base_fingerprint},
        "tokenizer": {"name": origin.tokenizer, "fingerprint": origin.tokenizer_fingerprint},
        "class_names": list(model.class_names),
        "sampling": model.sampling,
        "info": model.info,
    }  # fmt: skip
    with replacing(path) as partial:
        partial.mkdir()
        save_tensors(arrays, partial / ARRAYS)
        (content["sha256"],) = sha256([partial / ARRAYS])
        parse_json(json.dumps(content).encode(), record(ENTRIES))
        write_json(partial / ADAPTER_FILE, content)


def _lasting(name: str) -> str:
    """Return a name that means the same from any directory."""
    if name in bundled_models() or not Path(name).exists():
        return name
    return os.fspath(Path(name).absolute())


def read_adapter_file(path: Path) -> dict[str, Any]:
    """Read and check the description of adapters in a directory.

    Raises:
      OSError, ValueError: It cannot be read, or describes no adapters.
    """
    content = read_json(path / ADAPTER_FILE, record(ENTRIES), "cannot be read as adapters")
    classes = AiMConfig(**content["aim"]).num_classes
    if len(content["class_names"]) not in (0, classes):
        raise ValueError(
            f"{path / ADAPTER_FILE}: class_names: expected {classes} names (aim.num_classes), got "
            f"{len(content['class_names'])}."
        )
    return content


def load_adapted(
    path: Path, name: str, load: Callable[[str], Pretrained], as_stored: bool
) -> Pretrained:
    """Load a model with its adapters merged into its parameters.

    Args:
      path: Directory of the adapters.
      name: Name of the result.
      load: Loads the base or the tokenizer by name, as stored.
      as_stored: Keep the dtypes of the base; otherwise parameters are float32.

    Raises:
      FileNotFoundError: The base or the tokenizer is not where it was.
      ValueError: The adapters are damaged, or the base or tokenizer is another one.
    """
    content = read_adapter_file(path)
    if not (path / ARRAYS).is_file() or sha256([path / ARRAYS]) != [content["sha256"]]:
        raise ValueError(f"{path}: {ARRAYS} is damaged or missing; copy the directory again.")
    base = _load_other(path, content["base"]["name"], load)
    tokenizer = base
    if content["tokenizer"]["name"] != base.name:
        tokenizer = _load_other(path, content["tokenizer"]["name"], load)
    _check_same(path, base, "AiM", content["base"])
    _check_same(path, tokenizer, "tokenizer", content["tokenizer"])
    config = AiMConfig(**content["aim"])
    lora = LoRA(**content["lora"])
    base_config, base_params = base.aim()
    adapters = _read(path / ARRAYS, adapter_shapes(config, lora))
    if config.num_tokens > MOST_TOKENS:
        raise ValueError(f"{path / ADAPTER_FILE}: aim.num_tokens is over {MOST_TOKENS:,}.")
    params, _ = adapt_aim(base_params, base_config, config)
    # In float32, as in training: a smaller dtype would lose small changes.
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    params = merge(params, adapters, lora.scale)
    vq_config, vq_params = tokenizer.vq()
    return Pretrained(
        name=name,
        aim_config=config,
        aim_params=_as(params, base_params if as_stored else None),
        vq_config=vq_config,
        vq_params=vq_params if as_stored else _as(vq_params, None),
        class_names=tuple(content["class_names"]),
        sampling=content["sampling"],
        info=content["info"],
        text=base.text,
    )


def _load_other(path: Path, name: str, load: Callable[[str], Pretrained]) -> Pretrained:
    """Load the base or the tokenizer that adapters belong to."""
    _refuse_adapters(name)
    try:
        return load(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} adapts {name}, which is needed beside it: {error}"
        ) from None


def _check_same(path: Path, other: Pretrained, part: str, entry: dict) -> None:
    """Raise ValueError if a part of a model is another one than adapters were trained with."""
    if parameter_fingerprints(other).get(part) != entry["fingerprint"]:
        raise ValueError(
            f"{path}: the {part} of {other.name} is another one than in training; its parameters "
            f"have changed since. Restore it, and name it in {ADAPTER_FILE}."
        )


def _refuse_adapters(name: str) -> None:
    """Raise ValueError if a name is that of adapters, which would lead to others without end."""
    directory = None if name.startswith(PREFIX) else find_directory(name)
    if directory is not None and (directory / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{name} holds adapters; adapt one model made of them: aim-jax publish --checkpoint "
            f"{name} --out DIR."
        )


def _read(file: Path, expected: dict) -> dict:
    """Read arrays after comparing their names and shapes with those that are expected."""
    from aim_jax.weights.formats.files import open_weights

    tensors = open_weights(file).tensors
    shapes = {name: array.shape for name, array in flatten(expected).items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise ValueError(f"{file} does not hold the arrays that {ADAPTER_FILE} describes.")
    return unflatten_dict({tuple(k.split(".")): np.asarray(x) for k, x in tensors.items()})


def _as(params: Any, like: Any) -> Any:
    """Return arrays as NumPy in the dtypes of others; or without others, float32 on a device."""
    if like is not None:
        dtypes = {name: x.dtype for name, x in flatten(like).items()}
        flat = {n: np.asarray(x, dtypes.get(n, np.float32)) for n, x in flatten(params).items()}
        return unflatten_dict({tuple(name.split(".")): x for name, x in flat.items()})
    device = jax.local_devices()[0]
    return jax.tree.map(lambda x: jax.device_put(jnp.asarray(x, jnp.float32), device), params)
