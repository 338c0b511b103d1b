"""Rows: a part of a clean RecordBatch, whose dense columns are tensors already. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from recis_hybrid.ragged import Batch

from .convert import Converter
from .numbers import Array


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a RecordBatch.

    Tensors of whole columns are made once, where the batch is decoded, and then sliced: to slice Arrow arrays and make
    a tensor of each slice costs several times as much, for each of many small batches.
    """

    batch: Array
    """Clean columns."""
    dense: Mapping[str, torch.Tensor]
    """The columns that are tensors of a row each, over the same memory."""
    first: int
    """The first of these rows."""
    num_rows: int
    """How many these are."""

    @classmethod
    def of(cls, batch: Array, converters: Mapping[str, Converter]) -> Rows:
        """Returns all rows of a clean RecordBatch."""
        dense: dict[str, torch.Tensor] = {}
        for name, each in converters.items():
            if each.dense and isinstance(tensor := each.tensor(batch.column(name)), torch.Tensor):
                dense[name] = tensor
        return cls(batch, dense, 0, batch.num_rows)

    def slice(self, first: int, count: int) -> Rows:
        """Returns `count` of these rows from the `first` on."""
        return Rows(self.batch, self.dense, self.first + first, count)

    def arrow(self) -> Array:
        """Returns these rows as a RecordBatch over the same memory."""
        return self.batch.slice(self.first, self.num_rows)

    def tensors(self, converters: Mapping[str, Converter]) -> Batch:
        """Returns the columns as tensors over the same memory."""
        made: Batch = {}
        for name, each in converters.items():
            if name in self.dense:
                made[name] = self.dense[name].narrow(0, self.first, self.num_rows)
            else:
                made[name] = each.tensor(self.batch.column(name).slice(self.first, self.num_rows))
        return made


def joined(parts: Sequence[Rows], converters: Mapping[str, Converter]) -> Rows:
    """Returns the rows of all parts: those of several in memory of their own.

    Args:
        parts: At least one.
        converters: How columns become tensors.
    """
    parts = [part for part in parts if part.num_rows] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    table = pa.Table.from_batches([part.arrow() for part in parts]).combine_chunks()
    return Rows.of(table.to_batches()[0], converters)
