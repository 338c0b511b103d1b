from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.saver import CheckpointError
from recis_hybrid.saver.format.json_values import checked_json, checked_object

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(values)
def test_a_copy_is_equal_in_value_and_type(value: Any) -> None:
    copy = checked_json("it", value)
    assert repr(copy) == repr(value)  # tells 1 from 1.0 and True, 0.0 from -0.0


def test_the_copy_is_independent() -> None:
    value = {"a": [1]}
    copy = checked_object("it", value)
    value["a"].append(2)
    assert copy == {"a": [1]}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [(1, 2), [(1,)], {1: 2}, {None: 1}, {"a": {True: 0}}, math.nan, [math.inf], torch.zeros(1), {1}, b"a", object()],
)
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the note must be JSON .* Use None, bool"):
        checked_json("the note", value)


@pytest.mark.parametrize("depth", [65, 500, 5_000, 200_000])
def test_excessive_depth_is_refused(depth: int) -> None:
    with pytest.raises(CheckpointError, match="the note must be JSON"):
        checked_json("the note", nested(depth))
    assert checked_json("the note", nested(64)) == nested(64)


def test_an_object_is_required() -> None:
    with pytest.raises(CheckpointError, match=r"the meta must be a dictionary, got \[1\]"):
        checked_object("the meta", [1])
