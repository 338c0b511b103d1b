"""Towers run on the distinct rows of a batch, for inputs that repeat, such as the titles of popular items.

Letters: B rows of a batch, U distinct rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.validation import describe_value

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers with the bits of floats, by size in bytes."""


def on_distinct_rows(tower: Callable[..., Tensor], *inputs: Tensor | RaggedTensor | None) -> Tensor:
    """Return a tower's output for each row, computed once for equal rows.

    The gradients of equal rows are added before they reach the tower. In train mode, equal rows also have the same
    dropout. The number of distinct rows depends on the batch, and on a GPU the host waits for it.

    Args:
        tower: A function whose result for a row depends on that row only, not on the other rows.
        *inputs: Its inputs: tensors ``[B, ...]`` of any dtype, RaggedTensors of one level with B rows, or None. Rows
            are equal if they are bitwise equal in all inputs.

    Returns:
        ``[B, ...]``: for each row, the row ``[U, ...]`` of the tower's output for the distinct rows.

    Raises:
        TypeError: If an input requires a gradient, or inputs or the output have another type.
        ValueError: If inputs or the output have different numbers of rows, or there is no input.

    Example:
        >>> tower = torch.nn.Embedding(9, 2)
        >>> shapes = []
        >>> handle = tower.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
        >>> on_distinct_rows(tower, torch.tensor([[7, 8], [7, 8], [1, 2]])).shape, shapes
        (torch.Size([3, 2, 2]), [torch.Size([2, 2, 2])])
    """
    given = [each for each in inputs if each is not None]
    if not given:
        raise ValueError("on_distinct_rows: there must be at least one input, got none")
    for each in given:
        _check(each, given[0])
    rows = len(given[0])
    if rows == 0:
        return _checked(tower(*inputs), rows)
    words = torch.cat([_words(each) for each in given], 1)
    _, place = torch.unique(words, dim=0, return_inverse=True)
    numbers = torch.arange(rows, device=words.device)
    first = torch.full_like(numbers, rows).scatter_reduce_(0, place, numbers, "amin")
    # The distinct rows in the order of their first occurrence, so that a batch without repeats stays as it is.
    first = first[first < rows].sort().values
    if len(first) == rows:
        return _checked(tower(*inputs), rows)
    order = torch.empty_like(first).scatter_(0, place[first], torch.arange(len(first), device=first.device))
    output = _checked(tower(*[None if each is None else each[first] for each in inputs]), len(first))
    return output[order[place]]


def _check(value: Any, first: Tensor | RaggedTensor) -> None:
    if not isinstance(value, Tensor | RaggedTensor) or (isinstance(value, Tensor) and value.dim() == 0):
        raise TypeError(
            f"on_distinct_rows: inputs must be tensors [B, ...] or RaggedTensors, got {describe_value(value)}"
        )
    if len(value) != len(first):
        raise ValueError(f"on_distinct_rows: inputs must have equally many rows, got {len(first)} and {len(value)}")
    values = value.values if isinstance(value, RaggedTensor) else value
    if values.is_complex():
        raise TypeError("on_distinct_rows: inputs must be real, got complex numbers; pass their parts as two inputs")
    if values.requires_grad:
        raise TypeError(
            "on_distinct_rows: inputs must not require gradients, which would reach one of several equal rows only; "
            "call the tower itself"
        )


def _words(rows: Tensor | RaggedTensor) -> Tensor:
    """Return the bits of each row, int64 ``[B, n]``, padded to equal lengths."""
    if isinstance(rows, RaggedTensor):
        if rows.outer or rows.weights is not None:
            raise TypeError(f"on_distinct_rows: rows must hold values without weights, got {rows!r}")
        lengths = rows.lengths()
        return torch.cat([lengths[:, None], _words(rows.to_padded())], 1)
    flat = rows.reshape(len(rows), rows[0].numel())
    if flat.is_floating_point():
        flat = flat.contiguous().view(_BITS[flat.element_size()])
    # A column of zeros, because torch.unique takes no rows without elements.
    return flat.to(torch.int64) if flat.shape[1] else torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)


def _checked(output: Any, rows: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"on_distinct_rows: the tower must return a tensor, got {describe_value(output)}")
    if output.dim() == 0 or len(output) != rows:
        raise ValueError(f"on_distinct_rows: the tower must return a row for each of {rows}, got {list(output.shape)}")
    return output
