"""Sampling settings: guidance, temperature and logit filters."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from aim_jax.utils.checks import ArgumentError, shortened, shown

SCHEDULES = ("constant", "linear", "cosine")  # growth of guidance over an image


class Setting(NamedTuple):
    """Type, valid range and help text of a numeric setting.

    Validation, command lines, sliders and exported programs all read it.

    Attributes:
      kind: int or float, stored in arrays as int32 or float32.
      accepts: returns whether a number is in range, after rounding to the dtype of the kernels.
      expected: the valid range in words.
      help: one-line description for users.
      slider: minimum, maximum (None for the vocabulary size) and step of a slider.
    """

    kind: type
    accepts: Callable[[float], bool]
    expected: str
    help: str
    slider: tuple[float, float | None, float]

    @property
    def dtype(self) -> type[np.generic]:
        """Array dtype of the setting."""
        return np.int32 if self.kind is int else np.float32


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings for sampling tokens from logits.

    Guidance, temperature and filters are applied in the order of the fields. Each numeric setting
    is one number for all images, or a sequence with one number per image. `cfg_schedule` and
    `cfg_interval` hold for the whole batch.

    Attributes:
      cfg_scale: scale of classifier-free guidance; 1 disables it. See
        `aim_jax.sampling.logits.apply_cfg`.
      temperature: divisor of the logits.
      top_k: number of most likely tokens to keep; 0 disables the filter, 1 is greedy decoding.
      top_p: cumulative probability of the most likely tokens to keep; 1 disables the filter.
      min_p: minimum probability of a token, as a fraction of the highest probability; 0 disables
        the filter.
      cfg_schedule: "constant", "linear" or "cosine" growth of the guidance over an image.
      cfg_interval: range of the fraction of tokens sampled in which guidance applies; see
        `aim_jax.sampling.logits.guidance_at`.

    Raises:
      ValueError: if a setting is out of range; the message names it.
      TypeError: if a setting is not a number.
    """

    cfg_scale: Any = 2.0
    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    cfg_schedule: str = "constant"
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        for name, setting in SETTINGS.items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), setting))
        if not isinstance(self.cfg_schedule, str) or self.cfg_schedule not in SCHEDULES:
            raise ValueError(
                f"cfg_schedule={shown(self.cfg_schedule)}: expected one of {sorted(SCHEDULES)}."
            )
        object.__setattr__(self, "cfg_interval", _checked_interval(self.cfg_interval))

    @property
    def guided(self) -> bool:
        """True if any image uses guidance, which needs a second row of logits per image."""
        return bool(np.any(np.asarray(self.cfg_scale) != 1))

    def numbers(self) -> dict[str, Any]:
        """Return the numeric settings by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """Return the numeric settings of `count` images as float32 or int32 (count,), by name.

        Raises:
          ValueError: if a setting is a sequence whose length is not `count`.
        """
        for name, value in self.numbers().items():
            if np.ndim(value) and len(value) != count:
                raise ValueError(
                    f"{name}: expected one value or one per label ({count}), got {len(value)}."
                )
        return {
            name: np.full(count, getattr(self, name), setting.dtype)
            for name, setting in SETTINGS.items()
        }

    def updated(self, overrides: Mapping[str, Any]) -> "SamplingConfig":
        """Return a copy with the values of `overrides` that are not None.

        Raises:
          TypeError: if `overrides` has an unknown name.
        """
        unknown = sorted(overrides.keys() - set(FIELDS))
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: unknown sampling setting; expected {', '.join(FIELDS)}."
            )
        changes = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(self, **changes)


# Logits times guidance over temperature stay finite in float32 below this limit of both factors.
LARGEST = 1e15
FIELDS = tuple(field.name for field in dataclasses.fields(SamplingConfig))
# The numeric settings, in the order in which they are applied. Every list of settings is built
# from this table.
SETTINGS = {
    "cfg_scale": Setting(
        float,
        lambda x: abs(x) <= LARGEST,
        f"a finite number of at most {LARGEST:g}",
        "Guidance scale; 1 disables guidance.",
        (1.0, 8.0, 0.25),
    ),
    "temperature": Setting(
        float,
        lambda x: 1 / LARGEST <= x < math.inf,
        f"a positive number, {1 / LARGEST:g} or more",
        "Divisor of the logits.",
        (0.1, 2.0, 0.05),
    ),
    "top_k": Setting(
        int,
        lambda x: 0 <= x < 2**31 and x == int(x),
        "an integer >= 0 (0 is off)",
        "Keep the k most likely tokens; 0 is off.",
        (0, None, 1),
    ),
    "top_p": Setting(
        float,
        lambda x: 0 < x <= 1,
        "in (0, 1] (1 is off)",
        "Keep the most likely tokens up to this sum of probabilities; 1 is off.",
        (0.05, 1.0, 0.05),
    ),
    "min_p": Setting(
        float,
        lambda x: 0 <= x <= 1,
        "in [0, 1] (0 is off)",
        "Keep tokens at least this fraction as likely as the most likely; 0 is off.",
        (0.0, 1.0, 0.01),
    ),
}


def _checked_interval(interval: Any) -> tuple[float, float]:
    """Validate `cfg_interval`, as rounded to float32, and return it as Python numbers."""
    try:
        array = np.asarray(interval)
    except ValueError:  # a ragged sequence
        array = np.asarray(None)
    fits = array.shape == (2,) and array.dtype.kind in "iuf"
    if not fits or not 0 <= np.float32(array[0]) < np.float32(array[1]) <= 1:
        raise ArgumentError(
            f"cfg_interval={shortened(repr(interval))}: expected two fractions of the image in "
            "[0, 1], with start < end."
        )
    return float(array[0]), float(array[1])


def _checked(name: str, value: Any, setting: Setting) -> Any:
    """Validate a setting and return it as a Python number or a tuple of Python numbers."""
    try:
        array = np.asarray(value)
    except ValueError:  # a ragged sequence
        array = np.asarray(None)
    if array.dtype.kind not in "iuf" or array.ndim > 1 or not array.size:
        raise TypeError(
            f"{name}={shortened(repr(value))}: expected {setting.expected}, or one per image."
        )
    for number in np.ravel(array).tolist():
        with np.errstate(over="ignore"):
            # Kernels receive the rounded number. Integers stay exact, since int32 would wrap.
            rounded = number if setting.kind is int else float(np.float32(number))
        if not math.isfinite(number) or not setting.accepts(rounded):
            raise ValueError(f"{name}={shown(number)}: expected {setting.expected}.")
    numbers = [setting.kind(number) for number in np.ravel(array).tolist()]
    return tuple(numbers) if array.ndim else numbers[0]
