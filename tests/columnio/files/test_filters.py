"""Filters: exact for every type, also with footers and folder names that rule pieces out; errors for other types."""

from __future__ import annotations

import datetime
import decimal
import math
import operator
import uuid
import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st

from recis_hybrid.columnio import BadFileError, Column, ColumnDataset, Dense, ReadOptions
from recis_hybrid.columnio.files.opening import open_files
from tests.support.columns import dense

Decimal = decimal.Decimal
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
NAN, INF = float("nan"), float("inf")
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def rows_of(path: Path, filters: Any, **options: Any) -> list[int]:
    try:
        data = ColumnDataset(path, ["row"], 1000, filters=filters, **options)
    except ValueError as error:
        if "there are no rows" not in str(error):
            raise
        return []
    return list(chain.from_iterable(dense(batch).tolist() for batch in data))


def write(path: Path, values: list[Any], arrow_type: Any) -> Path:
    """Write each value twice, in its own row group, and then all values in row groups of two."""
    array = pa.array([value for value in values for _ in range(2)] + values * 2, arrow_type)
    pq.write_table(pa.table({"x": array, "row": range(len(array))}), path, row_group_size=2)
    return path


def exact(value: Any) -> Any:
    """Return a value that Python compares without rounding."""
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)) - EPOCH
    if isinstance(value, datetime.date):
        return exact(datetime.datetime(value.year, value.month, value.day))
    if isinstance(value, np.datetime64):
        return exact(value.astype("datetime64[us]").item())
    if isinstance(value, np.timedelta64):
        return value.astype("timedelta64[us]").item()
    if isinstance(value, float):
        return Fraction(value) if math.isfinite(value) else value
    if isinstance(value, Decimal | int) and not isinstance(value, bool):
        return Fraction(value)
    return value


CASES: list[tuple[Any, list[Any], list[Any]]] = [
    (
        pa.uint64(),
        [0, 3, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, None],
        [0, -1, 3, 2.5, 2**63, 2**63 + 1, 2**64, 2**70, -0.5, INF, -INF, np.uint64(2**63), Decimal("2.5")],
    ),
    (pa.int8(), [-128, -1, 0, 5, 127, None], [300, -300, 4.5, -128, 127, 127.5, np.int64(5), np.float32(0.5)]),
    (pa.int64(), [-(2**63), 0, 2**53 + 1, 2**63 - 1, None], [2**53, 2**53 + 1, float(2**53), 2**63, -(2**64), -5.5]),
    (pa.float64(), [0.0, -1.5, 0.1, NAN, INF, -INF, 2.0**53, None], [0.1, 0, 2**53 + 1, 10**400, -INF, Decimal("0.1")]),
    (pa.float32(), [0.0, float(np.float32(0.1)), NAN, 1.5, None], [0.1, 1.5, float(np.float32(0.1))]),
    (pa.float16(), [0.0, 1.5, NAN, None], [1.5, 0.1]),
    (pa.string(), ["", "a", "é", "zz", None], ["", "a", "b"]),
    (pa.dictionary(pa.int32(), pa.string()), ["a", "b", "zz", None], ["a", "zzz"]),
    (pa.string_view(), ["a", "b", "zz", None], ["a", "zzz"]),
    (pa.binary(), [b"", b"a", b"\xff", None], [b"a", b"b"]),
    (pa.binary(2), [b"ab", b"\xff\x00", None], [b"ab", b"a"]),
    (
        pa.date32(),
        [datetime.date(1960, 5, 5), datetime.date(1970, 1, 1), datetime.date(2024, 1, 1), None],
        [datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, 12), np.datetime64("2024-01-01")],
    ),
    (
        pa.timestamp("s"),
        [datetime.datetime(1960, 1, 1, 3), datetime.datetime(2024, 1, 1), None],
        [
            datetime.date(2024, 1, 1),
            datetime.datetime(2024, 1, 1, 0, 0, 0, 5),
            datetime.datetime(2024, 1, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
        ],
    ),
    (
        pa.timestamp("ns", "Europe/Berlin"),
        [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), None],
        [datetime.datetime(2024, 1, 1), datetime.date(9999, 1, 1)],
    ),
    (
        pa.time32("s"),
        [datetime.time(1, 2, 3), datetime.time(0), None],
        [datetime.time(1, 2, 3), datetime.time(1, 2, 3, 5)],
    ),
    (
        pa.duration("ms"),
        [datetime.timedelta(days=-1), datetime.timedelta(seconds=1), None],
        [datetime.timedelta(seconds=1), datetime.timedelta(microseconds=1_000_001), np.timedelta64(1, "s")],
    ),
    (
        pa.decimal128(10, 2),
        [Decimal("-3.00"), Decimal("1.25"), Decimal("99999999.99"), None],
        [Decimal("1.25"), 1.25, 1, Decimal("1.255"), 10**20, -3],
    ),
    (pa.decimal32(5, 2), [Decimal("-3.00"), Decimal("1.25"), None], [Decimal("1.25"), 1.25]),
]


@pytest.mark.parametrize(("arrow_type", "values", "wanted"), CASES, ids=[str(case[0]) for case in CASES])
def test_comparisons_are_exact(tmp_path: Path, arrow_type: Any, values: list[Any], wanted: list[Any]) -> None:
    path = write(tmp_path / "a.parquet", values, arrow_type)
    every = [value for value in values for _ in range(2)] + values * 2
    for right in wanted:
        right = right.item() if isinstance(right, np.number) and not isinstance(right, np.timedelta64) else right
        for sign, compare in OPERATORS.items():
            want = [row for row, left in enumerate(every) if left is not None and compare(exact(left), exact(right))]
            assert rows_of(path, [("x", sign, right)]) == want, (sign, right)
        for more in ([], [None]):
            inside = [
                row for row, left in enumerate(every) if (bool(more) if left is None else exact(left) == exact(right))
            ]
            assert rows_of(path, [("x", "in", [right, *more])]) == inside, (right, more)
            outside = sorted(set(range(len(every))) - set(inside))
            assert rows_of(path, [("x", "not in", [right, *more])]) == outside, (right, more)


def test_booleans(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [True, False, None], pa.bool_())
    true, false, null = [0, 1, 6, 9], [2, 3, 7, 10], [4, 5, 8, 11]
    assert rows_of(path, [("x", "==", True)]) == rows_of(path, [("x", "!=", False)]) == true
    assert rows_of(path, [("x", "==", np.bool_(False))]) == rows_of(path, [("x", "in", [False])]) == false
    assert rows_of(path, [("x", "not in", [True])]) == sorted(false + null)
    assert rows_of(path, [("x", "in", [True, None])]) == sorted(true + null)


def test_nan_null_and_empty_lists(tmp_path: Path) -> None:
    values = [NAN, 1.0, None]
    path = write(tmp_path / "a.parquet", values, pa.float64())
    every = [value for value in values for _ in range(2)] + values * 2
    nan = [row for row, value in enumerate(every) if value is not None and math.isnan(value)]
    null = [row for row, value in enumerate(every) if value is None]
    one = [row for row, value in enumerate(every) if value == 1.0]
    assert rows_of(path, [("x", "==", NAN)]) == rows_of(path, [("x", "in", [NAN])]) == nan
    assert rows_of(path, [("x", "!=", NAN)]) == one
    assert rows_of(path, [("x", "==", None)]) == rows_of(path, [("x", "in", {None})]) == null
    assert rows_of(path, [("x", "!=", None)]) == rows_of(path, [("x", "not in", (None,))]) == sorted(nan + one)
    assert rows_of(path, [("x", "in", [])]) == []
    assert rows_of(path, [("x", "not in", [])]) == list(range(len(every)))
    for sign in ("<", ">="):
        with pytest.raises(ValueError, match=r"compares double with NaN"):
            rows_of(path, [("x", sign, NAN)])
        with pytest.raises(ValueError, match=r"compares a null by order; use == or !="):
            rows_of(path, [("x", sign, None)])


def test_strings_of_dates_and_times(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet", [datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 2)], pa.timestamp("us")
    )
    assert rows_of(path, [("x", ">", "2024-01-01")]) == [2, 3, 5, 7]
    assert rows_of(path, [("x", "==", "2024-01-01T02:00:00+02:00")]) == [0, 1, 4, 6]
    with pytest.raises(TypeError, match=r"compares timestamp\[us\] with str; use a datetime\.date"):
        rows_of(path, [("x", ">", "yesterday")])


def test_identifiers_and_large_sets(tmp_path: Path) -> None:
    ids = [uuid.UUID(int=number) for number in range(3)]
    path = write(tmp_path / "a.parquet", [each.bytes for each in ids], pa.binary(16))
    assert rows_of(path, [("x", "==", ids[1])]) == [2, 3, 7, 10]
    path = write(tmp_path / "b.parquet", list(range(20)), pa.int64())
    odd = set(range(1, 100_000, 2))
    want = [
        row
        for row, value in enumerate([*(v for v in range(20) for _ in range(2)), *range(20), *range(20)])
        if value % 2
    ]
    for values in (odd, np.array(sorted(odd)), pa.array(sorted(odd))):
        assert rows_of(path, [("x", "in", values)]) == want


numbers = st.integers(-3, 3) | st.floats(-3, 3) | st.just(NAN) | st.none()


@given(
    values=st.lists(numbers, min_size=1, max_size=12),
    groups=st.lists(
        st.lists(st.tuples(st.just("x"), st.sampled_from(list(OPERATORS)), st.integers(-3, 3)), min_size=1, max_size=2),
        min_size=1,
        max_size=2,
    ),
)
def test_footers_rule_out_no_matching_row(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], groups: list[Any]
) -> None:
    floats = [None if value is None else float(value) for value in values]
    path = tmp_path_factory.mktemp("f") / "a.parquet"
    pq.write_table(pa.table({"x": pa.array(floats, pa.float64()), "row": range(len(floats))}), path, row_group_size=2)
    want = [
        row
        for row, left in enumerate(floats)
        if left is not None and any(all(OPERATORS[sign](left, right) for _, sign, right in group) for group in groups)
    ]
    assert rows_of(path, groups) == want
    # As an expression, whose columns and operators are not visible.
    whole: Any = None
    for group in groups:
        together: Any = None
        for name, sign, right in group:
            one = OPERATORS[sign](pc.field(name), float(right))
            together = one if together is None else together & one
        whole = together if whole is None else whole | together
    assert rows_of(path, whole) == want
    inverted = pc.field("x").is_valid() & ~whole
    assert rows_of(path, inverted) == [row for row in range(len(floats)) if floats[row] is not None and row not in want]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([("name", "==", 3)], r"\('name', '==', 3\) compares string with int; use a str"),
        ([("x", "==", "3")], r"compares int64 with str; use a number"),
        ([("x", ">", True)], r"compares int64 with bool; use a number"),
        ([("flag", "==", 1)], r"compares bool with int; use True or False"),
        ([("flag", "<", True)], None),
        ([("x", "in", "abc")], r"needs a list, set or array of values; write \['abc'\]"),
        ([("x", "in", 3)], r"needs a list, set or array of values; write \[3\]"),
        ([("x", "in", [1, "a"])], r"compares int64 with str"),
        ([("list", "==", 1)], r"filters compare columns of single values, but 'list' is list"),
        ([("when", "==", 5)], r"compares date32\[day\] with int; use a datetime\.date"),
        ([("x", "==")], r"filters must be a pyarrow expression or a list of \(column, operator, value\)"),
        ([], r"filters must be a pyarrow expression or a list of"),
        ("x > 3", r"filters must be a pyarrow expression or a list of"),
    ],
)
def test_values_of_wrong_types_are_rejected(tmp_path: Path, filters: Any, message: str | None) -> None:
    table = {
        "row": [0, 1],
        "x": [1, 2],
        "name": ["a", "b"],
        "flag": [True, False],
        "list": [[1], [2]],
        "when": [datetime.date(2024, 1, 1)] * 2,
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    if message is None:
        assert rows_of(tmp_path, filters) == [1]
        return
    for bad in ("raise", "skip"):
        with pytest.raises(TypeError, match=message):
            ColumnDataset(tmp_path, ["row"], 10, filters=filters, read=ReadOptions(on_bad_file=bad))  # type: ignore[arg-type]


def test_an_unknown_operator_is_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"filters must use one of =, ==, .*, not in, got 'like'"):
        ColumnDataset(tmp_path, ["row"], 10, filters=[("row", "like", 3)])
    with pytest.raises(ValueError, match=r"has no column 'Row' \(did you mean 'row'|row\?\)"):
        ColumnDataset(tmp_path, ["row"], 10, filters=[("Row", "==", 3)])


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("bad", ["raise", "skip"])
@pytest.mark.parametrize(
    "filters",
    [pc.scalar(1) / pc.field("x") > 0, pc.field("u") > 3],
    ids=["division by zero", "uint64 as int64"],
)
def test_a_filter_that_cannot_be_computed_is_not_damage(tmp_path: Path, suffix: str, bad: Any, filters: Any) -> None:
    table = pa.table({"row": [0, 1], "x": [1, 0], "u": pa.array([5, 2**63], pa.uint64())})
    if suffix == ".parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        (tmp_path / "a.csv").write_text(f"row,x,u\n0,1,5\n1,0,{2**63}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"filters .* cannot be computed for rows of .*a\.") as caught:
            ColumnDataset(tmp_path, ["row"], 10, filters=filters, read=ReadOptions(on_bad_file=bad))
    assert not isinstance(caught.value, BadFileError)
    assert rows_of(tmp_path, [("u", ">", 3)]) == [0, 1]
    assert rows_of(tmp_path, [("u", "==", 2**63)]) == [1]


def test_expressions_that_are_not_conditions_are_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": [1], "name": ["a"]}), tmp_path / "a.parquet")
    for expression in (pc.field("row") + 1, pc.field("name") > 3, pc.field("row") == "a"):
        with pytest.raises(ValueError, match=r"filters .* do not fit the columns \['row', 'name'\]"):
            ColumnDataset(tmp_path, ["row"], 10, filters=expression)


def test_fields_of_structs(tmp_path: Path) -> None:
    users = [{"age": 7, "in": {"city": "x"}}, None, {"age": None, "in": {"city": "y"}}, {"age": 9, "in": None}]
    pq.write_table(pa.table({"row": range(4), "user": users}), tmp_path / "a.parquet", row_group_size=1)
    for filters, want in (
        ([("user.age", ">", 7)], [3]),
        ([("user.in.city", "==", "y")], [2]),
        ([("user.age", "==", None)], [1, 2]),
        (pc.field("user", "age") > 7, [3]),
        (pc.field("user.age") > 7, [3]),
    ):
        assert rows_of(tmp_path, filters) == want
    specs: dict[str, Column | None] = {"user.age": Dense(default=-1)}
    (batch,) = ColumnDataset(tmp_path, specs, 10, filters=[("row", ">", 1)])
    assert dense(batch, "user.age").tolist() == [-1, 9]


def test_types_that_differ_between_files(tmp_path: Path) -> None:
    for number, arrow_type in enumerate((pa.int8(), pa.uint64(), pa.int64())):
        table = pa.table({"x": pa.array([number, 100], arrow_type), "row": [2 * number, 2 * number + 1]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    assert rows_of(tmp_path, [("x", ">=", 2)]) == [1, 3, 4, 5]
    assert rows_of(tmp_path, [("x", "<", 300)]) == list(range(6))


def test_folder_keys_are_compared_by_value(tmp_path: Path) -> None:
    for number, day in enumerate(("7", "8", "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / f"day={day}"
        folder.mkdir()
        pq.write_table(pa.table({"row": [number]}), folder / "a.parquet")
    for filters, want in (
        ([("day", "==", 7)], [0]),
        ([("day", "!=", 7)], [1]),
        ([("day", ">", 7.5)], [1]),
        ([("day", "==", None)], [2]),
        ([("day", "in", [8, None, 2**70])], [1, 2]),
        ([("day", "not in", [8])], [0, 2]),
        ([[("day", "==", 7)], [("row", "==", 2)]], [0, 2]),
    ):
        assert rows_of(tmp_path, filters) == want, filters
    with pytest.raises(TypeError, match=r"compares int64 with str"):
        rows_of(tmp_path, [("day", "==", "7")])


def test_a_footer_rules_out_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [float(row) for row in range(100)]}), path, row_group_size=10)
    for filters, groups in (([("x", ">", 75)], 3), (pc.field("x") > 75, 3), ([("x", "==", 5)], 1)):
        files = open_files(path, ["x"], filters)
        assert len(files.pieces) == groups


def test_states_distinguish_filters(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": range(5000)}), tmp_path / "a.parquet")

    def opened(filters: Any) -> ColumnDataset:
        return ColumnDataset(tmp_path, ["row"], 10, filters=filters)

    many = list(range(4000))
    other = [*many[:2000], 4500, *many[2001:]]
    for one, two in (
        ([("row", "in", many)], [("row", "in", other)]),
        (pc.field("row").isin(many), pc.field("row").isin(other)),
        ([("row", ">", 1)], [("row", ">=", 1)]),
    ):
        state = opened(one).state_dict()
        opened(one).load_state_dict(state)
        with pytest.raises(ValueError, match="the rows are in a different order than when the state was saved"):
            opened(two).load_state_dict(state)
    # A set has no order.
    opened([("row", "in", {3, 1, 2})]).load_state_dict(opened([("row", "in", {2, 3, 1})]).state_dict())
