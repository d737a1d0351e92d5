"""Checks of arguments and settings, whose errors name the argument and what was expected."""

import functools
import inspect
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, Union

import jax
import jax.export
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")
INT32_MAX = 2**31 - 1
MOST_SHOWN = 80  # characters of a value in a message


class ArgumentError(TypeError, ValueError):
    """An argument has the wrong type; callers may expect either of the two errors."""


class Range(NamedTuple):
    """Range of a number in float32.

    Attributes:
      low, high: its ends.
      includes_low, includes_high: whether it includes them.
    """

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, number: object) -> bool:
        assert isinstance(number, float)
        above = number >= self.low if self.includes_low else number > self.low
        below = number <= self.high if self.includes_high else number < self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf and self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return (
                f"a finite number, {self.low:g} or more"
                if self.includes_low
                else (f"a finite number above {self.low:g}")
            )
        left = "[" if self.includes_low else "("
        right = "]" if self.includes_high else ")"
        return f"a number in {left}{self.low:g}, {self.high:g}{right}"


NOT_NEGATIVE = Range(0.0)
FRACTION = Range(0.0, 1.0)
BELOW_ONE = Range(0.0, 1.0, includes_high=False)


def check_number(name: str, value: Any, allowed: Range) -> None:
    """Check a number after rounding it to float32, the dtype in which it is used.

    Raises:
      ArgumentError: it is not a number.
      ValueError: it is out of range, not finite, or so small that it rounds to zero.
    """
    if not _is_real(value):
        raise ArgumentError(f"{name}={shown(value)}; expected {allowed}.")
    rounded = _to_float32(value)
    if not math.isfinite(rounded) or rounded not in allowed:
        after = _after_rounding(value, rounded)
        raise ValueError(f"{name}={shown(value, str)}; expected {allowed}{after}.")
    if rounded == 0 and value != 0:
        raise ValueError(f"{name}={value} is 0 in float32; expected 0 itself or a larger number.")


def check_integer(name: str, value: Any, low: int = 0, high: int = INT32_MAX) -> None:
    """Check an integer.

    Raises:
      ArgumentError: it is not an integer.
      ValueError: it is out of range.
    """
    if not _is_integer(value):
        raise ArgumentError(f"{name}={shown(value)}; expected an integer.")
    if not low <= operator.index(value) <= high:
        above = operator.index(value) > high
        expected = f"{low} to {high}" if above or high != INT32_MAX else f"{low} or more"
        raise ValueError(f"{name}={shown(value, str)}; expected {expected}.")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Check the type of a value.

    Args:
      name: name of the argument, for the message.
      value: the value. Elements of lists and tuples are checked too, those of arrays are not.
      hint: a type annotation. Numbers of NumPy and JAX count as numbers, and a bool does not.

    Raises:
      ArgumentError: the value has another type.
    """
    if not _matches(value, hint):
        raise ArgumentError(f"{name}: expected {_described(hint)}, got {shown(value)}.")


def check_fields(instance: Any) -> None:
    """Check the types of the fields of a dataclass; see `check_type`."""
    kind: Any = type(instance)
    for name, hint in _hints(kind).items():
        check_type(f"{kind.__name__}: {name}", getattr(instance, name), hint)


@functools.cache
def _hints(annotated: Any) -> dict[str, Any]:
    """Return the annotations of a function or class; read late, when all names are defined."""
    return typing.get_type_hints(annotated)


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function check the types of its arguments by its annotations when it is called.

    A call with another type raises `ArgumentError`, which names the function and the argument.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            if name in hints and kind not in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD):
                check_type(f"{function.__name__}: {name}", value, hints[name])
        return function(*args, **kwargs)

    return checked


def _to_float32(value: Any) -> float:
    try:
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(value))
    except OverflowError:  # an integer beyond float64
        return math.inf


def _after_rounding(value: Any, rounded: float) -> str:
    return "" if value == rounded else f", and it is {rounded:g} in float32"


def shortened(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text of at most `most` characters, whose missing end is three dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: Any, written: Callable[[Any], str] = repr) -> str:
    """Return a short text of a value for a message: itself if it is simple, else its type.

    A string is quoted, and its control characters are escaped.
    """
    if value is None or isinstance(value, str | numbers.Number | np.generic):
        return shortened(written(value))
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array {value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


@functools.cache
def _symbolic_dimension() -> type:
    """Return the type of sizes that are left open in exported programs."""
    (size,) = jax.export.symbolic_shape("n")
    return type(size)


def _is_real(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 0 and np.dtype(value.dtype).kind in "iuf"
    return isinstance(value, numbers.Real | np.number) and not isinstance(value, bool | np.bool_)


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "OUSMmV" or value.dtype.name in ("bfloat16", "float8_e4m3")
    return isinstance(value, jax.Array)


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return any(_matches(value, part) for part in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint in (None, type(None)):
        return value is None
    if origin is int:
        return _is_integer(value) or isinstance(value, _symbolic_dimension())
    if origin is float:
        return _is_real(value)
    if origin is bool:
        return isinstance(value, bool | np.bool_)
    if origin is jax.Array:
        return _is_array(value)
    if origin is Callable:
        return callable(value)
    if origin in (Sequence, Iterable, Iterator, list, tuple):
        is_many = isinstance(value, Sequence if origin is Sequence else Iterable)
        is_many |= isinstance(value, np.ndarray | jax.Array) and value.ndim > 0
        if not is_many or isinstance(value, str | bytes | Mapping):
            return False
        inner = typing.get_args(hint)[:1]
        elements = value if isinstance(value, list | tuple) and inner else ()
        return all(_matches(element, inner[0]) for element in elements)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    is_class = isinstance(origin, type) and origin is not Any
    if not is_class or getattr(origin, "_is_protocol", False):
        return True  # Any, type variables, dtypes
    return isinstance(value, origin)


def _described(hint: Any) -> str:
    origin = typing.get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_described, typing.get_args(hint))))
    if hint in (None, type(None)):
        return "None"
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    names = {
        jax.Array: "an array", int: "an integer", float: "a number", bool: "a bool",
        str: "a string", Callable: "a function", Mapping: "a mapping", dict: "a dict",
    }  # fmt: skip
    if origin in names:
        return names[origin]
    if origin in (Sequence, Iterable, list, tuple):
        inner = [getattr(x, "__name__", str(x)) for x in typing.get_args(hint)[:1]]
        return " of ".join(["a sequence", *inner])
    return f"a {getattr(origin, '__name__', str(origin))}"
