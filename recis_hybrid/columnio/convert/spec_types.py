"""Arrow types implied by specs, for formats without types and for columns of only nulls. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import torch

from recis_hybrid.columnio.columns import Column, Dense, Ragged, Text
from recis_hybrid.columnio.convert.numbers import ARROW_OF, ArrowType


def type_hints(columns: Mapping[str, Column | None]) -> dict[str, ArrowType]:
    """Return the types in which formats without types read columns, for the specs that imply one.

    Args:
        columns: Specs by column.
    """
    hints: dict[str, ArrowType] = {}
    for name, spec in columns.items():
        if isinstance(spec, Dense | Ragged):
            number = value_type(spec)
            lists = isinstance(spec, Ragged) or spec.length is not None
            if number is not None:
                hints[name] = pa.list_(number) if lists else number
        elif isinstance(spec, Text):
            hints[name] = pa.string()
    return hints


def value_type(spec: Dense | Ragged) -> ArrowType | None:
    """Return the type of the values that a spec implies; None if the file determines it."""
    if spec.unit is not None or spec.format is not None:
        # Dates and times are parsed from text, whatever the first rows look like.
        return pa.string()
    if spec.scale is not None:
        return pa.decimal128(38, spec.scale)
    if spec.dtype not in ARROW_OF:
        return None
    return pa.bool_() if spec.dtype == torch.bool else ARROW_OF[spec.dtype]
