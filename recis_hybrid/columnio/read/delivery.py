"""Conversion of the rows of a batch to tensors, transforms and pinned memory, in the reader's threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from recis_hybrid.columnio.convert.convert import Converter
from recis_hybrid.columnio.convert.row_slice import Rows
from recis_hybrid.ragged import Batch


@dataclass(frozen=True)
class Delivery:
    """Convert rows to the batch that the consumer receives.

    Raises:
        ValueError: Pinned memory is not available, or a column has the mask's name.
    """

    converters: Mapping[str, Converter]
    """Converters of the columns."""
    mask: str | None
    """Name of a bool column that is False for padding rows; None adds no column."""
    transforms: Callable[[Batch], Batch] | None
    """Applied to each batch."""
    pin_memory: bool
    """Copy tensors to pinned memory."""

    def __post_init__(self) -> None:
        if self.pin_memory and not torch.accelerator.is_available():
            raise ValueError(
                "ColumnDataset: pin_memory needs a GPU that torch can use, but there is none; omit pin_memory"
            )
        if self.mask in self.converters:
            raise ValueError(
                f"ColumnDataset: uneven='pad' adds a column {self.mask!r}, but a column of that name is read; use "
                f"uneven='wrap', or rename the column"
            )

    def __call__(self, rows_and_count: tuple[Rows, int]) -> Batch:
        """Return a batch, given its rows and the number of rows before the padding.

        Raises:
            TypeError: The transforms do not return a batch.
        """
        rows, count = rows_and_count
        batch = rows.tensors(self.converters)
        if self.mask is not None:
            batch[self.mask] = torch.arange(rows.num_rows) < count
        if self.transforms is not None:
            batch = self.transforms(batch)
            if not isinstance(batch, dict):
                raise TypeError(f"ColumnDataset: transforms must return a batch, got {type(batch).__name__}")
        return {name: column.pin_memory() for name, column in batch.items()} if self.pin_memory else batch
