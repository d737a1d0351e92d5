"""Values at the edge: numbers are checked as rounded to float32, and types are named."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax.utils.checks import (
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    ArgumentError,
    Range,
    check_arguments,
    check_integer,
    check_number,
    check_type,
)


@pytest.mark.parametrize(
    "value, allowed, message",
    [
        (1e39, NOT_NEGATIVE, "x=1e\\+39; expected a finite number, 0 or more, and it is inf"),
        (float("nan"), NOT_NEGATIVE, "x=nan; expected"),
        (-1e-3, NOT_NEGATIVE, "x=-0.001; expected a finite number, 0 or more"),
        (1e-46, NOT_NEGATIVE, "x=1e-46 is 0 in float32"),
        (1 - 1e-9, BELOW_ONE, r"expected a number in \[0, 1\), and it is 1 in float32"),
        (1.5, FRACTION, r"expected a number in \[0, 1\]"),
        (0.0, Range(0.0, includes_low=False), "expected a finite number above 0"),
        ("3", NOT_NEGATIVE, "x='3'; expected"),
        (None, NOT_NEGATIVE, "x=None; expected"),
        (True, NOT_NEGATIVE, "x=True; expected"),
        ([1.0], NOT_NEGATIVE, "x=a list; expected"),
    ],
)
def test_numbers_are_checked_after_rounding_to_float32(value, allowed, message):
    with pytest.raises(ValueError, match=message):
        check_number("x", value, allowed)


def test_numbers_in_range_pass():
    for value in (0, 0.0, 1, np.float64(0.5), np.int64(1), jnp.float32(1), 1e-45):
        check_number("x", value, FRACTION)
    check_number("x", -1e30, Range())
    check_number("x", 1 - 1e-7, BELOW_ONE)


def test_integers_are_checked():
    for value in (3, np.int64(3), jnp.int32(3)):
        check_integer("n", value, 1, 3)
    for value, message in (
        (0, "n=0; expected 1 to 3"),
        (2.0, "n=2.0; expected an integer"),
        (True, "n=True; expected an integer"),
        ("2", "n='2'; expected an integer"),
        (None, "n=None; expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            check_integer("n", value, 1, 3)
    with pytest.raises(ValueError, match="n=2147483648; expected 0 to 2147483647"):
        check_integer("n", 2**31)


@pytest.mark.parametrize(
    "hint, right, wrong",
    [
        (int, [1, np.int32(1), jnp.int32(1)], [1.0, True, "1", None]),
        (float, [1, 1.0, np.float32(1), jnp.float32(1)], [True, "1", [1.0], 1j]),
        (str, ["a"], [b"a", 1, None]),
        (bool, [True, np.bool_(True)], [1, "True"]),
        (str | None, ["a", None], [1]),
        (Sequence[str], [["a"], ("a",), []], ["a", [1], {"a": 1}, 5]),
        (Sequence[int], [[1], range(3), np.arange(2), jnp.arange(2)], [[1.5], np.int32(3), "12"]),
        (Mapping, [{}], [[], "a"]),
        (Callable[[int], int], [abs], [3, "abs"]),
        (Literal["a", "b"], ["a"], ["c", 1]),
        (jnp.ndarray, [jnp.ones(2), np.ones(2)], [[1.0], 1.0, np.array(["a"]), np.array([None])]),
        (Any, [1, "a", None], []),
    ],
)
def test_types_are_checked_by_annotations(hint, right, wrong):
    for value in right:
        check_type("x", value, hint)
    for value in wrong:
        with pytest.raises(ArgumentError, match=r"^x: expected .*, got "):
            check_type("x", value, hint)


def test_functions_name_the_argument():
    @check_arguments
    def paint(path: str, *, count: int = 3, **settings: float) -> int:
        """Paint."""
        return count

    assert paint("a", count=2, width="any") == 2 and paint.__name__ == "paint"
    for call, message in (
        (lambda: paint(3), "paint: path: expected a string, got 3"),
        (lambda: paint("a", count=[2]), "paint: count: expected an integer, got a list"),
    ):
        for kind in (TypeError, ValueError):
            with pytest.raises(kind, match=message):
                call()
    with pytest.raises(TypeError, match=r"unexpected|too many"):
        paint("a", 2)
