"""Operators that map each value or string to one value: ids, numbers, times, vocabularies.

Each function takes the parameters of an operator and returns its kernel, from columns to a column. Kernels raise
ValueError for values that they refuse.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from recis_hybrid.serving.columns import Array, Column, offsets_of
from recis_hybrid.serving.features.hashes import hash_ids, hash_strings

Kernel: TypeAlias = Callable[..., Column]
_LEAST, _MOST = -(2**63), 2**63 - 1
_DAY, _CYCLE, _CYCLE_SHIFT = 86_400, 146_097, 719_468
_PER_SECOND = {"d": 0, "s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def number(value: Any) -> float:
    """Return a number of a program; those that are not finite are strings in JSON."""
    return float(value) if isinstance(value, str) else value


def ids_of(column: Column) -> Array:
    """Return the integers of a column as int64."""
    return column.values.astype(np.int64, copy=False)


def of_strings(column: Column, values: Array) -> Column:
    """Return a column with each of its strings replaced by a value."""
    if not column.outer:
        return Column(values)
    return Column(values, column.outer[-1], column.weights, column.outer[:-1])


def refuse(column: Column, bad: Array, rule: str, remedy: str) -> None:
    """Raise ValueError if a value is bad; the message names the first one and its row."""
    if not bad.any():
        return
    flat = int(np.argmax(bad.reshape(-1)))
    place = flat // math.prod(column.values.shape[1:])
    for offsets in () if column.offsets is None else (column.offsets, *reversed(column.outer)):
        place = int(np.searchsorted(offsets, place, side="right")) - 1
    raise ValueError(f"row {place}: {rule}, got {column.values.reshape(-1)[flat]}; {remedy}")


def hash_(kind: str) -> Kernel:
    """Strings or ids → ids."""

    def kernel(column: Column) -> Column:
        if column.strings:
            assert column.offsets is not None
            return of_strings(column, hash_strings(kind, column.values, column.offsets))
        return column._replace(values=hash_ids(kind, ids_of(column)))

    return kernel


def mod(n: int) -> Kernel:
    """Ids, read as unsigned → remainders."""

    def kernel(column: Column) -> Column:
        unsigned = np.ascontiguousarray(ids_of(column)).view(np.uint64)
        return column._replace(values=(unsigned % np.uint64(n)).view(np.int64))

    return kernel


def multi_hash(multiplier: int, prime: int, buckets: int) -> Kernel:
    """Ids → ids in ``[0, buckets)``."""

    def kernel(column: Column) -> Column:
        # Floored remainders of products that wrap.
        return column._replace(values=(ids_of(column) * np.int64(multiplier)) % prime % buckets)

    return kernel


def decimal_string(unsigned: bool) -> Kernel:
    """Ids → their decimal digits."""

    def kernel(column: Column) -> Column:
        ids = np.ascontiguousarray(ids_of(column))
        digits = [b"%d" % value for value in (ids.view(np.uint64) if unsigned else ids).tolist()]
        values = np.frombuffer(b"".join(digits), np.uint8)
        outer = () if column.offsets is None else (*column.outer, column.offsets)
        return Column(values, offsets_of([len(each) for each in digits]), column.weights, outer)

    return kernel


def bucketize(boundaries: Sequence[Any], right: bool) -> Kernel:
    """Numbers → the number of boundaries at or below them (or below, if not ``right``)."""
    listed = [number(boundary) for boundary in boundaries]
    of_floats = {dtype: np.array(listed, np.float64).astype(dtype) for dtype in (np.float32, np.float64)}
    firsts: list[int] = []
    for boundary in listed:
        if boundary == -math.inf:
            firsts.append(_LEAST)
        elif boundary != math.inf:
            first = math.ceil(boundary) if right else math.floor(boundary) + 1
            if first <= _MOST:
                firsts.append(max(first, _LEAST))
    of_ids = np.array(firsts, np.int64)

    def kernel(column: Column) -> Column:
        if column.values.dtype.kind != "f":
            return column._replace(values=of_ids.searchsorted(ids_of(column), side="right"))
        refuse(column, np.isnan(column.values), "must be a number", "put FillNull before Bucketize, or send a number")
        found = of_floats[column.values.dtype.type].searchsorted(column.values, side="right" if right else "left")
        return column._replace(values=found)

    return kernel


def _floats(column: Column) -> Array:
    return column.values if column.values.dtype.kind == "f" else column.values.astype(np.float32)


def log(plus: Any) -> Kernel:
    """Numbers → logarithms of ``x + plus``."""

    def kernel(column: Column) -> Column:
        values = _floats(column)
        sums = values + values.dtype.type(number(plus))
        refuse(column, ~(sums > 0), "has no logarithm", "put Clip before Log, or send a number above 0")
        return column._replace(values=_logarithms(sums))

    return kernel


@lru_cache(maxsize=1)
def _libm() -> Callable[[float], float] | None:
    """Return logf of the C library, whose results the native operators have; None where it has another name."""
    try:
        function = ctypes.CDLL("libm.so.6").logf
    except (OSError, AttributeError):
        return None
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]
    return function


def _logarithms(values: Array) -> Array:
    flat = values.reshape(-1).tolist()
    if values.dtype == np.float32:
        logf = _libm()
        if logf is None:
            return np.log(values.astype(np.float64)).astype(np.float32)
        return np.array([logf(value) for value in flat], np.float32).reshape(values.shape)
    return np.array([math.log(value) for value in flat], np.float64).reshape(values.shape)


def clip(least: Any, most: Any) -> Kernel:
    """Numbers → numbers within bounds."""
    low, high = number(least), number(most)
    whole = [_MOST if bound == math.inf else _LEAST if bound == -math.inf else bound for bound in (low, high)]
    low_id, high_id = (min(max(int(bound), _LEAST), _MOST) for bound in whole)

    def kernel(column: Column) -> Column:
        if column.values.dtype.kind != "f":
            return column._replace(values=np.clip(ids_of(column), low_id, high_id))
        refuse(column, np.isnan(column.values), "must be a number", "put FillNull before Clip, or send a number")
        dtype = column.values.dtype.type
        limit = float(np.finfo(dtype).max)
        a, b = (dtype(bound if math.isinf(bound) else min(max(bound, -limit), limit)) for bound in (low, high))
        values = column.values
        return column._replace(values=np.where(values < a, a, np.where(values > b, b, values)))

    return kernel


def normalize(mean: Any, std: Any) -> Kernel:
    """Numbers → ``(x - mean) / std``."""

    def kernel(column: Column) -> Column:
        values = _floats(column)
        refuse(column, np.isnan(values), "must be a number", "put FillNull before Normalize, or send a number")
        dtype = values.dtype.type
        return column._replace(values=(values - dtype(mean)) / dtype(std))

    return kernel


def fill_nan(value: Any) -> Kernel:
    """Floats → floats without NaN."""

    def kernel(column: Column) -> Column:
        values = column.values
        if values.dtype.kind != "f":
            return column
        return column._replace(values=np.where(np.isnan(values), values.dtype.type(number(value)), values))

    return kernel


def cast(dtype: str) -> Kernel:
    """Numbers → numbers of another dtype."""
    target = np.dtype(dtype)

    def kernel(column: Column) -> Column:
        values = column.values
        if values.dtype.kind == "f" and target.kind == "i":
            bad = ~((values >= -(2.0**63)) & (values < 2.0**63))
            refuse(column, bad, "must be within the range of int64", "put FillNull or Clip before Cast")
            values = values.astype(np.int64)
        # Integers keep their low bits.
        return column._replace(values=values.astype(target, copy=False))

    return kernel


def date_part(part: str, unit: str, utc_offset: int, missing: int | None) -> Kernel:
    """Time → a calendar part."""

    def kernel(column: Column) -> Column:
        times = ids_of(column)
        parts = _parts(times, part, _PER_SECOND[unit], utc_offset)
        return column._replace(values=parts if missing is None else np.where(times == missing, -1, parts))

    return kernel


def _parts(times: Array, part: str, per_second: int, utc_offset: int) -> Array:
    days: Array = times
    seconds: Array = np.zeros_like(times)
    weekdays: Array
    months: Array
    years: Array
    if per_second:
        whole = times // per_second
        days, seconds = whole // _DAY, whole % _DAY
    # Whole cycles of 400 years are subtracted before anything is added, so that nothing overflows.
    cycles = days // _CYCLE
    seconds = seconds + utc_offset
    days, seconds = days % _CYCLE + seconds // _DAY, seconds % _DAY
    weekdays = (days + _CYCLE + 3) % 7  # 1970-01-01 was a Thursday
    if part == "second":
        return seconds % 60
    if part == "minute":
        return seconds // 60 % 60
    if part == "hour":
        return seconds // 3600
    if part == "day_of_week":
        return weekdays
    if part == "is_weekend":
        return (weekdays >= 5).astype(np.int64)
    # Years that begin in March, so that a leap day is the last day of its year (Hinnant 2013).
    since = days + _CYCLE_SHIFT
    eras, since = since // _CYCLE, since % _CYCLE
    years = (since - since // 1460 + since // 36_524 - since // 146_096) // 365
    in_year = since - (365 * years + years // 4 - years // 100)
    from_march = (5 * in_year + 2) // 153
    months = (from_march + 2) % 12 + 1
    if part == "day_of_month":
        in_month: Array = in_year - (153 * from_march + 2) // 5 + 1
        return in_month
    if part == "month":
        return months
    years = years + (months <= 2) + 400 * (eras + cycles)
    if part == "year":
        return years
    leap = ((years % 4 == 0) & (years % 100 != 0)) | (years % 400 == 0)
    in_calendar: Array = np.where(months <= 2, in_year - 305, in_year + 60 + leap)
    return in_calendar


def age(unit: str, until: int | str | None, missing: int | None) -> Kernel:
    """Time → seconds from it to another one."""
    per_second = _PER_SECOND[unit]

    def seconds_between(start: Array, end: Any) -> Array:
        seconds = _seconds(start, np.asarray(end, np.int64), per_second)
        if missing is None:
            return seconds
        return np.where((start == missing) | (np.asarray(end) == missing), missing, seconds)

    def of_one(column: Column) -> Column:
        end = until
        if end == "now":
            end = time.time_ns() // (_DAY * 10**9 if unit == "d" else 10**9 // per_second)
        return column._replace(values=seconds_between(ids_of(column), end))

    def of_two(x: Column, y: Column) -> Column:
        column = y if x.offsets is None else x
        start, end = ids_of(x), ids_of(y)
        if (x.offsets is None) != (y.offsets is None):
            assert column.offsets is not None
            lengths = np.diff(column.offsets)
            start, end = (
                np.repeat(values, lengths) if each.offsets is None else values
                for each, values in ((x, start), (y, end))
            )
        elif not _same_rows(x, y):
            raise ValueError("both columns must have the same number of times in each row; send lists of equal lengths")
        return column._replace(values=seconds_between(start, end))

    return of_two if until is None else of_one


def _same_rows(x: Column, y: Column) -> bool:
    if x.values.shape != y.values.shape:
        return False
    if x.offsets is None or y.offsets is None:
        return True
    return all(map(np.array_equal, (*x.outer, x.offsets), (*y.outer, y.offsets)))


def _seconds(start: Array, end: Array, per_second: int) -> Array:
    if per_second:
        borrow = (end % per_second < start % per_second).astype(np.int64)
        return _minus(end // per_second, start // per_second) - borrow
    days = _minus(end, start)
    most = _MOST // _DAY
    seconds = np.clip(days, -most, most) * _DAY
    return np.where(days > most, _MOST, np.where(days < -most, _LEAST, seconds))


def _minus(x: Array, y: Array) -> Array:
    """Return the difference, saturated to int64."""
    wrapped = x - y
    over = ((x ^ y) & (x ^ wrapped)) < 0
    return np.where(over, np.where(x < 0, _LEAST, _MOST), wrapped)


def entries_of(listed: Sequence[Any]) -> list[Any]:
    """Return the entries of a vocabulary: ints, or strings as bytes; those that are not UTF-8 are in hexadecimal."""
    return [
        entry.encode() if isinstance(entry, str) else bytes.fromhex(entry["hex"]) if isinstance(entry, dict) else entry
        for entry in listed
    ]


def strings_of(column: Column) -> list[bytes]:
    """Return the strings of a column."""
    assert column.offsets is not None
    whole, ends = column.values.tobytes(), column.offsets.tolist()
    return [whole[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]


def vocabulary(entries: Sequence[Any], unknown: int | None) -> Kernel:
    """Strings or ids → their positions in a list."""
    listed = entries_of(entries)
    places = {entry: place for place, entry in enumerate(listed)}
    order = np.argsort(np.array(listed, np.int64)) if isinstance(listed[0], int) else np.empty(0, np.int64)
    keys = np.array(listed, np.int64)[order] if isinstance(listed[0], int) else order

    def kernel(column: Column) -> Column:
        if column.strings:
            strings = strings_of(column)
            found = [places.get(string, -1) for string in strings]
            if -1 in found:
                if unknown is None:
                    bad = strings[found.index(-1)]
                    raise ValueError(f"{bad.decode('utf-8', 'replace')!r} is not in the vocabulary; send one that is")
                found = [unknown if place < 0 else place for place in found]
            return of_strings(column, np.array(found, np.int64))
        ids = ids_of(column)
        at = np.minimum(keys.searchsorted(ids), len(keys) - 1)
        known = keys[at] == ids
        if unknown is None:
            refuse(column, ~known, "must be in the vocabulary", "send an id that is")
        return column._replace(values=np.where(known, order[at], 0 if unknown is None else unknown))

    return kernel


def mask(values: Sequence[Any]) -> Kernel:
    """Values or strings → float32: 0 for the listed ones, 1 for all others."""
    listed = entries_of(values)
    strings = set(listed) if isinstance(listed[0], bytes) else set()
    numbers = [] if strings else [number(value) for value in listed]
    finite = [value for value in numbers if math.isfinite(value) and value == int(value)]
    whole = np.array([int(value) for value in finite if _LEAST <= value <= _MOST], np.int64)

    def kernel(column: Column) -> Column:
        if column.strings:
            return of_strings(column, np.array([string not in strings for string in strings_of(column)], np.float32))
        if column.values.dtype.kind == "f":
            kept = np.ones(column.values.shape, bool)
            for value in numbers:
                kept &= column.values != column.values.dtype.type(value)
            return column._replace(values=kept.astype(np.float32))
        return column._replace(values=(~np.isin(ids_of(column), whole)).astype(np.float32))

    return kernel
