"""Saves rows of tables in the order of checkpoints, read from the records while they are written to files.

Letters: n rows of a member table.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import is_accelerator
from recis_hybrid.checkpointing import JSON, HostMemory, PartState, TableState
from recis_hybrid.embedding.checkpoint.ordered_records import OrderedRecords
from recis_hybrid.embedding.checkpoint.ownership import ALL, Buckets, BucketShares, OwnedTables, within
from recis_hybrid.embedding.checkpoint.state import (
    table_meta,
    table_state,
    tables_changes,
    tables_layout,
    tables_meta,
    tables_state,
    watch_tables,
)
from recis_hybrid.embedding.planner.coalesce import COUNTS
from recis_hybrid.embedding.table.blocks import in_one_block
from recis_hybrid.embedding.table.disk_blocks import DiskBlocks, DiskSnapshot, export_records
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.id_map import list_entries
from recis_hybrid.embedding.table.record_layout import META, RecordLayout

_CPU = torch.device("cpu")
_COPIERS = 2
_MANY_BYTES = 64 << 20


class SavedTables(OwnedTables):
    """The methods of an engine that ``Saver`` calls to save rows."""

    def checkpoint_state(self) -> PartState:
        """Return every member table's rows, as Saver writes them; together the ranks return each row once."""
        return tables_state(self.tables, self._shares)

    def checkpoint_layout(self) -> PartState:
        """Return :meth:`checkpoint_state` without its rows."""
        return tables_layout(self.tables)

    def checkpoint_snapshot(self, memory: HostMemory | None) -> Callable[[], PartState]:
        """Return a function that returns :meth:`checkpoint_state` with rows that are read while they are written.

        Args:
            memory: Holds a copy of every row, so that the function can be called in any thread. None copies nothing,
                and no row may change before the call.
        """
        if memory is None:
            return partial(_live_state, self.tables, self._shares)
        return _snapshot(self.tables, memory, self._shares)

    def watch_checkpoint_changes(self) -> object:
        """Return logs of changes from now on, filled as long as they live; see :meth:`HashTable.watch`."""
        return watch_tables(self.tables)

    def checkpoint_changes(self, since: object, whole: Collection[str] = ()) -> PartState | None:
        """Return :meth:`checkpoint_state` of the rows that changed; see :func:`tables_changes`."""
        return tables_changes(self.tables, since, whole, self._shares)


@dataclass(frozen=True)
class _Source:
    """The records of one logical table, live or copied, and the slots that map ids to them."""

    table: HashTable
    header: Tensor
    """Header of the slots."""
    slots: int
    live: int
    handle: ops.blocks.Blocks | DiskSnapshot
    memory: tuple[Tensor, ...]
    """Memory that ``handle`` and ``header`` point into, kept alive with them."""
    device: torch.device
    """Device whose kernels read the records."""
    counts: tuple[dict[str, Tensor], ...]
    """State of admission for each member table; empty without admission."""
    buckets: tuple[Buckets, ...]
    """For each member table, the buckets whose rows are saved."""


def _live_state(tables: Sequence[HashTable], shares: BucketShares | None) -> PartState:
    """Return the rows of every member table, read later from the live records, which must not change meanwhile.

    Args:
        tables: This rank's tables.
        shares: Buckets that this rank saves, if there are several ranks.
    """
    for table in tables:
        table.record_lookup()
        table.catch_up()
    sources = [
        _Source(
            table,
            table.store.id_map.slots.header,
            len(table.store.id_map.slots),
            len(table),
            *_live_records(table),
            table.device,
            _counts(table),
            _saved_buckets(table, shares, place),
        )
        for place, table in _unsplit(tables, shares)
    ]
    return _state(sources, _split(tables, shares), tables_meta(tables))


def _live_records(table: HashTable) -> tuple[ops.blocks.Blocks | DiskSnapshot, tuple[Tensor, ...]]:
    blocks = table.store.blocks
    if isinstance(blocks, DiskBlocks):
        return blocks.snapshot(), tuple(table.store.id_map.slots.memory)
    return blocks.whole(), (*blocks.blocks, *table.store.id_map.slots.memory)


def _snapshot(tables: Sequence[HashTable], memory: HostMemory, shares: BucketShares | None) -> Callable[[], PartState]:
    """Copy slots, and records that are not on disk, into host memory, unsorted.

    Args:
        tables: This rank's tables.
        memory: Host memory for the copies.
        shares: Buckets that this rank saves, if there are several ranks.

    Returns:
        A function that sorts the copied rows, which may take long, and returns them as :func:`_live_state` does.
    """
    sources = [
        _copied(table, memory, _saved_buckets(table, shares, place)) for place, table in _unsplit(tables, shares)
    ]
    split = _split(tables, shares)
    meta = tables_meta(tables)
    for table in tables:
        if is_accelerator(table.device):
            torch.accelerator.synchronize(table.device)  # the copies are asynchronous
    return lambda: _state(sources, split, meta)


def _unsplit(tables: Sequence[HashTable], shares: BucketShares | None) -> list[tuple[int, HashTable]]:
    """Return the tables whose rows are whole on this rank, with their places."""
    return [(place, table) for place, table in enumerate(tables) if shares is None or not shares.splits(place)]


def _split(tables: Sequence[HashTable], shares: BucketShares | None) -> dict[str, TableState]:
    """Return, in host memory, the rows of tables that are split by column."""
    states: dict[str, TableState] = {}
    for place, table in enumerate(tables):
        if shares is not None and shares.splits(place):
            for name, state in table_state(place, table, shares).items():
                columns = {column: values.cpu() for column, values in state.columns.items()}
                states[name] = TableState(columns, state.buckets.cpu(), state.meta)
    return states


def _saved_buckets(table: HashTable, shares: BucketShares | None, place: int) -> tuple[Buckets, ...]:
    return tuple(ALL if shares is None else shares.saved(place, member) for member in range(len(table.members)))


def _copied(table: HashTable, memory: HostMemory, buckets: tuple[Buckets, ...]) -> _Source:
    table.record_lookup()
    table.catch_up()
    layout, blocks, used = table.layout, table.store.blocks, table.store.id_map.row_bound
    slots = table.store.id_map.slots
    parts = [part.view(-1).view(torch.uint8) for part in slots.memory]
    pinned = is_accelerator(table.device)
    words = tuple(memory.take(part.numel(), pinned=pinned) for part in parts)
    copied = list(zip(words, parts, strict=True))
    header = slots.entries_in(words)
    if isinstance(blocks, DiskBlocks):
        _copy(copied)
        snapshot = blocks.snapshot()
        return _Source(table, header, len(slots), len(table), snapshot, words, _CPU, _counts(table), buckets)
    handle = blocks.whole()

    pairs: list[tuple[Tensor, Tensor]] = []
    for number, block in enumerate(blocks.blocks):
        rows = min(max(used - number * blocks.block_rows, 0), blocks.block_rows)
        # Memory for the whole block, so that the next save can reuse it.
        target = memory.take(blocks.block_rows * layout.record_bytes, pinned=pinned)
        bytes_used = rows * layout.record_bytes
        pairs.append((target[:bytes_used], block.view(-1)[:bytes_used]))
    addresses = torch.tensor([target.data_ptr() for target, _ in pairs], dtype=torch.int64)
    handle = ops.blocks.Blocks(addresses, *handle[1:])
    if blocks.pinned:
        torch.accelerator.synchronize(table.device)  # the CPU reads what queued kernels still write
    _copy([*pairs, *copied])
    copies = (*(target for target, _ in pairs), *words)
    return _Source(table, header, len(slots), len(table), handle, copies, _CPU, _counts(table), buckets)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first; from a GPU asynchronously."""
    if is_accelerator(pairs[0][1]) or sum(target.numel() for target, _ in pairs) < _MANY_BYTES:
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        return
    # The caller waits: one thread alone does not use the whole memory bandwidth.
    with ThreadPoolExecutor(_COPIERS) as pool:
        list(pool.map(lambda pair: pair[0].copy_(pair[1]), pairs))


def _counts(table: HashTable) -> tuple[dict[str, Tensor], ...]:
    return tuple(table.admission_states())


def _state(sources: Sequence[_Source], split: dict[str, TableState], meta: dict[str, JSON]) -> PartState:
    states, piece = dict(split), _Piece()
    for source in sources:
        table, layout = source.table, source.table.layout
        entries = list_entries(source.header, source.slots, source.live)
        ids, members, rows = entries.ids.cpu(), entries.members.cpu(), entries.rows.cpu()
        counts = members.bincount(minlength=len(table.members)).tolist()
        ordered = ops.id_map.file_order(ids, members, rows, len(table.members))
        parts = zip(*(values.split(counts) for values in ordered), strict=True)
        for number, (member, (own_ids, own_rows, own_buckets)) in enumerate(zip(table.members, parts, strict=True)):
            first, last = torch.searchsorted(own_buckets, torch.tensor(source.buckets[number])).tolist()
            own_ids, own_rows, own_buckets = own_ids[first:last], own_rows[first:last], own_buckets[first:last]
            columns = {"ids": own_ids, **_no_rows(layout)}
            reader: _RecordReader | _DiskReader = _RecordReader(source, own_rows.to(source.device))
            if isinstance(source.handle, DiskSnapshot):
                reader = _DiskReader(source.handle, layout, own_rows, piece)
            states[member.name] = TableState(columns, own_buckets, table_meta(layout), reader=reader)
            if source.counts:
                known = {name: values.cpu() for name, values in source.counts[number].items()}
                buckets = ops.id_map.bucket_of(known["ids"].contiguous())
                known = within(buckets, source.buckets[number], {**known, "buckets": buckets})
                states[member.name + COUNTS] = TableState(known, known.pop("buckets"), {})
    return PartState(tables=states, meta=meta, owned=True)


def _no_rows(layout: RecordLayout) -> dict[str, Tensor]:
    parts = {part: torch.empty(0, layout.width(part), dtype=layout.part_dtype(part)) for part in layout.parts}
    return {**parts, **{name: torch.empty(0, dtype=torch.int64) for name in META}}


class _RecordReader:
    """Reads records in memory, of rows (int64 ``[n]``, in the order of the files)."""

    def __init__(self, source: _Source, rows: Tensor) -> None:
        self._source = source
        self._rows = rows

    def read(self, first: int, stop: int, out: Mapping[str, Tensor]) -> None:
        """Write rows ``first`` to ``stop`` of some columns into ``out``."""
        handle = self._source.handle
        assert isinstance(handle, ops.blocks.Blocks)
        _export(handle, self._rows[first:stop], layout=self._source.table.layout, out=out)


class _Piece:
    """The piece of ordered records that was read last; one for all tables in turn, so that memory is bounded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while records are read or copied."""
        self.owner: object = None
        self.number = 0
        self.records: Tensor | None = None
        """uint8 ``[m, record_bytes]``: piece ``number`` of the owner."""


class _DiskReader:
    """Reads records on disk, of rows (int64 ``[n]``, in the order of the files).

    Args:
        snapshot: The records.
        layout: Memory layout of a record.
        rows: The rows.
        piece: Shared by the readers of all tables.
    """

    def __init__(self, snapshot: DiskSnapshot, layout: RecordLayout, rows: Tensor, piece: _Piece) -> None:
        self._ordered, self._layout, self._piece = OrderedRecords(snapshot, rows), layout, piece
        self._left = rows.numel()

    def read(self, first: int, stop: int, out: Mapping[str, Tensor]) -> None:
        """Write rows ``first`` to ``stop`` of some columns into ``out``."""
        step = self._ordered.piece_rows
        with self._piece.lock:
            for number in range(first // step, -(-stop // step)):
                begin, end = max(first, number * step), min(stop, (number + 1) * step)
                records = self._records(number)[begin - number * step : end - number * step]
                some = {name: values[begin - first : end - first] for name, values in out.items()}
                _export(*in_one_block(self._layout, records), layout=self._layout, out=some)
                del records  # before others are read into its memory
            self._left -= stop - first
            if self._left <= 0:
                self._ordered.close()

    def _records(self, number: int) -> Tensor:
        piece = self._piece
        if piece.records is None or piece.owner is not self or piece.number != number:
            piece.owner = piece.records = None  # frees the memory first
            piece.records = self._ordered.read(number)
            piece.owner, piece.number = self, number
        return piece.records


def _export(handle: ops.blocks.Blocks, rows: Tensor, *, layout: RecordLayout, out: Mapping[str, Tensor]) -> None:
    """Copy some columns of the records of rows (int64 ``[n]``) into ``out``, on the CPU."""
    if rows.is_cpu and {*layout.parts, *META} <= out.keys():
        export_records(layout, handle, rows, out)
        return
    for part in layout.parts:
        if part in out:
            values = out[part] if rows.is_cpu else torch.empty_like(out[part], device=rows.device)
            ops.blocks.read(handle, rows, layout.offset(part), values)
            if not rows.is_cpu:
                out[part].copy_(values)
    if META[0] in out:
        for name, values in zip(META, ops.blocks.read_meta(handle, rows), strict=True):
            out[name].copy_(values)
