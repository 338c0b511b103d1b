"""DatePart and Age against the calendars of Python and numpy."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st

from recis_hybrid.features import Age, Cast, Clip, DatePart, Feature, FeatureEngine, FillNull
from recis_hybrid.features.ops import times
from recis_hybrid.ragged import RaggedTensor
from tests.support.devices import on_devices
from tests.support.features import apply, plain

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
LEAST, MOST = -(2**63), 2**63 - 1
any_time = st.one_of(st.integers(LEAST, MOST), st.integers(-(10**11), 10**11), st.integers(-100_000, 100_000))
parts = st.sampled_from(times.PARTS)


def values_of(op: Any, *columns: Any) -> list[Any]:
    result = apply(op, *columns)
    assert result.dtype == torch.int64
    return plain(result)  # type: ignore[no-any-return]


def by_datetime(part: str, moment: datetime) -> int:
    return {
        "second": moment.second,
        "minute": moment.minute,
        "hour": moment.hour,
        "day_of_week": moment.weekday(),
        "is_weekend": int(moment.weekday() >= 5),
        "day_of_month": moment.day,
        "month": moment.month,
        "year": moment.year,
        "day_of_year": moment.timetuple().tm_yday,
    }[part]


moments = st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29), timezones=st.just(UTC))  # noqa: DTZ001
offsets = st.integers(-86_399, 86_399)


@given(st.lists(moments, min_size=1, max_size=8), st.sampled_from(sorted(PER_SECOND)), parts, offsets)
@example([EPOCH, EPOCH - timedelta(microseconds=1), datetime(1968, 2, 29, 23, tzinfo=UTC)], "us", "day_of_year", 3600)
@example(
    [datetime(y, m, d, tzinfo=UTC) for y in (1900, 2000, 2023, 2024) for m, d in ((2, 28), (3, 1), (12, 31))],
    "s",
    "day_of_year",
    0,
)
def test_parts_match_datetime(samples: list[datetime], unit: str, part: str, offset: int) -> None:
    per_second = PER_SECOND[unit]
    counts = [(moment - EPOCH) // timedelta(microseconds=1) * per_second // 10**6 for moment in samples]
    counts = [count for count in counts if LEAST <= count <= MOST]
    zone = timezone(timedelta(seconds=offset))
    want = [by_datetime(part, (EPOCH + timedelta(seconds=count // per_second)).astimezone(zone)) for count in counts]
    op = DatePart(part, unit, utc_offset=offset)  # type: ignore[arg-type]
    assert values_of(op, torch.tensor(counts, dtype=torch.int64)) == want


@given(st.lists(any_time, min_size=1, max_size=8), st.sampled_from(["d", *PER_SECOND]), parts)
@example([LEAST, LEAST + 1, -1, 0, 1, MOST - 1, MOST], "s", "year")
@example([LEAST, LEAST + 1, MOST - 1, MOST], "d", "day_of_year")
def test_every_int64_has_parts(samples: list[int], unit: str, part: str) -> None:
    """The calendar repeats after 400 years, so times are shifted near 1970 by whole cycles, in Python integers."""
    if unit == "d" and part in ("second", "minute", "hour"):
        return
    per_day = 1 if unit == "d" else 86_400 * PER_SECOND[unit]
    want = []
    for count in samples:
        cycles, rest = divmod(count, 146_097 * per_day)
        seconds = rest * 86_400 if unit == "d" else rest // PER_SECOND[unit]
        found = by_datetime(part, EPOCH + timedelta(seconds=seconds))
        want.append(found + 400 * cycles if part == "year" else found)
    assert values_of(DatePart(part, unit), torch.tensor(samples)) == want  # type: ignore[arg-type]


@given(st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=20))
def test_dates_match_numpy(days: list[int]) -> None:
    dates = np.array(days, dtype="datetime64[D]")
    months, years = dates.astype("datetime64[M]"), dates.astype("datetime64[Y]")
    column = torch.tensor(days)
    assert values_of(DatePart("month", "d"), column) == (months.astype(int) % 12 + 1).tolist()
    assert values_of(DatePart("year", "d"), column) == (years.astype(int) + 1970).tolist()
    assert values_of(DatePart("day_of_month", "d"), column) == ((dates - months).astype(int) + 1).tolist()
    assert values_of(DatePart("day_of_year", "d"), column) == ((dates - years).astype(int) + 1).tolist()
    assert values_of(DatePart("day_of_week", "d"), column) == ((np.array(days) + 3) % 7).tolist()


def test_time_zones() -> None:
    moment = torch.tensor([1_700_000_000])  # 2023-11-14 22:13:20 UTC, a Tuesday
    for zone, hour, day in ((0, 22, 14), ("+08:00", 6, 15), ("-0330", 18, 14), (-3 * 3600, 19, 14), ("+00:00", 22, 14)):
        assert values_of(DatePart("hour", utc_offset=zone), moment) == [hour]
        assert values_of(DatePart("day_of_month", utc_offset=zone), moment) == [day]
    assert DatePart("hour", utc_offset="+08:00") == DatePart("hour", utc_offset=28_800)


@on_devices
def test_rows_of_times_keep_their_form(device: str) -> None:
    clicks = RaggedTensor.from_lists([[0, 3600], [], [-1]], weights=[[1, 2], [], [3]]).to(device)
    result = FeatureEngine([Feature("hour", ops=[DatePart("hour")], source="clicks")])({"clicks": clicks})["hour"]
    assert isinstance(result, RaggedTensor)
    assert result.to_lists() == [[0, 1], [], [23]]
    assert result.weights is not None
    assert result.weights.tolist() == [1, 2, 3]
    assert values_of(DatePart("day_of_week"), RaggedTensor.from_lists([])) == []
    nested = RaggedTensor.from_lists([[[0], []], [[86_400, 1]]])
    assert values_of(DatePart("day_of_week"), nested) == [[[3], []], [[4, 3]]]
    assert values_of(DatePart("month"), torch.zeros(2, 3, dtype=torch.int32)) == [[1] * 3] * 2


def test_missing_times() -> None:
    not_a_time = np.array(["NaT", "1970-01-01T05"], dtype="datetime64[s]").astype(np.int64)
    assert values_of(DatePart("hour", missing=LEAST), torch.from_numpy(not_a_time)) == [-1, 5]
    assert values_of(DatePart("hour", missing=0), torch.tensor([0, 3600])) == [-1, 1]
    assert values_of(Age(100, missing=0), torch.tensor([0, 90, 110])) == [0, 10, -10]
    assert values_of(Age(missing=-9), torch.tensor([-9, 5, 5]), torch.tensor([3, -9, 3])) == [-9, -9, -2]
    engine = FeatureEngine([Feature("hour", ops=[FillNull(-1), Cast(torch.int64), DatePart("hour", missing=-1)])])
    assert engine({"hour": torch.tensor([float("nan"), 7200.0])})["hour"].tolist() == [-1, 2]  # type: ignore[union-attr]


def exact_age(start: int, end: int, unit: str) -> int:
    seconds = (end - start) * 86_400 if unit == "d" else (end - start) // PER_SECOND[unit]
    return min(max(seconds, LEAST), MOST)


@given(st.lists(st.tuples(any_time, any_time), min_size=1, max_size=8), st.sampled_from(["d", *PER_SECOND]))
@example([(LEAST, MOST), (MOST, LEAST), (LEAST, LEAST), (0, LEAST), (LEAST, 0), (-1, MOST), (1, 0)], "s")
@example([(LEAST, MOST), (MOST, LEAST), (0, 2**63 // 86_400), (2**63 // 86_400, 0)], "d")
@example([(LEAST, MOST), (MOST, LEAST), (1, 1000), (999, 1000), (1000, 999), (-1, 0), (0, -1)], "ms")
def test_ages_are_exact(pairs: list[tuple[int, int]], unit: Any) -> None:
    start, end = (torch.tensor(column) for column in zip(*pairs, strict=True))
    want = [exact_age(*pair, unit) for pair in pairs]
    assert values_of(Age(unit=unit), start, end) == want
    fixed = [exact_age(first, pairs[0][1], unit) for first, _ in pairs]
    assert values_of(Age(pairs[0][1], unit), start) == fixed
    rows = [RaggedTensor.from_lists([column.tolist(), []]) for column in (start, end)]
    assert values_of(Age(unit=unit), *rows) == [want, []]


@on_devices
def test_ages_of_rows_to_one_time_per_row(device: str) -> None:
    clicks = RaggedTensor.from_lists([[0, 3600], [], [-1]], weights=[[1, 2], [], [3]]).to(device)
    seen = torch.tensor([7200, 5, 9], device=device)
    engine = FeatureEngine([Feature("age", ops=[Age(), Clip(0, 5000)], source=["clicks", "seen"])])
    result = engine({"clicks": clicks, "seen": seen})["age"]
    assert isinstance(result, RaggedTensor)
    assert result.to_lists() == [[5000, 3600], [], [10]]
    assert result.weights is not None
    assert result.weights.tolist() == [1, 2, 3]
    assert values_of(Age(), seen.cpu(), clicks.to("cpu")) == [[-7200, -3600], [], [-10]]
    assert values_of(Age(), RaggedTensor.from_lists([]), torch.empty(0, dtype=torch.int64)) == []


def test_ages_to_moments_and_to_now(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=8)))
    assert Age(moment, "ms").until == int(moment.timestamp() * 1000)
    assert Age(moment, "d").until == (date(2024, 2, 29) - date(1970, 1, 1)).days
    assert values_of(Age(moment), torch.tensor([int(moment.timestamp()) - 7])) == [7]
    assert Age("2024-02-29T12:00+08:00", "ms") == Age(moment, "ms")
    midnight = datetime(2024, 2, 29, tzinfo=UTC)
    assert Age("2024-02-29") == Age("2024-02-29T00:00") == Age(midnight)
    assert Age("2024-02-29", "D") == Age(midnight, "d")
    assert values_of(DatePart("month", "D"), torch.tensor([31])) == [2]
    engine = FeatureEngine([Feature("age", ops=[Age("now", "ms")], source="x")])
    for seconds in (1_000, 2_000):  # the clock is read for each batch
        monkeypatch.setattr(times.time, "time_ns", lambda seconds=seconds: seconds * 10**9 + 1)
        assert engine({"x": torch.tensor([1_000_000, 0])})["age"].tolist() == [seconds - 1000, seconds]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (DatePart("hours"), r"part must be one of \['second', .*\], got 'hours'"),  # type: ignore[arg-type]
        (DatePart("hour", "min"), r"unit must be one of \['d', 's', 'ms', 'us', 'ns'\], got 'min'"),  # type: ignore[arg-type]
        (DatePart("hour", "d"), "dates have no time of day"),
        (DatePart("month", "d", utc_offset=60), "dates have no time of day"),
        (
            DatePart("hour", utc_offset="Asia/Shanghai"),
            r"utc_offset must be seconds .* such as '\+08:00', got 'Asia/Shang",
        ),
        (DatePart("hour", utc_offset=86_400), "utc_offset must be seconds from -86399 to 86399"),
        (DatePart("hour", utc_offset=True), "utc_offset must be seconds"),
        (DatePart("hour", utc_offset="+25:00"), "utc_offset must be seconds"),
        (DatePart("hour", missing=2**63), "missing must be a 64-bit int"),
        (DatePart("hour", missing=1.0), "missing must be a 64-bit int"),  # type: ignore[arg-type]
        (Age(unit="h"), "unit must be one of"),  # type: ignore[arg-type]
        (Age(datetime(2024, 1, 1)), "until must have a time zone"),  # noqa: DTZ001
        (
            Age("today"),
            "until must be a 64-bit int, or None, got 'today'; pass a datetime, a date such as '2024-02-29', 'now'",
        ),  # type: ignore[arg-type]
        (Age(True), "until must be a 64-bit int"),
    ],
)
def test_bad_parameters(op: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Feature("x", ops=[op])


def test_columns_without_times_are_refused() -> None:
    with pytest.raises(
        TypeError, match="feature 'output', .*DatePart takes times as integers, got torch.float32; put Fill"
    ):
        values_of(DatePart("hour"), torch.tensor([1.0]))
    with pytest.raises(TypeError, match="DatePart takes integers, not the bytes of strings"):
        values_of(DatePart("hour"), RaggedTensor.from_strings(["2024-01-01"]))
    two = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="Age takes two columns, got 3"):
        values_of(Age(), two, two, two)
    with pytest.raises(ValueError, match="joins two or more columns, got one"):
        values_of(Age(), two)
    rows = RaggedTensor.from_lists([[1], [2, 3]])
    with pytest.raises(ValueError, match="the columns must have the same number of times in each row"):
        values_of(Age(), rows, RaggedTensor.from_lists([[1, 2], [3]]))
    with pytest.raises(TypeError, match="Age takes two columns of the same shape, or one"):
        values_of(Age(), rows, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="the columns must have the same number of times in each row"):
        values_of(Age(), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))


def test_times_compile() -> None:
    engine = FeatureEngine(
        [
            Feature("hour", ops=[DatePart("hour", "ms", utc_offset=3600)], source="x"),
            Feature("age", ops=[Age()], source=["x", "y"]),
            Feature("ages", ops=[Age()], source=["rows", "y"]),
        ]
    )
    batch: Any = {"x": torch.tensor([5, -7]), "y": torch.tensor([8, 9]), "rows": RaggedTensor.from_lists([[1, 2], []])}
    result, want = torch.compile(engine, fullgraph=True, backend="eager")(batch), engine(batch)
    assert torch.equal(result["hour"], want["hour"])
    assert torch.equal(result["age"], want["age"])
    assert result["ages"].to_lists() == want["ages"].to_lists() == [[7, 6], []]
