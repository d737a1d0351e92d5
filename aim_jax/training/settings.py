"""Checks of a training configuration before any work starts."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from aim_jax.utils.checks import (
    BELOW_ONE,
    INT32_MAX,
    NOT_NEGATIVE,
    ArgumentError,
    Range,
    check_integer,
    check_number,
    check_type,
)

# Numbers that the training step uses in float32.
NUMBERS: dict[str, Range] = {
    "ema_decay": BELOW_ONE,
    "save_minutes": NOT_NEGATIVE,
    "optimizer.lr": NOT_NEGATIVE,
    "optimizer.end_lr": NOT_NEGATIVE,
    "optimizer.b1": BELOW_ONE,
    "optimizer.b2": BELOW_ONE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_norm": NOT_NEGATIVE,
    "optimizer.spike_factor": NOT_NEGATIVE,
    "lora.alpha": NOT_NEGATIVE,
}
# Smallest values of integers.
INTEGERS: dict[str, int] = {
    "seed": 0,
    "steps": 0,
    "batch_size": 1,
    "accumulate": 1,
    "log_every": 1,
    "eval_every": 0,
    "sample_every": 0,
    "save_every": 0,
    "export_every": 0,
    "keep": 1,
    "restart_codes": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.skip_limit": 1,
    "lora.rank": 0,
    "data.image_size": 1,
    "data.channels": 1,
    "data.resize_size": 0,
    "data.workers": 0,
    "mesh.data": -1,
    "mesh.model": 1,
    "mesh.slices": 1,
    "discriminator.ch": 1,
    "discriminator.depth": 1,
    "sample.images": 1,
    "sample.classes": 1,
    "sample.per_class": 1,
}
TEXTS = (
    "stage", "profile", "init", "export_dtype", "tokenizer", "codes", "lpips", "inception",
    "optimizer.schedule", "data.name", "data.dir", "data.fit",
)  # fmt: skip
SWITCHES = ("decoder_only", "data.random_crop", "data.random_flip", "mesh.fsdp")
# Settings of one of the two stages; all others are in both.
OF_ONE_STAGE = (
    "restart_codes", "decoder_only", "lpips", "inception", "tokenizer", "codes", "sample.images",
    "sample.classes", "sample.per_class", "discriminator.ch", "discriminator.depth", "lora.rank",
    "lora.alpha",
)  # fmt: skip


def check_settings(config: ConfigDict) -> None:
    """Check types and ranges of a training configuration; numbers as rounded to float32.

    Raises:
      ArgumentError: the configuration, or a setting, has the wrong type.
      ValueError: a setting is missing or out of range.
    """
    if not isinstance(config, ConfigDict):
        raise ArgumentError(
            f"config: expected a ConfigDict, as from aim_jax.configs.defaults, got a "
            f"{type(config).__name__}."
        )
    for name, allowed in NUMBERS.items():
        for value in _values(config, name):
            check_number(f"config.{name}", value, allowed)
    for name, low in INTEGERS.items():
        for value in _values(config, name):
            check_integer(f"config.{name}", value, low, INT32_MAX)
    for names, kind in ((TEXTS, str), (SWITCHES, bool)):
        for name in names:
            for value in _values(config, name):
                check_type(f"config.{name}", value, kind)


def _values(config: ConfigDict, name: str) -> Sequence[Any]:
    """Return the value of a setting in a list, which is empty if the stage has no such setting.

    Raises:
      ValueError: the setting is missing.
    """
    value: Any = config
    for key in name.split("."):
        if not isinstance(value, ConfigDict) or key not in value:
            if name in OF_ONE_STAGE:
                return ()
            raise ValueError(
                f"config.{name} is missing; start from aim_defaults or vq_defaults of "
                "aim_jax.configs.defaults."
            )
        value = value[key]
    return (value,)
