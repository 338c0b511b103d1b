"""Conversion of plain Arrow numbers: dtypes, nulls, and views of the same memory. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.dlpack import from_dlpack

from recis_hybrid.columnio.convert.temporal import is_temporal, parse_times, ticks

# pyarrow ships no type stubs.
Array: TypeAlias = Any
ArrowType: TypeAlias = Any

ARROW_OF: dict[torch.dtype, ArrowType] = {
    # Arrow packs eight booleans into a byte and torch does not, so booleans are converted to bytes.
    torch.bool: pa.uint8(),
    torch.uint8: pa.uint8(),
    torch.int8: pa.int8(),
    torch.int16: pa.int16(),
    torch.int32: pa.int32(),
    torch.int64: pa.int64(),
    torch.float16: pa.float16(),
    torch.float32: pa.float32(),
    torch.float64: pa.float64(),
}
_DTYPE_OF: dict[ArrowType, torch.dtype] = {
    **{arrow: dtype for dtype, arrow in ARROW_OF.items() if dtype != torch.bool},
    pa.bool_(): torch.bool,
    # torch has few operations for unsigned integers wider than a byte.
    pa.uint16(): torch.int32,
    pa.uint32(): torch.int64,
    pa.uint64(): torch.int64,
}

TOO_LARGE: ArrowType = pa.decimal256(76, 0)
"""Type of a text file's column of integers that no 64-bit type holds; only a spec with a dtype reads it."""


@dataclass(frozen=True)
class Place:
    """Origin of an array, for messages."""

    column: str
    """Name of the column."""
    file: str
    """Path of the file."""
    rows: str = ""
    """Rows of the file."""

    def __str__(self) -> str:
        return f"columnio: column {self.column!r} of {self.file}{self.rows and f' ({self.rows})'}"


# Largest n such that a float of that type holds every integer up to n.
_EXACT = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}


def is_number(arrow_type: ArrowType) -> bool:
    """Return whether ``Numbers`` reads a type: numbers, decimals, dates and times."""
    return arrow_type in _DTYPE_OF or pa.types.is_decimal(arrow_type) or is_temporal(arrow_type)


def is_text(arrow_type: ArrowType) -> bool:
    """Return whether a type is a string or binary type."""
    types = pa.types
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(arrow_type) for test in (*strings, *binaries))


def dtype_of(arrow_type: ArrowType) -> torch.dtype:
    """Return the default dtype of numbers of a type."""
    if pa.types.is_decimal(arrow_type):
        return torch.int64 if arrow_type.scale <= 0 else torch.float64
    return torch.int64 if is_temporal(arrow_type) or is_text(arrow_type) else _DTYPE_OF[arrow_type]


def null_error(count: int, total: int, place: Place, remedy: str, kind: str = "null") -> ValueError:
    """Return the error for nulls in a column whose spec does not allow them."""
    return ValueError(
        f"{place} has {count} {kind}{'s'[: count > 1]} in {total} values, but its spec does not allow any; use "
        f"{remedy}, or write the file without nulls"
    )


def a_few(items: Collection[object]) -> str:
    """Return the first items of a collection as text, for messages."""
    text = ", ".join(str(item) for item in list(items)[:5])
    return text + (f" and {len(items) - 5} more" if len(items) > 5 else "")


@dataclass(frozen=True)
class Numbers:
    """Conversion of plain numbers, alone or inside lists, to a tensor."""

    dtype: torch.dtype
    """Dtype of the tensor."""
    default: float | None
    """Value for a null; None rejects nulls."""
    remedy: str
    """A spec that would allow nulls, for messages."""
    unit: str = "s"
    """Unit of dates and times."""
    format: str | None = None
    """``strptime`` format of strings that are dates or times."""
    scale: int | None = None
    """Exponent of the power of 10 by which decimals are multiplied; None for no scale."""

    def clean(self, array: Array, place: Place) -> Array:
        """Return the numbers in the dtype, without nulls; the array itself if nothing changes.

        Raises:
            ValueError: There is a null but no default, or an integer does not fit into the dtype.
        """
        array = self._cast(array, place)
        if array.null_count == 0:
            return array
        if self.default is None:
            raise null_error(array.null_count, len(array), place, self.remedy)
        return array.fill_null(pa.scalar(self.default, array.type))

    def tensor(self, array: Array) -> torch.Tensor:
        """Return a tensor [N] that shares the memory of clean numbers and keeps it alive."""
        tensor = from_dlpack(array)
        return tensor.view(torch.bool) if self.dtype == torch.bool else tensor

    def array(self, tensor: torch.Tensor) -> Array:
        """Return clean numbers that share the memory of a tensor [N] of the dtype."""
        return pa.array((tensor.view(torch.uint8) if self.dtype == torch.bool else tensor).numpy())

    def _cast(self, array: Array, place: Place) -> Array:
        target = ARROW_OF[self.dtype]
        if array.type == target:
            return array
        if is_text(array.type) or is_temporal(array.type):
            array = self._time(array, place)
        elif pa.types.is_decimal(array.type):
            array = self._decimal(array, place)
        elif pa.types.is_floating(array.type) and not self.dtype.is_floating_point:
            array = self._whole(array, place)
        if pa.types.is_uint64(array.type) and self.dtype == torch.int64:
            return array.view(target)
        if pa.types.is_boolean(array.type):
            # Arrow casts booleans to bytes, but not to every float type.
            array = array.cast(pa.uint8())
        try:
            # Checked only for integers: a float dtype accepts rounding.
            return array.cast(target, safe=not self.dtype.is_floating_point)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{place} does not fit into {self.dtype} ({error}); use a wider dtype") from error

    def _time(self, array: Array, place: Place) -> Array:
        try:
            return ticks(array, self.unit) if is_temporal(array.type) else parse_times(array, self.unit, self.format)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{place} does not fit into int64 in the unit {self.unit!r} ({error}); use a coarser unit"
            ) from error
        except ValueError as error:
            expected = "a date or time in ISO 8601" if self.format is None else f"in the format {self.format!r}"
            remedy = 'set format=, such as "%d/%m/%Y"' if self.format is None else "correct the format"
            raise ValueError(f"{place} has the value {str(error)!r}, which is not {expected}; {remedy}") from error

    def _whole(self, array: Array, place: Place) -> Array:
        limit = _EXACT[array.type]
        if pa.types.is_float16(array.type):
            array = array.cast(pa.float32())
        fits = pc.and_(pc.equal(pc.floor(array), array), pc.less_equal(pc.abs(array), limit))
        wrong = array.filter(pc.invert(fits))
        if len(wrong):
            raise ValueError(
                f"{place} has the float {wrong[0].as_py()!r}, which cannot be read as {self.dtype}: it is not an "
                f"integer that such a float holds exactly (at most {limit}); read it as a float, or write integers"
            )
        return array.cast(pa.int64())

    def _decimal(self, array: Array, place: Place) -> Array:
        if self.dtype.is_floating_point and self.scale is None:
            return array.cast(pa.float64())
        scale = self.scale or 0
        try:
            array = array.cast(pa.decimal256(76, scale))
        except pa.ArrowInvalid as error:
            wrong = next((each for each in array.drop_null().to_pylist() if each.scaleb(scale) % 1), array[0])
            raise ValueError(
                f"{place} is {array.type} and has the value {wrong}, which times 10**{scale} is not a whole number; "
                f"set scale={array.type.scale}, or read it as torch.float64"
            ) from error
        # The same digits without the decimal point.
        array = pa.Array.from_buffers(pa.decimal256(76, 0), len(array), array.buffers(), offset=array.offset)
        for integer in (pa.int64(), pa.uint64()):
            try:
                return array.cast(integer)
            except pa.ArrowInvalid as error:
                failed = error
        raise ValueError(
            f"{place} has decimals that do not fit into 64 bits ({failed}); read it as torch.float64, or write it as "
            f"strings and read it with Text()"
        ) from failed


def numbers(
    dtype: torch.dtype | None,
    default: float | None,
    arrow_type: ArrowType,
    place: Place,
    remedy: str,
    *,
    unit: str | None = None,
    format: str | None = None,
    scale: int | None = None,
) -> Numbers:
    """Return the conversion of numbers from a type to a dtype.

    Args:
        dtype: Dtype of the tensor; None keeps that of the file.
        default: Value for a null.
        arrow_type: A type for which ``is_number`` holds; strings are allowed with a unit or format.
        place: The column and a file, for messages.
        remedy: A spec that would allow nulls, for messages.
        unit: Unit of dates and times.
        format: Format of strings that are dates or times.
        scale: Scale of decimals.

    Raises:
        TypeError: There is no conversion to that dtype, or the type has no unit, format or scale.
        ValueError: The default does not fit the dtype.
    """
    temporal, decimals = is_temporal(arrow_type) or is_text(arrow_type), pa.types.is_decimal(arrow_type)
    if unit is not None and not temporal:
        raise TypeError(f"{place} is {arrow_type}, which has no unit of time; omit unit={unit!r}")
    # Dates are allowed with a format: other files may have them as strings.
    if format is not None and not temporal:
        raise TypeError(f"{place} is {arrow_type}, which needs no parsing; omit format={format!r}")
    if scale is not None and not decimals:
        raise TypeError(f"{place} is {arrow_type}, which has no decimal places; omit scale={scale}")
    file_dtype = torch.int64 if scale is not None else dtype_of(arrow_type)
    dtype = file_dtype if dtype is None else dtype
    if dtype not in ARROW_OF:
        raise TypeError(f"{place} cannot be read as {dtype}; choose one of {', '.join(map(str, ARROW_OF))}")
    if file_dtype != dtype and dtype == torch.bool:
        raise TypeError(
            f"{place} is {arrow_type}, which loses information as {dtype}; read it as {file_dtype} and convert the "
            f"tensor"
        )
    converted = None if default is None else _default(default, dtype, place)
    return Numbers(dtype, converted, remedy, unit or "s", format, scale)


def _default(default: float, dtype: torch.dtype, place: Place) -> float:
    if dtype.is_floating_point:
        return float(default)
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    # This comparison also fails for NaN, which int() would not accept.
    if not low <= default <= high or default != int(default):
        raise ValueError(f"{place} is read as {dtype}: default {default} does not fit; use another")
    return int(default)
