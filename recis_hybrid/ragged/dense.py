"""Conversions of RaggedTensors of one level to and from padded and nested tensors."""

from __future__ import annotations

from typing import Any

import torch

from recis_hybrid.accelerator import is_accelerator
from recis_hybrid.ragged.checks import Parts, describe, one_level


def positions(offsets: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row of each of ``count`` values and its place in the row, int64 ``[count]`` each."""
    lengths = offsets[1:] - offsets[:-1]
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths, output_size=count)
    return rows, torch.arange(count, device=offsets.device) - offsets[:-1][rows]


def to_padded(
    values: torch.Tensor,
    offsets: torch.Tensor,
    outer: tuple[torch.Tensor, ...],
    length: int | None,
    padding: float,
    side: str,
) -> torch.Tensor:
    """Return the dense tensor of :meth:`RaggedTensor.to_padded`."""
    one_level("RaggedTensor.to_padded", outer)
    if side not in ("left", "right"):
        raise ValueError(f"RaggedTensor.to_padded: side must be 'left' or 'right', got {side!r}")
    lengths = offsets[1:] - offsets[:-1]
    if is_accelerator(values) and length is not None:
        return _padded(values, offsets, lengths, length, padding, side)
    longest = int(lengths.max()) if len(lengths) else 0
    if is_accelerator(values):
        return _padded(values, offsets, lengths, longest, padding, side)
    if length is None:
        length = longest
    if longest > length:
        raise ValueError(
            f"RaggedTensor.to_padded: length must be at least {longest}, the length of the longest row, got {length}; "
            f"shorten the rows first (features.Truncate)"
        )
    padded = values.new_full((len(lengths), length, *values.shape[1:]), padding)
    values = values[: int(offsets[-1])]  # operations on a GPU may leave unused values at the end
    rows, places = positions(offsets, values.shape[0])
    if side == "left":
        places = places + (length - lengths)[rows]
    padded[rows, places] = values
    return padded


def _padded(
    values: torch.Tensor, offsets: torch.Tensor, lengths: torch.Tensor, length: int, padding: float, side: str
) -> torch.Tensor:
    """Return the dense tensor without waiting for a GPU; longer rows are cut."""
    rows, count = len(lengths), values.shape[0]
    # An additional row takes the values that belong to no row, and those of long rows that are cut.
    padded = values.new_full((rows * length + 1, *values.shape[1:]), padding)
    if rows:
        numbers = torch.arange(count, device=values.device)
        row = torch.searchsorted(offsets[1:], numbers, right=True)
        in_use = row < rows
        row = row.clamp(max=rows - 1)
        places = numbers - offsets[:-1][row]
        if side == "left":
            places = places + (length - lengths)[row]
        in_use = in_use & (places >= 0) & (places < length)
        padded[torch.where(in_use, row * length + places, rows * length)] = values
    return padded[:-1].view(rows, length, *values.shape[1:])


def from_padded(padded: torch.Tensor, lengths: torch.Tensor | None, padding: float | None) -> Parts:
    """Return the parts of :meth:`RaggedTensor.from_padded`."""
    if padded.dim() < 2:
        raise ValueError(f"RaggedTensor.from_padded: padded must be [B, L, ...], got {describe(padded)}")
    if (lengths is None) == (padding is None):
        raise ValueError("RaggedTensor.from_padded: give either lengths or padding")
    rows, width = padded.shape[:2]
    places = torch.arange(width, device=padded.device)
    if lengths is None:
        assert padding is not None
        counts = torch.ne(padded, padding)
        if padded.dim() > 2:
            counts = counts.flatten(2).any(2)
        lengths = ((places + 1) * counts).amax(1) if width else torch.zeros(rows, dtype=torch.int64)
    lengths = lengths.to(device=padded.device, dtype=torch.int64)
    if lengths.shape != (rows,) or (rows and not (0 <= int(lengths.min()) and int(lengths.max()) <= width)):
        raise ValueError(
            f"RaggedTensor.from_padded: lengths must be [B] from 0 to {width}, got {describe(lengths)} from "
            f"{int(lengths.min()) if lengths.numel() else 0} to {int(lengths.max()) if lengths.numel() else 0}"
        )
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=padded.device)
    offsets[1:] = lengths.cumsum(0)
    return padded[places < lengths[:, None]], offsets, None, ()


def to_nested(
    values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, outer: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return the nested tensor of :meth:`RaggedTensor.to_nested`."""
    one_level("RaggedTensor.to_nested", outer)
    if weights is not None:
        raise ValueError("RaggedTensor.to_nested: a nested tensor cannot hold weights; convert them to a separate one")
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def from_nested(nested: torch.Tensor) -> Parts:
    """Return the parts of :meth:`RaggedTensor.from_nested`."""
    if not nested.is_nested or nested.layout != torch.jagged:
        raise TypeError(
            "RaggedTensor.from_nested: the tensor must be nested in the jagged layout; make one with "
            "torch.nested.as_nested_tensor(..., layout=torch.jagged)"
        )
    jagged: Any = nested  # torch's type stubs lack its methods
    offsets, lengths = jagged.offsets().to(torch.int64), jagged.lengths()
    values = nested.values()
    if lengths is None:
        return values, offsets, None, ()
    # There are gaps between rows: copy the values that rows use.
    packed = torch.zeros_like(offsets)
    packed[1:] = lengths.cumsum(0)
    rows, places = positions(packed, int(packed[-1]))
    return values[offsets[:-1][rows] + places], packed, None, ()
