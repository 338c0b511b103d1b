"""Writes and reads the rows of a table, sorted by (bucket, id) and cut at fixed buckets.

Legend: n rows of the table, R ranges, m rows of one range, K buckets of a range that have rows.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.files import encode_name, seal_file, sync_directory
from recis_hybrid.saver.json_values import checked_object
from recis_hybrid.saver.manifest import FileEntry, RangeEntry, TableEntry, TensorSpec
from recis_hybrid.saver.protocol import BUCKETS, JSON, TableState
from recis_hybrid.saver.tensors import TensorFile, check_tensor, open_tensors, write_tensors

RANGE_BYTES = 64 * 2**20
MOST_RANGES = 1024
_INDEX = ("buckets", "bucket_offsets")
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def range_count(rows: int, row_bytes: int) -> int:
    """The number of files of a table: a function of the table alone, whatever the world size.

    It is the least power of two that leaves at most 64 MiB of columns to a file on average, and at most 1024.

    Args:
        rows: rows of the whole table.
        row_bytes: bytes of one row in all columns.

    Returns:
        A power of two; each file takes 65536 / that many buckets.

    Example:
        >>> range_count(1000, 776), range_count(5_000_000, 776)
        (1, 64)
    """
    count = 1
    while count < MOST_RANGES and rows * row_bytes > count * RANGE_BYTES:
        count *= 2
    return count


def write_table(root: Path, part: str, name: str, state: TableState, above: str = "sparse") -> TableEntry:
    """Write a table below `sparse/` and force it to the disk; what it says of ids that went is not looked at.

    At any time one range of the rows is held a second time, besides the order of the rows, 16 bytes each; rows that are
    handed out in order, by (bucket, id), are held once.

    Args:
        root: directory of the checkpoint.
        part: name of the part.
        name: name of the table.
        state: the rows.
        above: the folder below which it goes.

    Returns:
        What the manifest says of the table.

    Raises:
        CheckpointError: the state breaks the rules of `TableState`, holds an id twice, or cannot be written.
    """
    where = f"Saver.save: part {part!r}, table {name!r}"
    _check_state(where, state)
    specs = {column: TensorSpec.of(tensor, skip=1) for column, tensor in state.columns.items()}
    row_bytes = sum(math.prod(t.shape[1:]) * t.element_size() for t in state.columns.values())
    rows = state.columns["ids"].numel()
    count = range_count(rows, row_bytes)
    order, buckets = _sorted_order(where, state)
    cuts = torch.searchsorted(buckets, torch.arange(0, BUCKETS + 1, BUCKETS // count)).tolist()

    folder = f"{above}/{encode_name(part)}/{encode_name(name)}"
    (root / folder).mkdir(parents=True)
    ranges: list[RangeEntry] = []
    for i in range(count):
        first, last = i * BUCKETS // count, (i + 1) * BUCKETS // count - 1
        chosen = slice(cuts[i], cuts[i + 1]) if order is None else order[cuts[i] : cuts[i + 1]]
        tensors = {column: _rows(tensor, chosen) for column, tensor in state.columns.items()}
        present, sizes = torch.unique_consecutive(buckets[cuts[i] : cuts[i + 1]], return_counts=True)
        tensors["buckets"] = present.to(torch.int32)
        tensors["bucket_offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        relative = f"{folder}/{first:05d}-{last:05d}.safetensors"
        write_tensors(root / relative, tensors, _tag(part, name, first, last))
        del tensors
        ranges.append(RangeEntry(first, last, cuts[i + 1] - cuts[i], FileEntry(relative, *seal_file(root / relative))))
    sync_directory(root / folder)
    return TableEntry(rows, specs, checked_object(f"{where}, meta", state.meta), tuple(ranges))


def read_table(root: Path, part: str, name: str, entry: TableEntry) -> TableState:
    """Read a table whose files have been verified.

    Args:
        root: directory of the checkpoint.
        part: name of the part.
        name: name of the table.
        entry: what the manifest says of it.

    Returns:
        The rows, sorted by (bucket, id), in memory of their own.

    Raises:
        CorruptCheckpoint: a file does not hold what the manifest says, or its rows are not in order.
    """
    where = f"part {part!r}, table {name!r}"
    # Headers first: nothing of a size that only the manifest claims is allocated.
    for item in entry.ranges:
        with open_tensors(root / item.file.path, where) as file:
            _check_header(file, part, name, entry, item)
    columns = {
        column: torch.empty((entry.rows, *spec.shape), dtype=getattr(torch, spec.dtype))
        for column, spec in entry.columns.items()
    }
    buckets = torch.empty(entry.rows, dtype=torch.int64)
    start = 0
    for item in entry.ranges:
        stop = start + item.rows
        with open_tensors(root / item.file.path, where) as file:
            _read_buckets(file, root / item.file.path, where, item, buckets[start:stop])
            for column, tensor in columns.items():
                file.read_into(column, tensor[start:stop])
        _check_order(root / item.file.path, where, columns["ids"][start:stop], buckets[start:stop])
        start = stop
    return TableState(columns, buckets, entry.meta)


def _check_state(where: str, state: TableState) -> None:
    names = list(state.columns)
    if names[:1] != ["ids"]:
        raise CheckpointError(f"{where}: the first column must be 'ids', got the columns {names}. Put 'ids' first.")
    for column, tensor in state.columns.items():
        check_tensor(where, column, tensor)
    rows = state.columns["ids"].shape[0] if state.columns["ids"].dim() == 1 else -1
    for tensor_name, tensor in (("ids", state.columns["ids"]), ("buckets", state.buckets)):
        if tensor.dtype != torch.int64 or tuple(tensor.shape) != (rows,):
            raise CheckpointError(
                f"{where}: {tensor_name} must be int64 [n], one for each row, got {TensorSpec.of(tensor)} beside ids "
                f"{TensorSpec.of(state.columns['ids'])}. Hand out one per row."
            )
    for column, tensor in state.columns.items():
        if column in _INDEX:
            raise CheckpointError(f"{where}: a column must not be named {column!r}, files use it. Rename it.")
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            raise CheckpointError(
                f"{where}: column {column!r} must have {rows} rows as 'ids' has, got {TensorSpec.of(tensor)}. Hand out "
                "one per row."
            )
    if rows and not 0 <= int(state.buckets.min()) <= int(state.buckets.max()) < BUCKETS:
        raise CheckpointError(
            f"{where}: buckets must be from 0 to {BUCKETS - 1}, got {int(state.buckets.min())} to "
            f"{int(state.buckets.max())}. Hand out the bucket of each id."
        )


def _sorted_order(where: str, state: TableState) -> tuple[Tensor | None, Tensor]:
    """Rows [n] by (bucket, id), None where they lie so, and the bucket [n] of each."""
    ids, buckets = state.columns["ids"].cpu(), state.buckets.cpu()
    # numpy sorts plain numbers in vectors; where rows lie goes with them only if they are not in order.
    ascending = torch.from_numpy(np.sort(ids.numpy()))
    twice = ascending[1:] == ascending[:-1]
    if bool(twice.any()):
        example = int(ascending[1:][twice][0])
        raise CheckpointError(f"{where}: an id must have one row, {example} has more. Hand out each id once.")
    if _in_order(ids, buckets):
        return None, buckets
    by_id = ids.argsort()
    buckets, by_bucket = buckets[by_id].sort(stable=True)
    return by_id[by_bucket], buckets


def _in_order(ids: Tensor, buckets: Tensor) -> bool:
    """Whether rows ascend strictly by (bucket, id)."""
    above = buckets[1:] > buckets[:-1]
    return bool((above | ((buckets[1:] == buckets[:-1]) & (ids[1:] > ids[:-1]))).all())


def _rows(column: Tensor, chosen: Tensor | slice) -> Tensor:
    """Return the chosen [m] rows, copied where they are picked; unsigned words as signed ones, which torch can pick."""
    if isinstance(chosen, slice):
        return column.detach()[chosen].contiguous()
    signed = _SIGNED.get(column.dtype, column.dtype)
    return column.detach().view(signed).index_select(0, chosen.to(column.device)).view(column.dtype)


def _tag(part: str, name: str, first: int, last: int) -> dict[str, JSON]:
    return {"part": part, "table": name, "buckets": [first, last]}


def _check_header(file: TensorFile, part: str, name: str, entry: TableEntry, item: RangeEntry) -> None:
    present = file.shape("buckets")[:1] or (0,)
    specs = {column: TensorSpec(spec.dtype, (item.rows, *spec.shape)) for column, spec in entry.columns.items()}
    specs["buckets"] = TensorSpec("int32", present)
    specs["bucket_offsets"] = TensorSpec("int64", (present[0] + 1,))
    file.check(specs, _tag(part, name, item.first_bucket, item.last_bucket))


def _read_buckets(file: TensorFile, path: Path, where: str, item: RangeEntry, out: Tensor) -> None:
    """Expand the index of a range into the bucket of each of its rows, [m]."""
    present, offsets = file.read("buckets").long(), file.read("bucket_offsets")
    inside = not present.numel() or item.first_bucket <= int(present[0]) <= int(present[-1]) <= item.last_bucket
    ascending = bool((present[1:] > present[:-1]).all()) and bool((offsets[1:] > offsets[:-1]).all())
    if not inside or not ascending or int(offsets[0]) != 0 or int(offsets[-1]) != item.rows:
        raise CorruptCheckpoint(
            f"{path} ({where}): buckets must ascend from {item.first_bucket} to {item.last_bucket} at most, and "
            f"bucket_offsets from 0 to {item.rows}; they do not. {OTHER_STEP}"
        )
    out.copy_(present.repeat_interleave(offsets.diff()))


def _check_order(path: Path, where: str, ids: Tensor, buckets: Tensor) -> None:
    if not _in_order(ids, buckets):
        raise CorruptCheckpoint(f"{path} ({where}): rows must be sorted by (bucket, id), they are not. {OTHER_STEP}")
