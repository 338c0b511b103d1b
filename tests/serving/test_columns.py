"""Columns of requests: whatever a client sends becomes a column or an InputError."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from recis_hybrid.serving import InputColumn, InputError, Ragged, Rows
from recis_hybrid.serving.columns import DTYPES, Column, read_column, read_integers

COLUMNS = [
    InputColumn(name="x", dtype=dtype, levels=levels, length=length, weighted=weighted, default=default)
    for dtype in DTYPES
    for levels, length in ((0, None), (0, 2), (1, None), (2, None))
    for weighted in ((False, True) if levels else (False,))
    for default in (None, {"string": "a", "bool": True}.get(dtype, 3))
    if not (dtype == "string" and length)
]
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**400]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=3), st.sampled_from(["7", "-1", "1e3", "٣"]))
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)
ARRAYS = st.builds(
    lambda dtype, shape: np.zeros(shape, dtype),
    st.sampled_from(["i1", "u1", "i8", "u8", "f2", "f4", "f8", "?", "U2", "S2", "O", "c8", "M8[s]", "V4"]),
    st.sampled_from([(), (0,), (2,), (2, 2), (0, 2), (2, 0), (2, 2, 2)]),
)
LENGTHS = st.one_of(
    st.lists(st.integers(-2, 3), max_size=3), st.sampled_from([None, 3, [1.5], [2**62, 2**62], [[1]], "1"])
)
VALUES = st.one_of(
    st.lists(SCALARS, max_size=4),
    JSON,
    ARRAYS,
    st.builds(Ragged, st.one_of(st.lists(SCALARS, max_size=3), ARRAYS, st.none()), LENGTHS, st.one_of(st.none(), JSON)),
    st.builds(Ragged, st.lists(st.integers(), max_size=3), st.tuples(LENGTHS, LENGTHS), st.none()),
)


def assert_valid(description: InputColumn, column: Column) -> None:
    """Assert that a column keeps what operators rely on."""
    assert column.values.dtype == (np.uint8 if description.dtype == "string" else np.dtype(description.dtype))
    below = len(column.values)
    for offsets in () if column.offsets is None else (column.offsets, *reversed(column.outer)):
        assert offsets.dtype == np.int64
        assert offsets[0] == 0
        assert offsets[-1] == below
        assert (np.diff(offsets) >= 0).all()
        below = len(offsets) - 1
    assert below == column.rows
    levels = 0 if column.offsets is None else 1 + len(column.outer)
    assert levels == description.levels + (description.dtype == "string")
    assert column.values.shape[1:] == (() if description.length is None else (description.length,))
    if description.weighted:
        strings = description.dtype == "string"
        assert column.weights is not None
        assert column.weights.dtype == np.float32
        assert len(column.weights) == (
            len(column.offsets) - 1 if strings and column.offsets is not None else len(column.values)
        )


@settings(max_examples=1000)
@given(description=st.sampled_from(COLUMNS), value=VALUES)
def test_any_value_becomes_a_column_or_an_input_error(description: InputColumn, value: Any) -> None:
    try:
        column = read_column(description, value)
    except InputError:
        return
    assert_valid(description, column)


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        ([1, 2**63 - 1, -(2**63)], [1, 2**63 - 1, -(2**63)]),
        ([2**64 - 1, 2**63], [-1, -(2**63)]),
        ([-1, 2**64 - 1, 5], [-1, -1, 5]),
        ([2**53 + 1, 1.0], [2**53 + 1, 1]),
        (np.array([2**64 - 1], np.uint64), [-1]),
        (np.array([7, -1], np.int8), [7, -1]),
        ([np.int64(3), np.float32(4)], [3, 4]),
        ([None, 9], [3, 9]),
    ],
)
def test_ids_keep_all_64_bits(given_values: Any, expected: list[int]) -> None:
    column = read_column(InputColumn(name="x", dtype="int64", default=3), given_values)
    assert column.values.dtype == np.int64
    assert column.values.tolist() == expected


def test_rows_of_several_levels_are_joined() -> None:
    description = InputColumn(name="x", dtype="string", levels=2, weighted=True)
    parts = [[[[("a", 1.0)], []], []], [], [[[("bc", 0.5), ("", 2.0)]]]]
    joined = Rows.concat([Rows({"x": read_column(description, part)}, len(part)) for part in parts])
    whole = read_column(description, [row for part in parts for row in part])
    assert joined.rows == 3
    found = joined.columns["x"]
    for mine, theirs in zip((*found[:3], *found.outer), (*whole[:3], *whole.outer), strict=True):
        np.testing.assert_array_equal(mine, theirs)  # type: ignore[arg-type]


def test_the_lists_of_an_array_have_its_width() -> None:
    column = read_column(InputColumn(name="x", dtype="int64", levels=2), np.arange(12).reshape(2, 3, 2))
    assert column.offsets is not None
    assert [column.outer[0].tolist(), column.offsets.tolist()] == [[0, 3, 6], [0, 2, 4, 6, 8, 10, 12]]


def test_threads_may_share_a_program() -> None:
    from recis_hybrid.serving.features.program import Program

    steps = [{"op": "hash", "inputs": [0], "feature": "f", "kind": "farm"}]
    program = Program("bundle", {"columns": ["x"], "steps": steps, "outputs": {"f": 1}})
    columns = [{"x": Column(np.arange(number, number + 999))} for number in range(64)]
    expected = [program.run(each)["f"].values for each in columns]
    with ThreadPoolExecutor(4) as pool:
        for mine, theirs in zip(pool.map(lambda each: program.run(each)["f"].values, columns), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("dtype", ["int64", "float32", "string"])
def test_huge_integers_are_refused(dtype: Any) -> None:
    with pytest.raises(InputError, match="column 'x': row 0: must be .*, got a huge integer"):
        read_column(InputColumn(name="x", dtype=dtype), [10**5000])


@given(st.lists(st.one_of(st.lists(st.integers(-(2**65), 2**65), min_size=2, max_size=2), VALUES), max_size=4))
def test_integers_read_together_are_those_read_one_by_one(columns: list[Any]) -> None:
    found = read_integers(columns)
    if found is not None:
        assert len({column.rows for column in found}) == 1
        for column, given_values in zip(found, columns, strict=True):
            alone = read_column(InputColumn(name="x", dtype="int64", levels=0, length=None), given_values)
            assert column.values.dtype == np.int64
            assert np.array_equal(column.values, alone.values)
            assert column.offsets is None
            assert column.weights is None


@pytest.mark.parametrize(
    "columns", [[], [[]], [[1], [1, 2]], [[1], [2**63]], [[1], [True]], [[1], [None]], [[1], [1.0]], [[1], (1,)]]
)
def test_other_values_are_not_read_together(columns: list[Any]) -> None:
    assert read_integers(columns) is None


def test_ids_of_64_bits_are_read_together() -> None:
    first, second = read_integers([[-(2**63), 2**63 - 1], [0, -1]]) or []
    assert first.values.tolist() == [-(2**63), 2**63 - 1]
    assert second.values.tolist() == [0, -1]
