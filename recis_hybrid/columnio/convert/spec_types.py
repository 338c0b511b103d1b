"""Arrow types implied by specs, for formats without types and for columns of only nulls. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import torch

from recis_hybrid.columnio.columns import Column, Dense, Ragged, Text, Weighted
from recis_hybrid.columnio.convert.layouts import is_list
from recis_hybrid.columnio.convert.numbers import ARROW_OF, ArrowType, Place


def type_hints(columns: Mapping[str, Column | None]) -> dict[str, ArrowType]:
    """Return the types in which formats without types read columns, for the specs that imply one.

    Args:
        columns: Specs by column.
    """
    hints: dict[str, ArrowType] = {}
    for name, spec in columns.items():
        if isinstance(spec, Dense | Ragged):
            number = _value_type(spec)
            lists = isinstance(spec, Ragged) or spec.length is not None
            if number is not None:
                hints[name] = pa.list_(number) if lists else number
        elif isinstance(spec, Text):
            hints[name] = pa.string()
    return hints


def _value_type(spec: Dense | Ragged) -> ArrowType | None:
    """Return the type of the values that a spec implies; None if the file determines it."""
    if spec.unit is not None or spec.format is not None:
        # Dates and times are parsed from text, whatever the first rows look like.
        return pa.string()
    if spec.scale is not None:
        return pa.decimal128(38, spec.scale)
    if spec.dtype not in ARROW_OF:
        return None
    return pa.bool_() if spec.dtype == torch.bool else ARROW_OF[spec.dtype]


def with_types(arrow_type: ArrowType, spec: Column | None, place: Place) -> ArrowType:
    """Return a plain type with its null types replaced by the type that a spec implies.

    Raises:
        TypeError: The spec implies no type.
    """
    inner: ArrowType = None
    nest = False
    if isinstance(spec, Dense | Ragged):
        nest = isinstance(spec, Ragged) or spec.length is not None
        inner = _value_type(spec)
        if inner is None and spec.dtype is None and spec.default is not None:
            inner = pa.int64() if isinstance(spec.default, int) else pa.float32()
    elif isinstance(spec, Text):
        inner, nest = pa.string(), spec.null_as_empty
    elif isinstance(spec, Weighted):
        return _with_pair_types(arrow_type, spec)
    if inner is None:
        raise TypeError(
            f"{place} is {arrow_type}: all its values are null, so its type is unknown; use a spec with a type, as "
            f"in Dense(torch.float32, default=0), Ragged(torch.int64, null_as_empty=True) or "
            f'Text(default=""), or omit the column'
        )
    if pa.types.is_null(arrow_type):
        return pa.list_(inner) if nest else inner
    return _filled(arrow_type, inner)


def _with_pair_types(arrow_type: ArrowType, spec: Weighted) -> ArrowType:
    ids = ARROW_OF[spec.dtype or torch.int64]
    if spec.weights is not None:
        id_type, weight_type = arrow_type.field(0).type, arrow_type.field(1).type
        parts = [
            pa.list_(inner) if pa.types.is_null(each) else _filled(each, inner)
            for each, inner in ((id_type, ids), (weight_type, pa.float32()))
        ]
        return pa.struct([("id", parts[0]), ("weight", parts[1])])
    pair = pa.struct([("id", ids), ("weight", pa.float32())])
    if pa.types.is_null(arrow_type) or (is_list(arrow_type) and pa.types.is_null(arrow_type.value_type)):
        return pa.list_(pair)
    return _filled(arrow_type, ids)


def _filled(arrow_type: ArrowType, inner: ArrowType) -> ArrowType:
    if pa.types.is_null(arrow_type):
        return inner
    if is_list(arrow_type):
        value = _filled(arrow_type.value_type, inner)
        return pa.large_list(value) if pa.types.is_large_list(arrow_type) else pa.list_(value)
    if pa.types.is_struct(arrow_type):
        return pa.struct([field.with_type(_filled(field.type, inner)) for field in arrow_type])
    return arrow_type
