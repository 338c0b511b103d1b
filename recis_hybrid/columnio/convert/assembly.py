"""What a reader's threads do with the rows of a batch: tensors, transforms, pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from recis_hybrid.ragged import Batch

if TYPE_CHECKING:
    from recis_hybrid.columnio.convert.convert import Converter
    from recis_hybrid.columnio.convert.row_slice import Rows


@dataclass(frozen=True)
class Delivery:
    """From the rows of a batch to what the consumer gets."""

    converters: Mapping[str, Converter]
    """How columns become tensors."""
    mask: str | None
    """The column that tells a batch's own rows from those that fill it up; None for no such column."""
    transforms: Callable[[Batch], Batch] | None
    """Called with each batch."""
    pin_memory: bool
    """Whether tensors are to lie in pinned memory."""

    def __call__(self, cut: tuple[Rows, int]) -> Batch:
        """Make a batch of its rows and the number of those that are its own.

        Raises:
            TypeError: The transforms return no batch.
        """
        rows, own = cut
        batch = rows.tensors(self.converters)
        if self.mask is not None:
            batch[self.mask] = torch.arange(rows.num_rows) < own
        if self.transforms is not None:
            batch = self.transforms(batch)
            if not isinstance(batch, dict):
                raise TypeError(f"ColumnDataset: transforms must return a batch, got {type(batch).__name__}")
        return {name: column.pin_memory() for name, column in batch.items()} if self.pin_memory else batch


def check_delivery(pin_memory: bool, columns: Mapping[str, object], mask: str | None) -> None:
    """Check that pinned memory can be had, and that the mask's name is free.

    Raises:
        ValueError: One is not so.
    """
    if pin_memory and not torch.cuda.is_available():
        raise ValueError("ColumnDataset: pin_memory needs a GPU that torch can use, and there is none; leave it out")
    if mask in columns:
        raise ValueError(f"ColumnDataset: uneven='pad' adds a column {mask!r}, which is the name of one that is read")
