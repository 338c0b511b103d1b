"""Joint types of columns whose types differ between files. Imports pyarrow."""

from __future__ import annotations

import pyarrow as pa
import torch

from recis_hybrid.columnio.convert.layouts import is_list
from recis_hybrid.columnio.convert.numbers import ARROW_OF, TOO_LARGE, ArrowType, dtype_of, is_number, is_text
from recis_hybrid.columnio.convert.temporal import is_temporal, temporal_kind


def unified_type(one: ArrowType, other: ArrowType, *, explicit: bool) -> ArrowType | None:
    """Return a type whose tensors hold the values of two plain types; None if there is none.

    Integers join with integers, floats with floats, dates with timestamps, strings with bytes, lists with lists of any
    layout whose values join, structs with structs of the same fields, and nulls with everything.

    Args:
        one: A plain type.
        other: Another plain type.
        explicit: Whether the spec sets the dtype, so that any kind of numbers, and strings to parse, can be joined.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if is_list(one) and is_list(other):
        inner = unified_type(one.value_type, other.value_type, explicit=explicit)
        if inner is None:
            return None
        fixed = pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other)
        return pa.list_(inner, one.list_size) if fixed and one.list_size == other.list_size else pa.large_list(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _unified_structs(one, other, explicit)
    if is_text(one) and is_text(other):
        return pa.large_binary()
    if is_temporal(one) and is_temporal(other) and temporal_kind(one) == temporal_kind(other):
        return one
    if not (is_number(one) and is_number(other)) or is_temporal(one) or is_temporal(other):
        # Text files may have strings where other files have dates or decimals.
        times = (is_temporal(one) and is_text(other)) or (is_temporal(other) and is_text(one))
        return (one if is_temporal(one) else other) if explicit and times else None
    dtypes = dtype_of(one), dtype_of(other)
    if not explicit and (
        TOO_LARGE in (one, other) or torch.bool in dtypes or dtypes[0].is_floating_point != dtypes[1].is_floating_point
    ):
        return None
    if pa.types.is_decimal(one) and pa.types.is_decimal(other):
        return one if one.scale >= other.scale else other
    joint = torch.promote_types(*dtypes)
    return pa.bool_() if joint == torch.bool else ARROW_OF[joint]


def _unified_structs(one: ArrowType, other: ArrowType, explicit: bool) -> ArrowType | None:
    if sorted(field.name for field in one) != sorted(field.name for field in other):
        return None
    fields = []
    for field in one:
        inner = unified_type(field.type, other.field(field.name).type, explicit=explicit)
        if inner is None:
            return None
        fields.append(field.with_type(inner))
    return pa.struct(fields)
