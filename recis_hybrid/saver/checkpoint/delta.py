"""Applies changes to tables.

Legend: n rows of the earlier state, m changed rows, r removed ids, k rows of the later state. All of them are sorted by
(bucket, id).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.checkpointing import TableState

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def merge_changes(changes: list[TableState]) -> TableState:
    """Merge successive changes, so that the rows of the base, usually by far the most, move only once.

    Args:
        changes: Changes since the state before, at least one; ``removed`` is not None, and columns are equal.

    Returns:
        All changes. Tensors of the first may have been overwritten.
    """
    total = changes[0]
    for later in changes[1:]:
        assert total.removed is not None
        assert later.removed is not None
        removed_ids = _apply(total.removed, later.removed, later)
        total = replace(_apply(total, later, later.removed), removed=removed_ids)
    return total


def between(change: TableState, first: int, stop: int) -> TableState:
    """Return the changes in the buckets from ``first`` to ``stop`` - 1, as views."""
    begin, end = torch.searchsorted(change.buckets, torch.tensor([first, stop])).tolist()
    columns = {name: column[begin:end] for name, column in change.columns.items()}
    removed = None if change.removed is None else between(change.removed, first, stop)
    return TableState(columns, change.buckets[begin:end], change.meta, removed=removed)


def apply_changes(table: TableState, change: TableState) -> TableState:
    """Apply changes to a table, or to the rows of some buckets if ``change`` has the same buckets.

    Args:
        table: The rows [n] before; its tensors may be overwritten.
        change: The changed rows [m], and the removed ids [r].

    Returns:
        The rows [k] after.
    """
    assert change.removed is not None
    return _apply(table, change, change.removed)


def _apply(table: TableState, rows: TableState, removed_ids: TableState) -> TableState:
    """Replace or insert ``rows`` in ``table``, and remove the ids of ``removed_ids``."""
    n = table.buckets.numel()
    if n == 0:
        return replace(table, columns=rows.columns, buckets=rows.buckets)
    place, exists = _find(table, rows)
    removed_place, is_removed = _find(table, removed_ids)
    for name, column in table.columns.items():
        _words(column)[place[exists]] = _words(rows.columns[name])[exists]
    fresh = (~exists).nonzero().view(-1)
    if fresh.numel() == 0 and not bool(is_removed.any()):
        return table
    is_kept = np.ones(n + fresh.numel(), dtype=bool)
    is_kept[removed_place[is_removed].numpy()] = False
    # Source of each row of the result: a row of the table, or n + the number of a new one.
    source = np.insert(np.arange(n), place[fresh].numpy(), np.arange(n, n + fresh.numel()))
    chosen = torch.from_numpy(source[is_kept[source]])
    new = (chosen >= n).nonzero().view(-1)
    picked = fresh[chosen[new] - n]
    chosen[new] = 0

    def joined(column: Tensor, of_rows: Tensor) -> Tensor:
        result = _words(column).index_select(0, chosen)
        result[new] = _words(of_rows)[picked]
        return result.view(column.dtype)

    # One column at a time, freeing the old one, so that only one more column is in memory.
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
    """Return the same memory as integers, which torch can index whatever the dtype."""
    return column.view(_WORDS[column.element_size()])
