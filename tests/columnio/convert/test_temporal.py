"""Dates, timestamps, times, durations and decimals as numbers, compared with datetime and decimal."""

from __future__ import annotations

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.columnio import Column, ColumnDataset, Dense, Ragged, Text
from recis_hybrid.columnio.convert.convert import converter
from recis_hybrid.columnio.convert.numbers import Place
from recis_hybrid.ragged import RaggedTensor
from tests.support.columns import dense

PLACE = Place("x", "some.parquet")
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
MICROSECOND = datetime.timedelta(microseconds=1)
MICROSECONDS = {"D": 86_400_000_000, "s": 1_000_000, "ms": 1_000, "us": 1}
UNITS = [None, *MICROSECONDS]
Decimal = decimal.Decimal


def read(array: Any, spec: Column | None = None) -> Any:
    conversion = converter(spec, array.type, PLACE)
    return conversion.tensor(conversion.clean(array, PLACE))


def ticks(microseconds: int, unit: str | None) -> int:
    return microseconds // MICROSECONDS[unit or "s"]


moments = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1), timezones=st.just(datetime.UTC))


@pytest.mark.parametrize("unit", UNITS)
@given(values=st.lists(moments, min_size=1, max_size=8), file_unit=st.sampled_from(["s", "ms", "us", "ns"]))
def test_timestamps_are_counted_since_1970_and_rounded_down(
    unit: str | None, values: list[datetime.datetime], file_unit: str
) -> None:
    # The values that the type of the file can store.
    step = MICROSECONDS.get(file_unit, 1)
    stored = [(value - EPOCH) // MICROSECOND // step * step for value in values]
    for zone in (None, "UTC", "Asia/Kolkata"):
        array = pa.array(stored, pa.int64()).cast(pa.timestamp("us")).cast(pa.timestamp(file_unit)).cast(pa.int64())
        array = array.cast(pa.timestamp(file_unit, zone))
        got = read(array, Dense(unit=unit) if unit else None)
        assert got.dtype == torch.int64
        assert got.tolist() == [ticks(value, unit) for value in stored]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arrow_type", [pa.date32(), pa.date64()])
def test_dates_are_midnight_in_utc(unit: str | None, arrow_type: Any) -> None:
    days = [datetime.date(1969, 12, 31), datetime.date(1970, 1, 1), datetime.date(2024, 2, 29)]
    want = [ticks((day - datetime.date(1970, 1, 1)).days * 86_400_000_000, unit) for day in days]
    assert read(pa.array(days, arrow_type), Dense(unit=unit)).tolist() == want


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("arrow_type", [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")])
def test_times_are_counted_since_midnight(unit: str | None, arrow_type: Any) -> None:
    times = [datetime.time(0, 0, 0), datetime.time(23, 59, 58)]
    want = [ticks(0, unit), ticks((23 * 3600 + 59 * 60 + 58) * 1_000_000, unit)]
    assert read(pa.array(times, arrow_type), Dense(unit=unit)).tolist() == want


@pytest.mark.parametrize("file_unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("unit", UNITS)
def test_durations(unit: str | None, file_unit: str) -> None:
    values = [datetime.timedelta(seconds=-1), datetime.timedelta(days=2, seconds=3)]
    want = [ticks(value // MICROSECOND, unit) for value in values]
    assert read(pa.array(values, pa.duration(file_unit)), Dense(unit=unit)).tolist() == want


def test_seconds_of_timestamps_in_seconds_are_not_copied() -> None:
    array = pa.array([1, 2, 3], pa.int64()).cast(pa.timestamp("s"))
    assert read(array).data_ptr() == array.buffers()[1].address


def test_nulls_lists_and_other_dtypes() -> None:
    day = datetime.date(2024, 1, 1)
    seconds = (day - datetime.date(1970, 1, 1)).days * 86_400
    with pytest.raises(ValueError, match=r"has 1 null in 2 values.*Dense\(default=0\)"):
        read(pa.array([day, None]))
    assert read(pa.array([day, None]), Dense(default=-1)).tolist() == [seconds, -1]
    assert read(pa.array([[day], None, [None]]), Ragged(default=7, null_as_empty=True)).to_lists() == [
        [seconds],
        [],
        [7],
    ]
    fixed = read(pa.array([[day, day], None], pa.list_(pa.date32(), 2)), Dense(length=2, default=0, unit="D"))
    assert fixed.tolist() == [[seconds // 86_400] * 2, [0, 0]]
    assert read(pa.array([day]), Dense(torch.float64)).tolist() == [float(seconds)]
    assert read(pa.array([day]), Dense(torch.int32)).dtype == torch.int32
    with pytest.raises(ValueError, match=r"does not fit into int64 in the unit 'ns' .*coarser unit"):
        read(pa.array([datetime.date(9999, 1, 1)]), Dense(unit="ns"))
    with pytest.raises(ValueError, match=r"does not fit into torch\.int32"):
        read(pa.array([datetime.date(2100, 1, 1)]), Dense(torch.int32))


# Strings


def test_strings_of_iso_8601_are_read_with_a_unit() -> None:
    texts = ["2024-01-01", "2024-01-01 10:00:00", "2024-01-01T10:00:00.25Z", "2024-01-01T10:00+02:00", "10:00:01", ""]
    want = [
        int((datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC) - EPOCH) / datetime.timedelta(milliseconds=1)) + more
        for more in (0, 36_000_000, 36_000_250, 28_800_000)
    ]
    got = read(pa.array(texts), Dense(unit="ms", default=-1))
    assert got.tolist() == [*want, 36_001_000, -1]
    with pytest.raises(TypeError, match=r"is string, which Dense.* strings that are dates or times with Dense\(unit="):
        read(pa.array(texts), Dense())
    with pytest.raises(ValueError, match=r"has the value '1 May', which is not a date or time in ISO 8601; .*format="):
        read(pa.array(["1 May"]), Dense(unit="s"))


@given(st.lists(moments.map(lambda value: value.replace(microsecond=0)), min_size=1, max_size=5))
def test_strings_of_any_format(values: list[datetime.datetime]) -> None:
    for time_format, exact in (
        ("%d/%m/%Y %H:%M:%S", 1),
        ("%Y%m%d", 86_400),
        ("%d.%m.%Y %H:%M:%S.%f", 1),
        ("%d %b %Y %H:%M:%S %z", 1),
    ):
        texts = [value.strftime(time_format) for value in values]
        want = [(value - EPOCH) // datetime.timedelta(seconds=1) // exact * exact for value in values]
        assert read(pa.array([*texts, None]), Dense(format=time_format, default=0)).tolist() == [*want, 0]


def test_an_invalid_day_is_rejected() -> None:
    assert read(pa.array(["1/2/2024", "01/02/2024"]), Dense(format="%d/%m/%Y", unit="D")).tolist() == [19_754] * 2
    with pytest.raises(ValueError, match=r"has the value '31/02/2024', which is not in the format '%d/%m/%Y'"):
        read(pa.array(["01/02/2024", "31/02/2024"]), Dense(format="%d/%m/%Y"))
    assert read(pa.array(["10h30"]), Dense(format="%Hh%M")).tolist() == [10 * 3600 + 30 * 60]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_dates_in_text_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("day,own\n2024-01-01,31/01/2024\n2024-01-02 00:00:01,01/02/2024\n")
    else:
        path.write_text(
            '{"day": "2024-01-01", "own": "31/01/2024"}\n{"day": "2024-01-02 00:00:01", "own": "01/02/2024"}\n'
        )
    (batch,) = ColumnDataset(path, {"day": Dense(unit="s"), "own": Dense(unit="D", format="%d/%m/%Y")}, 10)
    assert dense(batch, "day").tolist() == [19_723 * 86_400, 19_724 * 86_400 + 1]
    assert dense(batch, "own").tolist() == [19_753, 19_754]
    (batch,) = ColumnDataset(path, ["day"] if suffix == ".jsonl" else {"day": Text()}, 10)
    assert isinstance(batch["day"], RaggedTensor) == (suffix == ".csv")


def test_options_that_do_not_fit_a_column_are_rejected() -> None:
    with pytest.raises(TypeError, match=r"is int64, which has no unit of time; omit unit='s'"):
        read(pa.array([1]), Dense(unit="s"))
    with pytest.raises(TypeError, match=r"is int64, which has no decimal places; omit scale=2"):
        read(pa.array([1]), Dense(scale=2))
    with pytest.raises(ValueError, match=r"unit must be one of 'D', 's', 'ms', 'us', 'ns', got 'min'"):
        Dense(unit="min")
    with pytest.raises(ValueError, match="format must have directives"):
        Ragged(format="iso")
    with pytest.raises(ValueError, match="scale must be an integer from 0 to 38"):
        Dense(scale=-1)
    with pytest.raises(ValueError, match="give one of them"):
        Dense(scale=1, unit="s")


# Decimals


@pytest.mark.parametrize(
    "arrow_type", [pa.decimal32(9, 2), pa.decimal64(18, 2), pa.decimal128(30, 2), pa.decimal256(60, 2)]
)
def test_decimals_are_floats_or_scaled_integers(arrow_type: Any) -> None:
    values = [Decimal("1.25"), Decimal("-3.50"), None, Decimal("0.07")]
    array = pa.array(values, arrow_type)
    assert read(array, Dense(default=0)).tolist() == [1.25, -3.5, 0.0, 0.07]
    assert read(array[1:], Dense(scale=2, default=-1)).tolist() == [-350, -1, 7]
    assert read(array, Dense(scale=4, default=-1)).tolist() == [12_500, -35_000, -1, 700]
    assert read(array, Dense(torch.float32, default=0)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"has the value 1\.25, which times 10\*\*1 is not a whole .*set scale=2"):
        read(array, Dense(scale=1, default=0))
    with pytest.raises(ValueError, match=r"has the value 1\.25, which times 10\*\*0 is not a whole"):
        read(array, Dense(torch.int64, default=0))
    assert read(pa.array([[Decimal("0.5")], []]), Ragged(scale=1)).to_lists() == [[5], []]


def test_decimals_without_places_are_integers() -> None:
    top = 2**64 - 1
    assert read(pa.array([Decimal(top), Decimal(5)], pa.decimal128(38, 0))).tolist() == [-1, 5]
    assert read(pa.array([Decimal("7.00")])).tolist() == [7.0]
    assert read(pa.array([Decimal("7.00")]), Dense(torch.int64)).tolist() == [7]
    with pytest.raises(ValueError, match=r"decimals that do not fit into 64 bits .*read it with Text\(\)"):
        read(pa.array([Decimal(2**64)], pa.decimal128(38, 0)))


def test_decimals_of_csv_keep_their_digits(tmp_path: Path) -> None:
    # Through a float 1.15 * 100 would be 114.99999999999999.
    (tmp_path / "a.csv").write_text("x\n1.15\n0.07\n12345678901234.56\n")
    (batch,) = ColumnDataset(tmp_path, {"x": Dense(scale=2)}, 10)
    assert dense(batch, "x").tolist() == [115, 7, 1234567890123456]


def test_decimals_of_several_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1.25\n")
    pq.write_table(pa.table({"x": pa.array([Decimal("2.5")])}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"x": pa.array([Decimal("3")], pa.decimal64(9, 0))}), tmp_path / "c.parquet")
    (batch,) = ColumnDataset(tmp_path, {"x": Dense(scale=2)}, 10)
    assert dense(batch, "x").tolist() == [125, 250, 300]
    (batch,) = ColumnDataset(tmp_path, {"x": Dense(torch.float64)}, 10)
    assert dense(batch, "x").tolist() == [1.25, 2.5, 3.0]


def test_dates_and_timestamps_of_several_files_are_joined(tmp_path: Path) -> None:
    day = datetime.date(2024, 1, 1)
    moment = datetime.datetime(2024, 1, 1, 10, 0, 0, 500_000)
    pq.write_table(pa.table({"x": pa.array([day])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([moment], pa.timestamp("us", "UTC"))}), tmp_path / "b.parquet")
    (batch,) = ColumnDataset(tmp_path, ["x"], 10)
    assert dense(batch, "x").tolist() == [19_723 * 86_400, 19_723 * 86_400 + 36_000]
