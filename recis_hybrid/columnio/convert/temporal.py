"""Conversion of dates, timestamps, times of day and durations, or strings of them, to int64. Imports pyarrow."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recis_hybrid.columnio.columns import UNITS

Array = Any
ArrowType = Any

_ZONE = r"(:\d\d(\.\d+)?|T\d\d|\s\d\d) ?(Z|[+-]\d\d(:?\d\d)?)$"
_TIME_OF_DAY = r"^\d\d:\d\d(:\d\d(\.\d{1,9})?)?$"
# Directives of dates.
_DATES = re.compile(r"%[aAbBcdDeFgGhjmsuUVwWxyY]")
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def is_temporal(arrow_type: ArrowType) -> bool:
    """Return whether a type is a date, timestamp, time or duration."""
    types = pa.types
    return bool(
        types.is_date(arrow_type)
        or types.is_timestamp(arrow_type)
        or types.is_time(arrow_type)
        or types.is_duration(arrow_type)
    )


def temporal_kind(arrow_type: ArrowType) -> str:
    """Return ``"time"``, ``"duration"`` or ``"timestamp"`` (also for a date) for a temporal type."""
    if pa.types.is_time(arrow_type):
        return "time"
    return "duration" if pa.types.is_duration(arrow_type) else "timestamp"


def tick_ns(arrow_type: ArrowType) -> int:
    """Return the nanoseconds of one unit of a temporal type."""
    if pa.types.is_date32(arrow_type):
        return UNITS["D"]
    return UNITS["ms" if pa.types.is_date64(arrow_type) else arrow_type.unit]


def ticks(array: Array, unit: str) -> Array:
    """Return a temporal array as int64 in a unit, rounded down; a view of the same memory if the unit is its own.

    Raises:
        pyarrow.ArrowInvalid: A value does not fit into int64.
    """
    source_ns, unit_ns = tick_ns(array.type), UNITS[unit]
    narrow = pa.types.is_date32(array.type) or pa.types.is_time32(array.type)
    values = array.view(pa.int32()).cast(pa.int64()) if narrow else array.view(pa.int64())
    if source_ns > unit_ns:
        return pc.multiply_checked(values, source_ns // unit_ns)
    return values if source_ns == unit_ns else _floor_divide(values, unit_ns // source_ns)


def parse_times(texts: Array, unit: str, time_format: str | None) -> Array:
    """Return strings of dates or times as int64 in a unit, rounded down.

    Args:
        texts: Strings; nulls stay nulls, and empty strings become nulls.
        unit: Unit of the result.
        time_format: Format for ``datetime.strptime``; None reads ISO 8601 and times of day, ``10:30:05``.

    Raises:
        ValueError: A string does not have the format; the message is the string.
        pyarrow.ArrowInvalid: A value does not fit into int64.
    """
    texts = texts.cast(pa.large_string())
    # In text files a null is an empty field.
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, texts.type), texts)
    return _iso(texts, unit) if time_format is None else _by_format(texts, unit, time_format)


def _iso(texts: Array, unit: str) -> Array:
    none = pa.scalar(None, texts.type)
    zoned = pc.match_substring_regex(texts, _ZONE)
    timed = pc.match_substring_regex(texts, _TIME_OF_DAY)
    result = pa.nulls(len(texts), pa.int64())
    of_day = pc.if_else(timed, _of_day(texts), none)
    plain = pc.if_else(pc.or_(zoned, timed), none, texts)
    for part, zone in (
        (pc.if_else(zoned, texts, none), "UTC"),
        (of_day, None),
        (plain, None),
    ):
        if part.null_count < len(part):
            result = pc.coalesce(result, _cast(part, unit, zone))
    return result


def _cast(texts: Array, unit: str, zone: str | None) -> Array:
    # Fractions of a second need a fine unit, but nanoseconds cover only a short range.
    for finest in ("us", "ns"):
        try:
            return ticks(texts.cast(pa.timestamp(finest, zone)), unit)
        except pa.ArrowInvalid as error:
            failed = error
    match = re.search(r"Failed to parse string: '(.*)' as a scalar", str(failed), re.DOTALL)
    if match is None:
        raise failed
    raise ValueError(match[1])


def _by_format(texts: Array, unit: str, time_format: str) -> Array:
    if _DATES.search(time_format) is None:
        texts = _of_day(texts)
        time_format = f"%Y-%m-%d {time_format}"
    times: Array | None = None
    if "%f" not in time_format:
        try:
            times = pc.strptime(texts, format=time_format, unit="s")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            times = None
    if times is None:
        exact = pc.invert(pc.is_valid(texts))
        times = pa.nulls(len(texts), pa.timestamp("s"))
    else:
        # Arrow reads the 31st of February as the 2nd of March: strings that do not round-trip are parsed by Python.
        exact = pc.fill_null(pc.equal(pc.strftime(times, format=time_format), texts), True)
    result = ticks(times, unit)
    if pc.all(exact).as_py() is False:
        rest = pc.if_else(exact, pa.scalar(None, texts.type), texts).dictionary_encode()
        values = pa.array([_strptime(text, time_format, unit) for text in rest.dictionary.to_pylist()], pa.int64())
        result = pc.if_else(exact, result, values.take(rest.indices))
    return result


def _strptime(text: str, time_format: str, unit: str) -> int:
    try:
        when = datetime.datetime.strptime(text, time_format)
    except ValueError as error:
        raise ValueError(text) from error
    when = when if when.tzinfo is not None else when.replace(tzinfo=datetime.UTC)
    return (when - _EPOCH) // datetime.timedelta(microseconds=1) * 1_000 // UNITS[unit]


def _of_day(times: Array) -> Array:
    day, between = (pa.scalar(text, times.type) for text in ("1970-01-01", " "))
    return pc.binary_join_element_wise(day, times, between)


def _floor_divide(values: Array, by: int) -> Array:
    quotient = pc.divide(values, by)
    below = pc.less(values, pc.multiply(quotient, by))
    return pc.subtract(quotient, below.cast(pa.int64()))
