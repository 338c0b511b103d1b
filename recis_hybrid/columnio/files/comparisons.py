"""Conditions (column, operator, value) as exact expressions over typed columns. Imports pyarrow.

The value is converted to the type of the column, never the column to the type of the value. A number is expressed in
steps of the column type (integers, digits of a decimal, ticks of a time): it is either a step, or between two steps.
"""

from __future__ import annotations

import datetime
import decimal
import math
import operator
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recis_hybrid.columnio.columns import UNITS
from recis_hybrid.columnio.convert.numbers import ArrowType, is_text
from recis_hybrid.columnio.convert.temporal import is_temporal, temporal_kind, tick_ns

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
"""Operators that take one value."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_CONTEXT = decimal.Context(prec=100)
_EXPECTED = {
    "timestamp": "a datetime.date, datetime.datetime, numpy.datetime64 or a string of ISO 8601",
    "time": "a datetime.time or a string of ISO 8601",
    "duration": "a datetime.timedelta or numpy.timedelta64",
}


def condition_expression(name: str, sign: str, value: Any, arrow_type: ArrowType) -> Any:
    """Return a condition as an expression over a column of a plain type.

    Args:
        name: Name of the column.
        sign: An operator of ``COMPARE``, ``"in"`` or ``"not in"``.
        value: Value to compare with; a list for ``"in"`` and ``"not in"``.
        arrow_type: Type of the column.

    Raises:
        TypeError: The value cannot be compared with the type of the column.
        ValueError: An ordering operator is applied to a null or NaN.
    """
    column = pc.field(name)
    if sign in ("in", "not in"):
        matches = _membership(name, value, arrow_type)
        return matches if sign == "in" else ~matches
    if value is None:
        if sign not in ("==", "!="):
            raise ValueError(
                f"ColumnDataset: the filter ({name!r}, {sign!r}, None) compares a null by order; use == or !="
            )
        return column.is_null() if sign == "==" else column.is_valid()
    kind = _kind(name, arrow_type)
    if kind is None:
        # A column of only nulls matches no comparison.
        return pc.is_valid(column)
    if isinstance(value, float) and math.isnan(value):
        if kind.floats and sign in ("==", "!="):
            return pc.is_nan(column) if sign == "==" else ~pc.is_nan(column)
        raise ValueError(
            f"ColumnDataset: the filter ({name!r}, {sign!r}, nan) compares {arrow_type} with NaN, which has no order; "
            f"use == or != for floats that are NaN"
        )
    if not kind.ordered and sign not in ("==", "!="):
        raise TypeError(
            f"ColumnDataset: the filter ({name!r}, {sign!r}, {value!r}) compares {arrow_type} by order; use ==, != or "
            "in"
        )
    scalars = [None if v is None else kind.array([v])[0] for v in _bounds(kind, name, sign, value, arrow_type)]
    return _compare(_column(name, arrow_type), sign, *scalars)


@dataclass(frozen=True)
class _Kind:
    """Comparison of values with columns of a type."""

    number: Callable[[Any], Any]
    """Converts a Python value for comparison; returns None if the column cannot be compared with it."""
    array: Callable[[list[Any]], Any]
    """Builds an array of converted values in the type of the column; float64 for all float types."""
    expected: str
    """Description of accepted values, for messages."""
    ordered: bool = True
    floats: bool = False
    """True if the column may have NaN."""
    whole: tuple[int, int] | None = None
    """Smallest and largest step of a type whose values are whole steps; None for other types."""


def _bounds(kind: _Kind, name: str, sign: str, value: Any, arrow_type: ArrowType) -> tuple[Any, Any, Any]:
    """Return the exact value in the type, or None and its neighbors in the type, each None if out of range."""
    number = kind.number(value)
    if number is None:
        raise TypeError(
            f"ColumnDataset: the filter ({name!r}, {sign!r}, {value!r}) compares {arrow_type} with "
            f"{type(value).__name__}; use {kind.expected}"
        )
    if kind.floats:
        return _float_bounds(number)
    if kind.whole is None:
        return number, None, None
    least, most = kind.whole
    if isinstance(number, float):
        return None, *((most, None) if number > 0 else (None, least))
    below, above = math.floor(number), math.ceil(number)
    if below == above and least <= below <= most:
        return below, None, None
    if below == above:
        below, above = below - 1, above + 1
    return None, min(below, most) if below >= least else None, max(above, least) if above <= most else None


def _float_bounds(number: Any) -> tuple[Any, Any, Any]:
    if isinstance(number, float):
        return number, None, None
    try:
        near = float(number)
    except OverflowError:
        near = math.inf if number > 0 else -math.inf
    if math.isinf(near):
        edge = math.copysign(sys.float_info.max, near)
        return None, *((edge, near) if near > 0 else (near, edge))
    if Fraction(near) == number:
        return near, None, None
    if near < number:
        return None, near, math.nextafter(near, math.inf)
    return None, math.nextafter(near, -math.inf), near


def _compare(column: Any, sign: str, exact: Any, low: Any, high: Any) -> Any:
    """Return the comparison of a column with an exact scalar, or with a value between two scalars."""
    if exact is None:
        if sign in ("==", "!="):
            return pc.scalar(False) if sign == "==" else column.is_valid()
        below = sign in ("<", "<=")
        edge = low if below else high
        if edge is None:
            return pc.scalar(False)
        return column <= edge if below else column >= edge
    return COMPARE[sign](column, exact)


def _membership(name: str, values: Sequence[Any], arrow_type: ArrowType) -> Any:
    kind = _kind(name, arrow_type)
    column, matches = _column(name, arrow_type), pc.scalar(False)
    if kind is not None:
        exact_values = []
        for value in values:
            if isinstance(value, float) and math.isnan(value):
                exact_values += [value] * kind.floats
            elif value is not None:
                exact, _, _ = _bounds(kind, name, "in", value, arrow_type)
                exact_values += [] if exact is None else [exact]
        if exact_values:
            matches = column.isin(kind.array(exact_values))
    return matches | column.is_null() if None in values else matches


def _column(name: str, arrow_type: ArrowType) -> Any:
    if pa.types.is_floating(arrow_type) and arrow_type != pa.float64():
        # Compare the exact value of a narrow float.
        return pc.field(name).cast(pa.float64())
    wide = _wide_decimal(arrow_type)
    return pc.field(name) if wide == arrow_type else pc.field(name).cast(wide)


def _wide_decimal(arrow_type: ArrowType) -> ArrowType:
    """Return the type in which decimals are compared: pyarrow's ``is_in`` does not take the narrow ones."""
    narrow = pa.types.is_decimal32(arrow_type) or pa.types.is_decimal64(arrow_type)
    return pa.decimal128(arrow_type.precision, arrow_type.scale) if narrow else arrow_type


def footer_decides(sign: str, value: Any, arrow_type: ArrowType) -> bool:
    """Return whether the minimum and maximum of a row group may rule it out.

    For floats they ignore NaN, which differs from every value, and do not distinguish 0.0 from -0.0.
    """
    if not pa.types.is_floating(arrow_type):
        return True
    nan = isinstance(value, float) and math.isnan(value)
    return sign not in ("!=", "in", "not in") and not nan


def _kind(name: str, arrow_type: ArrowType) -> _Kind | None:
    types = pa.types
    if types.is_null(arrow_type):
        return None
    if types.is_boolean(arrow_type):
        return _Kind(lambda v: v if isinstance(v, bool) else None, pa.array, "True or False")
    if types.is_integer(arrow_type):
        signed, bits = types.is_signed_integer(arrow_type), arrow_type.bit_width
        whole = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return _Kind(_number, lambda vs: pa.array(vs, arrow_type), "a number", whole=whole)
    if types.is_floating(arrow_type):
        return _Kind(_number, lambda vs: pa.array(vs, pa.float64()), "a number", floats=True)
    if types.is_decimal(arrow_type):
        scale, most, wide = arrow_type.scale, 10**arrow_type.precision - 1, _wide_decimal(arrow_type)
        return _Kind(
            lambda v: _times(_number(v), Fraction(10) ** scale),
            lambda vs: pa.array([_CONTEXT.create_decimal(v).scaleb(-scale, _CONTEXT) for v in vs], wide),
            "a number or decimal.Decimal",
            whole=(-most, most),
        )
    if is_temporal(arrow_type):
        raw = pa.int32() if types.is_date32(arrow_type) or types.is_time32(arrow_type) else pa.int64()
        tick, most = tick_ns(arrow_type), 2 ** (raw.bit_width - 1) - 1
        return _Kind(
            lambda v: _times(_nanoseconds(v, arrow_type), Fraction(1, tick)),
            lambda vs: pa.array(vs, raw).view(arrow_type),
            _EXPECTED[temporal_kind(arrow_type)],
            whole=(-most - 1, most),
        )
    if is_text(arrow_type):
        strings = types.is_string(arrow_type) or types.is_large_string(arrow_type)
        return _Kind(
            _text if strings else _bytes, lambda vs: pa.array(vs, arrow_type), "a str" if strings else "bytes or a str"
        )
    raise TypeError(
        f"ColumnDataset: filters compare columns of single values, but {name!r} is {arrow_type}; name a field of it, "
        f"or pass a pyarrow expression"
    )


def _number(value: Any) -> Any:
    """Return a number exactly, finite floats as fractions; None if the value is not a number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isinf(value) else Fraction(value)
    if isinstance(value, decimal.Decimal | Fraction):
        return Fraction(value) if not isinstance(value, decimal.Decimal) or value.is_finite() else float(value)
    return None


def _times(number: Any, factor: Fraction) -> Any:
    return number if number is None or isinstance(number, float) else number * factor


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _bytes(value: Any) -> bytes | None:
    if isinstance(value, uuid.UUID):
        return value.bytes
    if isinstance(value, str):
        return value.encode()
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else None


def _nanoseconds(value: Any, arrow_type: ArrowType) -> int | None:
    """Return the nanoseconds of a time or duration, or of a date or timestamp (UTC without a zone) since 1970."""
    kind = temporal_kind(arrow_type)
    if isinstance(value, np.datetime64 | np.timedelta64):
        if isinstance(value, np.datetime64) != (kind == "timestamp") or kind == "time":
            return None
        unit = np.datetime_data(value.dtype)[0]
        steps = {"W": 7 * UNITS["D"], "h": 3600 * UNITS["s"], "m": 60 * UNITS["s"], **UNITS}
        if unit not in steps:
            value, unit = value.astype("datetime64[D]"), "D"
        return int(value.astype(np.int64)) * np.datetime_data(value.dtype)[1] * steps[unit]
    if isinstance(value, str) and kind != "duration":
        try:
            value = (datetime.time if kind == "time" else datetime.datetime).fromisoformat(value)
        except ValueError:
            return None
    if kind == "duration":
        return _steps(value) if isinstance(value, datetime.timedelta) else None
    if kind == "time":
        if not isinstance(value, datetime.time):
            return None
        return _steps(
            datetime.timedelta(
                hours=value.hour, minutes=value.minute, seconds=value.second, microseconds=value.microsecond
            )
        )
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    if not isinstance(value, datetime.datetime):
        return None
    value = value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)
    return _steps(value - _EPOCH)


def _steps(duration: datetime.timedelta) -> int:
    micro = (duration.days * 86_400 + duration.seconds) * 1_000_000 + duration.microseconds
    return micro * 1_000 + getattr(duration, "nanoseconds", 0)
