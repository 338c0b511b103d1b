"""Puts what changed in a table over what it was.

Legend: n rows of the earlier state, m rows that changed, r ids that went, k rows of the later state. All of them are
sorted by (bucket, id).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.checkpointing import TableState

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def combined(changes: list[TableState]) -> TableState:
    """Put successive changes together, so that the rows that they are put over, which are most, move once.

    Args:
        changes: At least one; what changed since the state before, ``removed`` not None; of equal columns.

    Returns:
        What changed in all. Tensors of the first may have been overwritten.
    """
    total = changes[0]
    for later in changes[1:]:
        assert total.removed is not None
        assert later.removed is not None
        gone = _put_over(total.removed, later.removed, later)
        total = replace(_put_over(total, later, later.removed), removed=gone)
    return total


def between(change: TableState, first: int, stop: int) -> TableState:
    """Return what changed in the buckets from ``first`` to ``stop`` - 1, as views."""
    begin, end = torch.searchsorted(change.buckets, torch.tensor([first, stop])).tolist()
    columns = {name: column[begin:end] for name, column in change.columns.items()}
    removed = None if change.removed is None else between(change.removed, first, stop)
    return TableState(columns, change.buckets[begin:end], change.meta, removed=removed)


def put_over(table: TableState, change: TableState) -> TableState:
    """Put what changed over a table, or over the rows of some of its buckets, where ``change`` is of the same buckets.

    Args:
        table: The rows [n] before; its tensors may be overwritten.
        change: The rows [m] that changed, and the ids [r] that went.

    Returns:
        The rows [k] after.
    """
    assert change.removed is not None
    return _put_over(table, change, change.removed)


def _put_over(table: TableState, rows: TableState, gone: TableState) -> TableState:
    """Give ``table`` the rows of ``rows``, in place of its own of the same ids, and take away the ids of ``gone``."""
    n = table.buckets.numel()
    if n == 0:
        return replace(table, columns=rows.columns, buckets=rows.buckets)
    at, there = _find(table, rows)
    leaving, leaves = _find(table, gone)
    for name, column in table.columns.items():
        _words(column)[at[there]] = _words(rows.columns[name])[there]
    fresh = (~there).nonzero().view(-1)
    if fresh.numel() == 0 and not bool(leaves.any()):
        return table
    stays = np.ones(n + fresh.numel(), dtype=bool)
    stays[leaving[leaves].numpy()] = False
    # Where each row of the result comes from: a row of the table, or n + the number of a fresh one.
    source = np.insert(np.arange(n), at[fresh].numpy(), np.arange(n, n + fresh.numel()))
    chosen = torch.from_numpy(source[stays[source]])
    new = (chosen >= n).nonzero().view(-1)
    picked = fresh[chosen[new] - n]
    chosen[new] = 0

    def joined(column: Tensor, of_rows: Tensor) -> Tensor:
        result = _words(column).index_select(0, chosen)
        result[new] = _words(of_rows)[picked]
        return result.view(column.dtype)

    # One column at a time, the old one given up at once: memory for one more of them is needed.
    columns = dict(table.columns)
    for name in columns:
        columns[name] = joined(columns[name], rows.columns[name])
    return replace(table, columns=columns, buckets=joined(table.buckets, rows.buckets))


def _find(table: TableState, wanted: TableState) -> tuple[Tensor, Tensor]:
    """Return the position of each wanted row ``[m]`` in a table, or of its insertion; and a mask of rows present."""
    ids, buckets = table.columns["ids"], table.buckets
    low = torch.searchsorted(buckets, wanted.buckets)
    high = end = torch.searchsorted(buckets, wanted.buckets, right=True)
    last = ids.numel() - 1
    while bool((low < high).any()):
        middle = (low + high) // 2
        below = ids[middle.clamp(max=last)] < wanted.columns["ids"]
        open_ = low < high
        low, high = torch.where(open_ & below, middle + 1, low), torch.where(open_ & ~below, middle, high)
    return low, (low < end) & (ids[low.clamp(max=last)] == wanted.columns["ids"])


def _words(column: Tensor) -> Tensor:
    """Return the same memory as integers, which torch can pick and put whatever the dtype is."""
    return column.view(_WORDS[column.element_size()])
