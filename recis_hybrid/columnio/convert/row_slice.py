"""Rows of a clean RecordBatch whose dense columns are already tensors. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import pyarrow as pa
import torch

from recis_hybrid.columnio.convert.convert import Converter
from recis_hybrid.columnio.convert.numbers import Array
from recis_hybrid.ragged import Batch


class _Split:
    """Dense columns of a RecordBatch and the sizes of its parts; all are split at once, on first use of a part."""

    def __init__(self, columns: Mapping[str, torch.Tensor], sizes: list[int]) -> None:
        self.columns = columns
        self._sizes = sizes

    @cached_property
    def parts(self) -> dict[str, Sequence[torch.Tensor]]:
        """Parts of each column: tensors that share its memory, without autograd views."""
        return {name: torch.unsafe_split_with_sizes(column, self._sizes) for name, column in self.columns.items()}


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a RecordBatch.

    Tensors of whole columns are created once, when the batch is decoded, and split into batches with one call per
    column. Slicing Arrow arrays and converting each slice to a tensor would take many times longer.
    """

    batch: Array
    """Clean columns."""
    split: _Split
    """Dense columns as tensors over the same memory."""
    number: int
    """Number of the part with these rows."""
    first: int
    """First row in the batch."""
    num_rows: int
    """Number of rows."""

    @classmethod
    def of(cls, batch: Array, converters: Mapping[str, Converter]) -> Rows:
        """Return all rows of a clean RecordBatch."""
        dense: dict[str, torch.Tensor] = {}
        for name, each in converters.items():
            if each.dense and isinstance(tensor := each.tensor(batch.column(name)), torch.Tensor):
                dense[name] = tensor
        return cls(batch, _Split(dense, [batch.num_rows]), 0, 0, batch.num_rows)

    def slices(self, ranges: Sequence[tuple[int, int]]) -> list[Rows]:
        """Return parts of a whole RecordBatch.

        Args:
            ranges: First row and end of each part, ascending and not overlapping.
        """
        ends = [0, *(end for each in ranges for end in each), self.num_rows]
        split = _Split(self.split.columns, [stop - first for first, stop in pairwise(ends)])
        return [
            Rows(self.batch, split, 2 * number + 1, first, stop - first) for number, (first, stop) in enumerate(ranges)
        ]

    def arrow(self) -> Array:
        """Return these rows as a RecordBatch over the same memory."""
        return self.batch.slice(self.first, self.num_rows)

    def tensors(self, converters: Mapping[str, Converter]) -> Batch:
        """Return the columns as tensors over the same memory."""
        dense = self.split.parts
        return {
            name: dense[name][self.number]
            if name in dense
            else each.tensor(self.batch.column(name).slice(self.first, self.num_rows))
            for name, each in converters.items()
        }


def concat_rows(parts: Sequence[Rows], converters: Mapping[str, Converter]) -> Rows:
    """Return the rows of all parts, copied unless one part has them all.

    Args:
        parts: At least one part.
        converters: Converters by column.
    """
    parts = [part for part in parts if part.num_rows] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    table = pa.Table.from_batches([part.arrow() for part in parts]).combine_chunks()
    return Rows.of(table.to_batches()[0], converters)
