"""The Arrow types in which a spec wants a column of a format that holds no types. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import torch

from recis_hybrid.columnio.columns import Column, Dense, Ragged, Text
from recis_hybrid.columnio.convert.numbers import ARROW_OF, ArrowType


def type_hints(columns: Mapping[str, Column | None]) -> dict[str, ArrowType]:
    """Return the types by column, of those columns whose specs say them.

    Args:
        columns: Specs by column.
    """
    hints: dict[str, ArrowType] = {}
    for name, spec in columns.items():
        if isinstance(spec, Dense | Ragged):
            number = _number(spec)
            lists = isinstance(spec, Ragged) or spec.length is not None
            if number is not None:
                hints[name] = pa.list_(number) if lists else number
        elif isinstance(spec, Text):
            hints[name] = pa.string()
    return hints


def _number(spec: Dense | Ragged) -> ArrowType | None:
    if spec.unit is not None or spec.format is not None:
        # Parsed from what is written, whatever the first rows look like.
        return pa.string()
    if spec.scale is not None:
        return pa.decimal128(38, spec.scale)
    if spec.dtype not in ARROW_OF:
        return None
    return pa.bool_() if spec.dtype == torch.bool else ARROW_OF[spec.dtype]
