"""Argument checks shared by all rooms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recis_hybrid import validation


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_are_returned_as_int(value: object) -> None:
    checked = validation.check_integer("Window", "size", value, low=3)
    assert checked == 3
    assert type(checked) is int


@pytest.mark.parametrize("value", [True, 3.0, "3", None, np.float32(3), [3]])
def test_check_integer_rejects_other_types(value: object) -> None:
    with pytest.raises(TypeError, match="Window: size must be an integer, got "):
        validation.check_integer("Window", "size", value)


def test_check_integer_rejects_values_below_the_limit() -> None:
    with pytest.raises(ValueError, match="Window: size must be at least 1, got 0"):
        validation.check_integer("Window", "size", np.int32(0), low=1)
    assert validation.check_integer("Window", "size", -5) == -5


@pytest.mark.parametrize("value", [True, "1.5", None])
def test_check_number_rejects_other_types(value: object) -> None:
    with pytest.raises(TypeError, match="Window: share must be a number, got "):
        validation.check_number("Window", "share", value)


def test_check_number_optionally_rejects_infinity_and_nan() -> None:
    validation.check_number("Window", "share", math.inf)
    validation.check_number("Window", "share", np.float32(0.5), finite=True)
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="share must be a finite number, got (inf|nan)"):
            validation.check_number("Window", "share", value, finite=True)


def test_check_flag() -> None:
    validation.check_flag("Window", "sync", True)
    with pytest.raises(TypeError, match="Window: sync must be True or False, got 1"):
        validation.check_flag("Window", "sync", 1)


def test_check_choice() -> None:
    validation.check_choice("Window", "kind", None, ("row", None))
    with pytest.raises(ValueError, match="Window: kind must be one of 'row', None, got 'col'"):
        validation.check_choice("Window", "kind", "col", ("row", None))


def test_check_type() -> None:
    validation.check_type("Window", "names", [], (list, tuple), "a list")
    with pytest.raises(TypeError, match=r"Window: names must be a list, such as \['a'\], got a dict"):
        validation.check_type("Window", "names", {}, list, "a list, such as ['a']")
    with pytest.raises(TypeError, match="got the class list .an instance is needed"):
        validation.check_type("Window", "names", list, list, "a list")


def test_check_method() -> None:
    validation.check_method("Window", "rule", [], "append", "[]")
    for value in (list, 3):
        with pytest.raises(TypeError, match="rule must be an object with a method append, such as .*, got"):
            validation.check_method("Window", "rule", value, "append", "[]")
