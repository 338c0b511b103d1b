"""Checks of forms and conversions of values, shared by the operations."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.features.op import Column, Form

LEAST, MOST = -(2**63), 2**63 - 1
NARROW = (torch.int8, torch.int16, torch.int32)
INTEGERS = (*NARROW, torch.int64)
FLOATS = (torch.float32, torch.float64)
MOVABLE = (torch.bool, torch.uint8, *INTEGERS, torch.float16, torch.bfloat16, *FLOATS)


def integers(where: str, form: Form) -> Form:
    """Return the form of the column as int64 ids.

    Raises:
        TypeError: If the column does not hold integers.
    """
    if form.dtype in INTEGERS:
        return form._replace(dtype=torch.int64)
    if form.dtype == torch.uint8:
        raise TypeError(f"{where} takes integers, not the bytes of strings; put a Hash before it")
    remedy = "put a Bucketize before it" if form.dtype.is_floating_point else "convert it with .to(torch.int64)"
    raise TypeError(f"{where} takes integers, got {form.dtype}; {remedy}")


def numbers(where: str, form: Form) -> Form:
    """Return the form if its dtype is int8 to int64, float32 or float64.

    Raises:
        TypeError: If it is none of these.
    """
    if form.dtype not in (*INTEGERS, *FLOATS):
        raise TypeError(
            f"{where} takes int8 to int64, float32 or float64, got {form.dtype}; read strings as numbers, or "
            f"convert other columns with .float()"
        )
    return form


def movable(where: str, form: Form) -> Form:
    """Return the form if native code can move values of its dtype.

    Raises:
        TypeError: If it cannot.
    """
    if form.dtype not in MOVABLE:
        raise TypeError(
            f"{where} takes bool, uint8, int8 to int64 and floats of 16 to 64 bits, got {form.dtype}; convert the "
            f"column with .to(torch.int64) or .float()"
        )
    return form


def ids_of(column: Column) -> Tensor:
    """Return the integers of a column as int64."""
    return column.values.to(torch.int64)


def without_strings(column: Column, ids: Tensor) -> Column:
    """Return a column with each of its strings replaced by an id."""
    if not column.outer:
        return Column(ids)
    return Column(ids, column.outer[-1], column.weights, column.outer[:-1])


def bits(number: float) -> int:
    """Return the bits of a float64 as an int64, as programs hold it."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def word(value: float, dtype: torch.dtype) -> int:
    """Return the bits of a value in a dtype, as an integer."""
    size = dtype.itemsize
    as_bits = torch.tensor([value], dtype=dtype).view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    )
    return int(as_bits[0])


def fits(value: Any, dtype: torch.dtype) -> bool:
    """Return whether a dtype can hold a value: whole numbers in range for integers; floats in range, or not finite."""
    if dtype.is_floating_point:
        return not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max
    if not math.isfinite(value) or value != int(value):
        return False
    limits = torch.iinfo(torch.int8 if dtype == torch.bool else dtype)
    return bool(limits.min <= value <= limits.max)


def one(forms: Sequence[Form]) -> Form:
    """Return the form of the only input of an operation."""
    (form,) = forms
    return form
