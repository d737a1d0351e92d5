"""The settings of sampling: guidance, temperature and the filters of logits."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from aim_jax.sampling.logits import SCHEDULES


class Setting(NamedTuple):
    """What a numeric setting may be, for checks, command lines, sliders and exported programs.

    Attributes:
      kind: int or float; arrays of it are int32 or float32.
      accepts: tells whether a number, as the kernels get it, is in range.
      expected: the range in words.
      help: one line for users.
      slider: least, most (None: the vocabulary) and step of a slider.
    """

    kind: type
    accepts: Callable[[float], bool]
    expected: str
    help: str
    slider: tuple[float, float | None, float]

    @property
    def dtype(self) -> type[np.generic]:
        """The dtype of the setting's arrays."""
        return np.int32 if self.kind is int else np.float32


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are sampled from logits: guidance, temperature and filters, in this order.

    The numbers may be one for all images, or a sequence with one per image. The last two fields are
    compiled into the sampling loop.

    Attributes:
      cfg_scale: classifier-free guidance; 1 is none. See `aim_jax.sampling.logits.apply_cfg`.
      temperature: divides the logits.
      top_k: keeps the k most likely tokens; 0 is off, 1 is greedy.
      top_p: keeps the most likely tokens up to this sum of probabilities; 1 is off.
      min_p: keeps tokens that are at least this fraction as likely as the most likely; 0 is off.
      cfg_schedule: "constant", "linear" or "cosine" growth of the guidance over an image.
      cfg_interval: fractions of the tokens between which there is guidance; see `guidance_at`.

    Raises:
      ValueError: a setting is out of range; the message names it.
      TypeError: a setting is not a number.
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
        if self.cfg_schedule not in SCHEDULES:
            raise ValueError(
                f"cfg_schedule={self.cfg_schedule!r}: expected one of {sorted(SCHEDULES)}."
            )
        interval = self.cfg_interval
        if np.shape(interval) != (2,) or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"cfg_interval={interval!r}: expected two fractions of the image, start < end, in "
                "[0, 1]."
            )
        object.__setattr__(self, "cfg_interval", (float(interval[0]), float(interval[1])))

    @property
    def guided(self) -> bool:
        """Whether any image has guidance, which takes a second row of logits per image."""
        return bool(np.any(np.asarray(self.cfg_scale) != 1))

    def numbers(self) -> dict[str, Any]:
        """The numeric settings by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    def arrays(self, count: int) -> dict[str, np.ndarray]:
        """The numeric settings of `count` images: float32 or int32 (count,), by name.

        Raises:
          ValueError: a setting is a sequence of another length.
        """
        for name, value in self.numbers().items():
            if np.ndim(value) and len(value) != count:
                raise ValueError(
                    f"{name}: expected one value, or one per label ({count}), not {len(value)}."
                )
        return {
            name: np.full(count, getattr(self, name), setting.dtype)
            for name, setting in SETTINGS.items()
        }

    def updated(self, overrides: Mapping[str, Any]) -> "SamplingConfig":
        """The settings with those of `overrides` that are not None in their place.

        Raises:
          TypeError: a name that is no setting.
        """
        unknown = sorted(overrides.keys() - set(FIELDS))
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: no such sampling setting; there are {', '.join(FIELDS)}."
            )
        given = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(self, **given)


FIELDS = tuple(field.name for field in dataclasses.fields(SamplingConfig))
# The numeric settings, in the order in which they act. Whatever lists settings reads this.
SETTINGS = {
    "cfg_scale": Setting(
        float, math.isfinite, "a finite number", "Guidance; 1 is none.", (1.0, 8.0, 0.25)
    ),
    "temperature": Setting(
        float,
        lambda x: 0 < x < math.inf,
        "a positive number",
        "Divides the logits.",
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


def _checked(name: str, value: Any, setting: Setting) -> Any:
    """A number, or a tuple of them, of Python's type; see `SamplingConfig`."""
    try:
        given = np.asarray(value)
    except ValueError:  # a ragged sequence
        given = np.asarray(None)
    if given.dtype.kind not in "iuf" or given.ndim > 1 or not given.size:
        raise TypeError(f"{name}={value!r}: expected {setting.expected}, or one per image.")
    for number in np.ravel(given).tolist():
        with np.errstate(over="ignore"):
            # What the kernels get; integers are compared as they are, since int32 would wrap.
            rounded = number if setting.kind is int else float(np.float32(number))
        if not math.isfinite(number) or not setting.accepts(rounded):
            raise ValueError(f"{name}={number}: expected {setting.expected}.")
    plain = [setting.kind(number) for number in np.ravel(given).tolist()]
    return tuple(plain) if given.ndim else plain[0]
