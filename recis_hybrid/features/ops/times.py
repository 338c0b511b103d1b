"""Operations on times: their calendar parts, and the seconds between them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from recis_hybrid.features.common import LEAST, MOST, ids_of, integers, one
from recis_hybrid.features.op import Column, Form, Kernel, Lowered, Step

Part: TypeAlias = Literal[
    "second", "minute", "hour", "day_of_week", "is_weekend", "day_of_month", "day_of_year", "month", "year"
]
"""The parts of a time."""

PARTS: tuple[str, ...] = get_args(Part)
"""The parts, in the order of their numbers in ``csrc/core/times.h``."""

Unit: TypeAlias = Literal["d", "D", "s", "ms", "us", "ns"]
"""Units of times: days (``"d"`` or ``"D"``), seconds, milliseconds, microseconds, nanoseconds."""

_PER_SECOND: dict[str, int] = {"d": 0, "s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY, _CYCLE, _CYCLE_SHIFT = 86_400, 146_097, 719_468
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _unit_fault(unit: object) -> str | None:
    if not isinstance(unit, str) or unit not in _PER_SECOND:
        return f"unit must be one of {list(_PER_SECOND)}, got {unit!r}"
    return None


def _int_fault(name: str, value: object) -> str | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not LEAST <= value <= MOST):
        return f"{name} must be a 64-bit int, or None, got {value!r}"
    return None


def _times(where: str, form: Form) -> Form:
    if form.dtype.is_floating_point:
        raise TypeError(
            f"{where} takes times as integers, got {form.dtype}; put FillNull (for NaN) and Cast(torch.int64) before it"
        )
    return integers(where, form)


@dataclass(frozen=True)
class DatePart:
    """Times → a calendar part of each, int64: the hour, the day of the week, and so on.

    A time is an integer that counts units since 1970-01-01 00:00:00 UTC, negative before. The calendar is the proleptic
    Gregorian one, with days of 86,400 seconds, and every int64 is a valid time. The column keeps its shape.

    Args:
        part: ``"second"``, ``"minute"`` (0 to 59), ``"hour"`` (0 to 23), ``"day_of_week"`` (0 is Monday, as in
            :meth:`datetime.weekday`), ``"is_weekend"`` (1 on Saturday and Sunday, else 0), ``"day_of_month"`` (from 1),
            ``"day_of_year"`` (from 1), ``"month"`` (1 to 12) or ``"year"``.
        unit: Unit of times: ``"d"``, ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``.
        utc_offset: Offset of local time from UTC, less than a day: seconds, or a string such as ``"+08:00"``.
        missing: Value that stands for a missing time, whose part is -1; None for no such value.

    Example:
        >>> engine = FeatureEngine([Feature("hour", ops=[DatePart("hour", utc_offset="+08:00")], source="clicked_at")])
        >>> engine({"clicked_at": torch.tensor([0, -1, 1_700_000_000])})
        {'hour': tensor([8, 7, 6])}

    References:
        Hinnant: chrono-compatible low-level date algorithms, 2013.
    """

    part: Part
    unit: Unit = "s"
    utc_offset: int | str = 0
    missing: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", "d" if self.unit == "D" else self.unit)
        # Stored as seconds, so that equal offsets compare equal.
        match = re.fullmatch(r"([+-])(\d\d):?(\d\d)", self.utc_offset) if isinstance(self.utc_offset, str) else None
        if match is not None and int(match[3]) < 60:
            seconds = 3600 * int(match[2]) + 60 * int(match[3])
            object.__setattr__(self, "utc_offset", -seconds if match[1] == "-" else seconds)

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        if not isinstance(self.part, str) or self.part not in PARTS:
            return f"part must be one of {list(PARTS)}, got {self.part!r}"
        offset = self.utc_offset
        if not isinstance(offset, int) or isinstance(offset, bool) or not -_DAY < offset < _DAY:
            return (
                f"utc_offset must be seconds from {1 - _DAY} to {_DAY - 1}, or a string such as '+08:00', got "
                f"{offset!r}; for zones whose offset changes, convert the times where they are read"
            )
        if self.unit == "d" and (self.part in PARTS[:3] or offset):
            return f"dates have no time of day, so part must be a part of a date and utc_offset 0, got {self}"
        return _unit_fault(self.unit) or _int_fault("missing", self.missing)

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that computes the part."""
        assert isinstance(self.utc_offset, int)
        flagged = self.utc_offset << 1 | int(self.missing is not None)
        numbers = PARTS.index(self.part), _PER_SECOND[self.unit], flagged, self.missing or 0
        return Lowered(_times("DatePart", one(forms)), (Step("time_part", numbers),))

    def kernel(self) -> Kernel:
        """Return a reference kernel in torch, independent of native code."""

        def kernel(column: Column) -> Column:
            _times("DatePart", Form.of(column))
            times = ids_of(column)
            parts = self._parts(times)
            return column._replace(values=parts if self.missing is None else parts.where(times != self.missing, -1))

        return kernel

    def _parts(self, times: Tensor) -> Tensor:
        days, seconds = times, torch.zeros_like(times)
        if self.unit != "d":
            whole = _floor(times, _PER_SECOND[self.unit])
            days, seconds = _floor(whole, _DAY), whole % _DAY
        assert isinstance(self.utc_offset, int)
        cycles = _floor(days, _CYCLE)
        seconds = seconds + self.utc_offset
        days, seconds = days % _CYCLE + _floor(seconds, _DAY), seconds % _DAY
        weekdays = (days + _CYCLE + 3) % 7  # 1970-01-01 was a Thursday
        if self.part in PARTS[:5]:
            simple = {
                "second": seconds % 60,
                "minute": _floor(seconds, 60) % 60,
                "hour": _floor(seconds, 3600),
                "day_of_week": weekdays,
                "is_weekend": (weekdays >= 5).long(),
            }
            return simple[self.part]
        # Years that begin in March, so that a leap day is the last day of its year.
        since = days + _CYCLE_SHIFT
        eras, since = _floor(since, _CYCLE), since % _CYCLE
        years = _floor(since - _floor(since, 1460) + _floor(since, 36_524) - _floor(since, 146_096), 365)
        in_year = since - (365 * years + _floor(years, 4) - _floor(years, 100))
        from_march = _floor(5 * in_year + 2, 153)
        months = (from_march + 2) % 12 + 1
        years = years + (months <= 2) + 400 * (eras + cycles)
        if self.part == "day_of_month":
            return in_year - _floor(153 * from_march + 2, 5) + 1
        if self.part == "month":
            return months
        if self.part == "year":
            return years
        leap = ((years % 4 == 0) & (years % 100 != 0)) | (years % 400 == 0)
        return torch.where(months <= 2, in_year - 305, in_year + 60 + leap)

    def __str__(self) -> str:
        zone = f", {self.utc_offset:+d} s" if self.utc_offset else ""
        return f"date_part[{self.part}, {self.unit}{zone}]"


def _floor(x: Tensor, by: int) -> Tensor:
    return torch.div(x, by, rounding_mode="floor")


@dataclass(frozen=True)
class Age:
    """Times → whole seconds from each time to another, int64; negative if the other is earlier.

    The other time comes from a second column, ``source=[time, until]``, or is a fixed time, or now. Fractions of a
    second are rounded down, and results saturate at the limits of int64. With ``until`` the column keeps its shape. Two
    columns must both be dense, or ragged with the same rows; or one of them is ``[B]`` and applies to every value of
    the other's rows.

    Args:
        until: None for the second column. An integer in the unit of the times, a :class:`datetime.datetime` with a time
            zone, or an ISO 8601 date or time, in UTC unless it has an offset: ``"2024-02-29"``,
            ``"2024-02-29T12:00+08:00"``. ``"now"`` is the time at which the batch is computed, so runs differ; pass a
            column for reproducible training.
        unit: Unit of times since 1970-01-01 00:00:00 UTC: ``"d"``, ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``.
        missing: Value that stands for a missing time in either column and is left unchanged; None for no such value.

    Example:
        >>> engine = FeatureEngine([Feature("age", ops=[Age(unit="ms")], source=["published", "seen"])])
        >>> engine({"published": torch.tensor([0, 500]), "seen": torch.tensor([86_400_000, 499])})
        {'age': tensor([86400,    -1])}
    """

    until: int | datetime | str | None = None
    unit: Unit = "s"
    missing: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", "d" if self.unit == "D" else self.unit)
        if isinstance(self.until, str) and self.until != "now":
            with contextlib.suppress(ValueError):  # fault() reports it
                moment = datetime.fromisoformat(self.until)
                object.__setattr__(self, "until", moment if moment.tzinfo else moment.replace(tzinfo=UTC))
        if isinstance(self.until, datetime) and self.until.tzinfo is not None and _unit_fault(self.unit) is None:
            nanoseconds = (self.until - _EPOCH) // timedelta(microseconds=1) * 1000
            object.__setattr__(self, "until", self._in_units(nanoseconds))

    @property
    def joins(self) -> bool:
        """True if the operation takes two columns."""
        return self.until is None

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        unit = _unit_fault(self.unit)
        if unit is not None:
            return unit
        if isinstance(self.until, datetime):
            return f"until must have a time zone, got {self.until!r}; set tzinfo=timezone.utc, or another zone"
        if self.until == "now":
            return _int_fault("missing", self.missing)
        fault = _int_fault("until", self.until)
        if fault is not None:
            return f"{fault}; pass a datetime, a date such as '2024-02-29', 'now', or a column as the second source"
        return _int_fault("missing", self.missing)

    def check(self, forms: Sequence[Form]) -> Form:
        """Return the form of the ages.

        Raises:
            TypeError: If a column does not hold integers, or two columns do not match.
        """
        if len(forms) != (2 if self.joins else 1):
            raise TypeError(f"Age takes two columns, got {len(forms)}; name two with source=[...], or set until=")
        time_forms = [_times("Age", form) for form in forms]
        x, y = time_forms[0], time_forms[-1]
        if x.device != y.device:
            raise TypeError(f"Age takes columns on one device, got {x.device} and {y.device}")
        if x.levels != y.levels:
            dense, ragged = (x, y) if x.levels == 0 else (y, x)
            if dense.levels or dense.dims != 1 or ragged.levels != 1:
                raise TypeError(
                    f"Age takes two columns of the same shape, or one [B] and one of rows of times, got {x.levels} and "
                    f"{y.levels} levels of lists of values of {x.dims} and {y.dims} dimensions"
                )
            return ragged
        return x

    def lower(self, forms: Sequence[Form]) -> Lowered | None:
        """Return the instruction that subtracts; None if that needs row offsets or the clock."""
        form = self.check(forms)
        missing = int(self.missing is not None), self.missing or 0
        if self.joins:
            plain = form.levels == 0 and form.dims == 1
            return Lowered(form, (Step("seconds_between", (_PER_SECOND[self.unit], *missing)),)) if plain else None
        if not isinstance(self.until, int):
            return None
        return Lowered(form, (Step("seconds_to", (_PER_SECOND[self.unit], self.until, *missing)),))

    def kernel(self) -> Callable[..., Column]:
        """Return a reference kernel in torch, independent of native code."""

        def of_one(column: Column) -> Column:
            self.check([Form.of(column)])
            until = self._now() if self.until == "now" else self.until
            times = ids_of(column)
            return column._replace(values=self._between(times, times.new_tensor(until)))

        def of_two(x: Column, y: Column) -> Column:
            self.check([Form.of(x), Form.of(y)])
            column = y if x.offsets is None else x
            return column._replace(values=self._between(*_side_by_side(x, y)))

        return of_two if self.joins else of_one

    def _between(self, start: Tensor, end: Tensor) -> Tensor:
        per_second = _PER_SECOND[self.unit]
        if per_second == 0:
            days = _minus(end, start)
            most, least = MOST // _DAY, -(MOST // _DAY)
            seconds = days.clamp(least, most) * _DAY
            seconds = seconds.where(days <= most, MOST).where(days >= least, LEAST)
        else:
            borrow = (end % per_second < start % per_second).long()
            seconds = _minus(_floor(end, per_second), _floor(start, per_second)) - borrow
        if self.missing is None:
            return seconds
        return seconds.where((start != self.missing) & (end != self.missing), self.missing)

    def _in_units(self, nanoseconds: int) -> int:
        return nanoseconds // (_DAY * 10**9 if self.unit == "d" else 10**9 // _PER_SECOND[self.unit])

    # A trace would record the time of tracing as a constant.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _now(self) -> int:
        return self._in_units(time.time_ns())

    def __str__(self) -> str:
        return f"age[{self.unit}]" if self.until is None else f"age[{self.unit}, until {self.until}]"


def _minus(x: Tensor, y: Tensor) -> Tensor:
    """Return the difference, saturated to int64."""
    wrapped = x - y
    over = ((x ^ y) & (x ^ wrapped)) < 0
    return torch.where(over, torch.where(x < 0, LEAST, MOST), wrapped)


def _side_by_side(x: Column, y: Column) -> tuple[Tensor, Tensor]:
    """Return the times of two columns, aligned value by value.

    Raises:
        ValueError: If the columns differ in their number of rows, or in the lengths of rows.
    """
    rows = [(one.values if one.offsets is None else (*one.outer, one.offsets)[0][1:]).shape[0] for one in (x, y)]
    if rows[0] != rows[1]:
        raise ValueError(
            f"the columns have {rows[0]} and {rows[1]} rows; all columns of a batch must have the same number of rows"
        )
    if (x.offsets is None) != (y.offsets is None):
        ragged = y if x.offsets is None else x
        assert ragged.offsets is not None
        # The row of each value, without waiting for a GPU; unused values are assigned to the last row.
        places = torch.arange(ragged.values.shape[0], device=ragged.values.device)
        row = torch.searchsorted(ragged.offsets[1:].contiguous(), places, right=True).clamp(max=rows[0] - 1)
        return tuple(ids_of(one)[row] if one.offsets is None else ids_of(one) for one in (x, y))  # type: ignore[return-value]
    same = x.values.shape == y.values.shape
    if same and x.offsets is not None and y.offsets is not None and x.offsets is not y.offsets and x.values.is_cpu:
        levels = zip((*x.outer, x.offsets), (*y.outer, y.offsets), strict=True)
        same = all(torch.equal(one, other) for one, other in levels)
    if not same:
        raise ValueError(
            f"the columns must have the same number of times in each row, got values {list(x.values.shape)} and "
            f"{list(y.values.shape)}; pass one time for each row ([B]), or truncate both to the same lengths"
        )
    return ids_of(x), ids_of(y)
