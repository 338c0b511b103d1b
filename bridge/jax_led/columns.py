"""Dense columns of a batch as arrays: labels, inputs of towers, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from recis_hybrid.bridge.exchange.dlpack import ALIGNMENT, WIDE, to_jax, to_torch, x64_is_on
from recis_hybrid.validation import describe_value


def dense_column(batch: Mapping[str, Any], name: str, what: str = "input") -> torch.Tensor:
    """Return a column as a tensor, in shared memory where possible.

    Args:
        batch: Columns by name: tensors, arrays of numpy or JAX, or lists of numbers.
        name: Name of the column.
        what: Purpose of the column, for messages.

    Raises:
        KeyError: if the batch has no such column.
        TypeError: if it holds lists or no numbers.
    """
    if name not in batch:
        raise KeyError(f"the {what} column {name!r} must be a column of the batch, which has {sorted(batch)}")
    column = batch[name]
    if isinstance(column, torch.Tensor):
        return column
    if isinstance(column, jax.Array):
        return to_torch(column)
    if isinstance(column, np.ndarray | list | tuple):
        array = np.ascontiguousarray(column)
        if array.dtype.kind in "biuf":
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        raise TypeError(f"the {what} column {name!r} must hold numbers, got {array.dtype}")
    raise TypeError(
        f"the {what} column {name!r} must be a dense column of numbers, got {describe_value(column)}; read it as "
        "Dense(), or convert lists to numbers in a transform"
    )


def row_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the column ``mask``, bool ``[B]``, which is False for padding rows; None if all rows count.

    A column ``mask`` of another dtype, or with several values per row, is a feature.
    """
    mask = batch.get("mask")
    if not isinstance(mask, torch.Tensor) or mask.dtype is not torch.bool:
        return None
    return mask.reshape(len(mask)) if mask.numel() == len(mask) else None


def as_array(where: str, column: torch.Tensor) -> jax.Array:
    """Return a column as an array, shared if it is aligned and otherwise copied.

    While x64 is off, float64 becomes float32, and 64-bit integers become int32 if they fit.

    Args:
        where: Prefix of error messages.
        column: A tensor of any shape.

    Raises:
        ValueError: if an integer does not fit.
    """
    if column.dtype in WIDE and not x64_is_on():
        if column.dtype in (torch.int64, torch.uint64):
            signed = column.view(torch.int64)
            if column.numel() and not _fit(signed):
                raise ValueError(
                    f"{where}: integers must fit int32 while x64 is off, got {int(signed.min())} to "
                    f"{int(signed.max())}; ids belong to features of the tables; bucketize other numbers, or set "
                    "jax_enable_x64"
                )
            column = signed.to(torch.int32)
        else:
            column = column.to(torch.float32)
    aligned = column.is_contiguous() and column.data_ptr() % ALIGNMENT == 0
    return to_jax(column.detach(), copy=not aligned)


def _fit(integers: torch.Tensor) -> bool:
    low, high = torch.aminmax(integers)
    return bool(low >= -(2**31)) and bool(high < 2**31)
