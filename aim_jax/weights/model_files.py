"""Checks of the description of a model directory, `model.json` or `config.json`.

Its sections `aim`, `vq` and `sampling` are fields of `AiMConfig`, `VQConfig` and `SamplingConfig`,
which check types and ranges; unknown fields are refused. At the top, `version` is read first, and
unknown entries are ignored: a version with other entries that matter has another number.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_jax.data.preprocessing import image_spec
from aim_jax.models.config import HOW_COMPUTED, AiMConfig, VQConfig
from aim_jax.models.sampling_config import SETTINGS, SamplingConfig
from aim_jax.utils.checks import check_type, shown
from aim_jax.utils.json_files import (
    Check,
    anything,
    choice,
    dict_of,
    either,
    flag,
    integer,
    list_of,
    nullable,
    parse_json,
    read_json,
    record,
    text,
)

MODEL_FILE = "model.json"
ADAPTER_FILE = "adapter.json"  # of a directory of adapters, see `adapters`
PUBLISHED_FILE = "config.json"  # the name that hubs know; other libraries use it as well
# Official tensors that are not weights; kept so that the conversion back gives the same file.
LEFTOVERS = "official_buffers.safetensors"
FORMAT = "aim_jax model"
UNSEALED_VERSION = 1  # had no checksums
FORMAT_VERSION = 2
MOST_PIXELS = 2**16  # side of an image
# A residual block of the tokenizer has two norms and two convolutions, of two arrays each.
ARRAYS_PER_BLOCK = 8
# Most elements that a compressed byte on disk stands for: more of them would be constants.
ELEMENTS_PER_BYTE = 256


def description_file(directory: Path) -> Path | None:
    """Return the description of a model directory, or None if it is not one.

    Raises:
      ValueError: The directory holds two models.
    """
    own = directory / MODEL_FILE
    published = directory / PUBLISHED_FILE
    if not published.is_file():
        return own if own.is_file() else None
    is_ours = FORMAT.encode() in published.read_bytes()
    if own.is_file() and (is_ours or any(directory.glob("*.safetensors"))):
        raise ValueError(
            f"{directory} holds two models, {MODEL_FILE} and {PUBLISHED_FILE} with its "
            ".safetensors; move one of them to a directory of its own."
        )
    if own.is_file():
        return own
    return published if is_ours else None


def read_description(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Read and check the description of a model directory; return its path and content.

    Raises:
      OSError: It cannot be read.
      ValueError: It is damaged, of another version, or describes no model.
    """
    file = description_file(directory) or directory / MODEL_FILE
    if (directory / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{directory} holds adapters of another model; make one model of both with aim-jax "
            f"publish --checkpoint {directory} --out DIR."
        )
    return file, read_json(file, _check_model, "cannot be read as a model")


def check_content(content: dict[str, Any]) -> None:
    """Check the content of a description before it is written.

    Raises:
      ValueError: `read_description` would refuse it.
    """
    try:
        parse_json(json.dumps(content).encode(), _check_model)
    except ValueError as error:
        raise ValueError(f"the model cannot be described: {error}") from None


def _check_model(name: str, content: Any) -> None:
    record({"version": integer()})(name, content)
    if content["version"] not in (UNSEALED_VERSION, FORMAT_VERSION):
        raise ValueError(
            f"version {shown(content['version'])}; this library reads {UNSEALED_VERSION} and "
            f"{FORMAT_VERSION}."
        )
    record(REQUIRED, OPTIONAL)(name, content)
    names = len(content["class_names"])
    classes = names if content["aim"] is None else AiMConfig(**content["aim"]).num_classes
    if names not in (0, classes):
        raise ValueError(f"class_names: expected {classes} names (aim.num_classes), got {names}.")


def fields_of(kind: type) -> Check:
    """Check the fields of a configuration, which checks their values."""
    known = {field.name: anything for field in dataclasses.fields(kind)}

    def check(name: str, value: Any) -> None:
        record({}, known, closed=True)(name, value)
        try:
            kind(**value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{name}: {error}") from None

    return check


def check_sampling(name: str, value: Any) -> None:
    """Check JSON values of fields of `SamplingConfig`, one number each."""
    fields_of(SamplingConfig)(name, value)
    for key in SETTINGS.keys() & value.keys():
        check_type(f"{name}.{key}", value[key], float)  # not one per image


def _check_data(name: str, value: Any) -> None:
    """Check the data section, which describes the preprocessing of images."""
    record(DATA_REQUIRED, DATA_OPTIONAL)(name, value)
    try:
        image_spec(ConfigDict(value))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from None


DATA_REQUIRED: dict[str, Check] = {
    "image_size": integer(1, MOST_PIXELS),
    "channels": choice(1, 3),
    "fit": choice("resize", "pad"),
    "resize_size": nullable(integer(0, MOST_PIXELS)),
}
DATA_OPTIONAL: dict[str, Check] = {"name": text(), "random_crop": flag, "random_flip": flag}
REQUIRED: dict[str, Check] = {
    "version": integer(),
    "aim": nullable(fields_of(AiMConfig)),
    "vq": nullable(fields_of(VQConfig)),
    "class_names": list_of(text()),
    "sampling": check_sampling,
    "info": record({}, {"data": _check_data}),
}
OPTIONAL: dict[str, Check] = {
    "format": choice(FORMAT),
    "dtype": either(text(), list_of(text())),
    "text": text(),  # fingerprint of the text tokenizer
    "files": dict_of(text()),
    "sha256": text(),
}


def check_sizes(
    config: AiMConfig | VQConfig, shapes: Mapping[str, tuple[int, ...]], stored_bytes: int
) -> None:
    """Check the sizes of a configuration against the arrays beside it, before anything is built.

    Every size but the bounded length of captions is an axis of some array, so it is at most the
    number of all their elements.

    Args:
      config: The configuration.
      shapes: Shapes of the stored arrays by name.
      stored_bytes: Size of the arrays on disk, compressed.

    Raises:
      ValueError: A size is larger than the arrays allow, or the arrays than their files.
    """
    elements = sum(map(math.prod, shapes.values()))
    if elements > ELEMENTS_PER_BYTE * stored_bytes:
        raise ValueError(
            f"its arrays claim {elements:,} elements, in files of {stored_bytes:,} bytes."
        )
    kind = type(config).__name__
    for name, value in dataclasses.asdict(config).items():
        largest = max(value) if isinstance(value, tuple) else value
        is_axis = name not in (*HOW_COMPUTED, "max_caption")
        if type(largest) is int and is_axis and largest > elements:
            raise ValueError(
                f"{kind}: {name}={largest} is larger than all of its arrays together, which have "
                f"{elements:,} elements."
            )
    if isinstance(config, VQConfig):
        blocks = len(config.ch_mult) * (2 * config.num_res_blocks + 1)
        if ARRAYS_PER_BLOCK * blocks > len(shapes):
            raise ValueError(
                f"{kind}: num_res_blocks={config.num_res_blocks} at {len(config.ch_mult)} "
                f"resolutions are {blocks} blocks of {ARRAYS_PER_BLOCK} arrays; it has only "
                f"{len(shapes)} arrays."
            )
