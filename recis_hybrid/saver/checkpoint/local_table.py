"""This rank's rows of a table, checked and sorted by (bucket, id), as in files.

Legend: n rows of this rank, K buckets with rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, JSON, RowReader, TableState
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.json_values import checked_object
from recis_hybrid.saver.format.manifest import TensorSpec
from recis_hybrid.saver.format.row_file import INDEX, in_order
from recis_hybrid.saver.format.tensor_file import check_tensor

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


@dataclass(frozen=True)
class LocalTable:
    """This rank's rows of a table."""

    name: str
    specs: dict[str, TensorSpec]
    """Dtype and shape of one row, by column; "ids" first."""
    meta: dict[str, JSON]
    ids: Tensor
    """int64 ``[n]``, sorted."""
    present: Tensor
    """int64 ``[K]``, ascending: buckets with rows."""
    offsets: Tensor
    """int64 ``[K + 1]``: rows ``offsets[k]`` to ``offsets[k + 1]`` belong to ``present[k]``."""
    reader: RowReader
    """Reads the other columns."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all columns."""
        return sum(math.prod(spec.shape) * spec.itemsize for spec in self.specs.values())

    def cuts(self, count: int) -> tuple[list[int], list[int]]:
        """Return the bounds of ``count`` equal ranges of buckets, in rows and in buckets with rows."""
        edges = torch.arange(0, BUCKETS + 1, BUCKETS // count)
        places = torch.searchsorted(self.present, edges)
        return self.offsets[places].tolist(), places.tolist()

    def read(self, first: int, stop: int, out: Mapping[str, Tensor]) -> None:
        """Write rows ``first`` to ``stop`` of all columns into ``out``."""
        out["ids"].copy_(self.ids[first:stop])
        others = {name: out[name] for name in self.specs if name != "ids"}
        if stop > first and others:
            self.reader.read(first, stop, others)


def local_table(where: str, name: str, state: TableState) -> LocalTable:
    """Check a table's rows and sort them.

    Args:
        where: Part and table, for messages.
        name: Name of the table.
        state: The rows.

    Returns:
        The sorted rows; columns are not copied.

    Raises:
        CheckpointError: The state breaks the rules of ``TableState``, or has an id twice.
    """
    _check(where, state)
    if state.buckets.numel():
        least, most = (int(bucket) for bucket in state.buckets.aminmax())
        if not 0 <= least <= most < BUCKETS:
            raise CheckpointError(
                f"{where}: buckets must be from 0 to {BUCKETS - 1}, got {least} to {most}. Return the bucket of each "
                "id."
            )
    specs = {column: TensorSpec.of(tensor, skip=1) for column, tensor in state.columns.items()}
    meta = checked_object(f"{where}, meta", state.meta)
    ids, buckets, reader = state.columns["ids"].detach().cpu(), state.buckets.cpu(), state.reader
    ordered = in_order(ids, buckets)
    # Strictly ascending rows have distinct ids, because an id has only one bucket.
    if reader is None or not ordered:
        _refuse_duplicates(where, ids)
    if reader is None:
        order = None
        if not ordered:
            by_id = ids.argsort()
            buckets, by_bucket = buckets[by_id].sort(stable=True)
            order = by_id[by_bucket]
            ids = ids[order]
        reader = _Columns(state.columns, order)
    elif not ordered:
        raise CheckpointError(f"{where}: rows must be sorted by (bucket, id) if they have a reader. Sort them.")
    present, sizes = torch.unique_consecutive(buckets, return_counts=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return LocalTable(name, specs, meta, ids, present, offsets, reader)


class _Columns:
    """Reads rows of columns in memory."""

    def __init__(self, columns: Mapping[str, Tensor], order: Tensor | None) -> None:
        self._columns = columns
        self._order = order

    def read(self, first: int, stop: int, out: Mapping[str, Tensor]) -> None:
        for name, target in out.items():
            column = self._columns[name].detach()
            if self._order is None:
                target.copy_(column[first:stop])
                continue
            signed = _SIGNED.get(column.dtype, column.dtype)  # torch cannot index unsigned integers
            chosen = self._order[first:stop].to(column.device)
            target.copy_(column.view(signed).index_select(0, chosen).view(column.dtype))


def _refuse_duplicates(where: str, ids: Tensor) -> None:
    # numpy's sort is vectorized.
    ascending = torch.from_numpy(np.sort(ids.numpy()))
    duplicate = ascending[1:] == ascending[:-1]
    if bool(duplicate.any()):
        example = int(ascending[1:][duplicate][0])
        raise CheckpointError(f"{where}: an id must have one row, {example} has more. Return each id once.")


def _check(where: str, state: TableState) -> None:
    names = list(state.columns)
    if names[:1] != ["ids"]:
        raise CheckpointError(f"{where}: the first column must be 'ids', got the columns {names}. Put 'ids' first.")
    for column, tensor in state.columns.items():
        check_tensor(where, column, tensor)
    ids = state.columns["ids"]
    rows = ids.shape[0] if ids.dim() == 1 else -1
    for tensor_name, tensor in (("ids", ids), ("buckets", state.buckets)):
        if tensor.dtype != torch.int64 or tuple(tensor.shape) != (rows,):
            raise CheckpointError(
                f"{where}: {tensor_name} must be int64 [n], one per row, got {TensorSpec.of(tensor)} with ids "
                f"{TensorSpec.of(ids)}. Return one per row."
            )
    for column, tensor in state.columns.items():
        if column in INDEX:
            raise CheckpointError(f"{where}: a column must not be named {column!r}, which files use. Rename it.")
        expected = 0 if state.reader is not None and column != "ids" else rows
        if tensor.dim() == 0 or tensor.shape[0] != expected:
            raise CheckpointError(
                f"{where}: column {column!r} must have {expected} rows as 'ids' has, got {TensorSpec.of(tensor)}. "
                "Return one per row."
            )
