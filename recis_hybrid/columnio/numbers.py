"""Plain numbers of Arrow as torch's: dtypes, nulls, and views of the same memory. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import torch
from torch.utils.dlpack import from_dlpack

# pyarrow ships no types.
Array: TypeAlias = Any
ArrowType: TypeAlias = Any

ARROW_OF: dict[torch.dtype, ArrowType] = {
    # Arrow packs eight booleans into a byte and torch does not: they go through bytes.
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
    # torch has few operations for unsigned integers of more than a byte.
    pa.uint16(): torch.int32,
    pa.uint32(): torch.int64,
    pa.uint64(): torch.int64,
}


@dataclass(frozen=True)
class Place:
    """Where an array came from, for messages."""

    column: str
    """The column's name."""
    file: str
    """The file's path."""
    rows: str = ""
    """Which of the file's rows."""

    def __str__(self) -> str:
        return f"columnio: column {self.column!r} of {self.file}{self.rows and f' ({self.rows})'}"


def is_number(arrow_type: ArrowType) -> bool:
    """Returns whether `Numbers` can read that type."""
    return arrow_type in _DTYPE_OF


def nulls_refused(count: int, total: int, place: Place, remedy: str) -> ValueError:
    """Returns the error for nulls in a column whose spec says nothing of them."""
    return ValueError(
        f"{place} has {count} null{'s'[: count > 1]} in {total} values, and its spec does not allow for any; "
        f"give it {remedy}, or write the file without nulls"
    )


def a_few(things: Collection[object]) -> str:
    """Returns the first things of a collection, for messages."""
    shown = ", ".join(str(thing) for thing in list(things)[:5])
    return shown + (f" and {len(things) - 5} more" if len(things) > 5 else "")


@dataclass(frozen=True)
class Numbers:
    """How plain numbers, by themselves or inside lists, become a tensor."""

    dtype: torch.dtype
    """Of the tensor."""
    default: float | None
    """What stands for a null; None refuses nulls."""
    remedy: str
    """A spec that would allow nulls, for messages."""

    def clean(self, array: Array, place: Place) -> Array:
        """Returns the numbers in their dtype, without nulls; the array itself where nothing is to be done.

        Raises:
            ValueError: There is a null and no default, or an integer does not fit into the dtype.
        """
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        array = self._cast(array, place)
        if array.null_count == 0:
            return array
        if self.default is None:
            raise nulls_refused(array.null_count, len(array), place, self.remedy)
        return array.fill_null(pa.scalar(self.default, array.type))

    def tensor(self, array: Array) -> torch.Tensor:
        """Returns clean numbers as a tensor [N] over the same memory, which it keeps alive."""
        tensor = from_dlpack(array)
        return tensor.view(torch.bool) if self.dtype == torch.bool else tensor

    def array(self, tensor: torch.Tensor) -> Array:
        """Returns a tensor [N] of the dtype as clean numbers over the same memory."""
        return pa.array((tensor.view(torch.uint8) if self.dtype == torch.bool else tensor).numpy())

    def _cast(self, array: Array, place: Place) -> Array:
        target = ARROW_OF[self.dtype]
        if array.type == target:
            return array
        if pa.types.is_uint64(array.type) and self.dtype == torch.int64:
            return array.view(target)
        if pa.types.is_boolean(array.type):
            # Arrow converts booleans to bytes, but not to every float.
            array = array.cast(pa.uint8())
        try:
            # Only that integers fit is checked: floats are asked for where rounding is welcome.
            return array.cast(target, safe=not self.dtype.is_floating_point)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{place} does not fit into {self.dtype} ({error}); ask for a wider dtype") from error


def numbers(
    dtype: torch.dtype | None, default: float | None, arrow_type: ArrowType, place: Place, remedy: str
) -> Numbers:
    """Finds how numbers of `arrow_type` are read as `dtype`.

    Args:
        dtype: Of the tensor; None takes the file's.
        default: What stands for a null.
        arrow_type: For which `is_number` holds.
        place: The column and a file, for messages.
        remedy: A spec that would allow nulls, for messages.

    Raises:
        TypeError: There is no conversion to that dtype.
        ValueError: The default is none of the dtype's numbers.
    """
    own = _DTYPE_OF[arrow_type]
    dtype = own if dtype is None else dtype
    if dtype not in ARROW_OF:
        raise TypeError(f"{place} cannot be read as {dtype}; choose one of {', '.join(map(str, ARROW_OF))}")
    if own != dtype and (dtype == torch.bool or (own.is_floating_point and not dtype.is_floating_point)):
        raise TypeError(f"{place} is {arrow_type}, which would be cut as {dtype}; read it as {own} and convert that")
    return Numbers(dtype, None if default is None else _default(default, dtype, place), remedy)


def _default(default: float, dtype: torch.dtype, place: Place) -> float:
    if dtype.is_floating_point:
        return float(default)
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    # A comparison that also fails for NaN, which int() would not take.
    if not low <= default <= high or default != int(default):
        raise ValueError(f"{place} is read as {dtype}, and the default {default} is no such number; give another")
    return int(default)
