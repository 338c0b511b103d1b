"""RowStore: the rows of one table, found by id, inserted with first values, exported and compacted.

Letters: n ids, N positions (ids of a call over all features), R rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import BUCKETS
from recis_hybrid.embedding.eviction import (
    Capacity,
    EvictionRule,
    Rows,
    SharedRows,
    StepTimes,
    rules_by_member,
    unwanted_rows,
)
from recis_hybrid.embedding.gate import Admission, Gate, TableShare
from recis_hybrid.embedding.initializers import initializer_words, refuse_unrepresentable
from recis_hybrid.embedding.placement import Placement
from recis_hybrid.embedding.table.blocks import EmbeddingBlocks
from recis_hybrid.embedding.table.compaction import Compaction
from recis_hybrid.embedding.table.disk_blocks import DiskBlocks
from recis_hybrid.embedding.table.id_map import MAX_MEMBERS, Entries, IdMap
from recis_hybrid.embedding.table.lookup import Request, gradient_bags
from recis_hybrid.embedding.table.record_cache import refuse_small_cache
from recis_hybrid.embedding.table.record_layout import META, MemberTable, RecordLayout
from recis_hybrid.embedding.table.row_validation import checked_ids, checked_member, refuse_columns
from recis_hybrid.ops.gather import RowGroups

_SLICE_BYTES = 16 << 20
_SLOTS_PER_ROW = 16
"""Slots that can be copied in the time in which a compaction works on a row, 300 ns."""


class RowStore:
    """IDMap, EmbeddingBlocks and admission of one or more member tables, without lookups or gradients.

    :class:`HashTable` builds on it. Before metadata is read or rows are moved here, the table must have recorded its
    last lookup in the metadata.

    Args:
        members: The member tables; the number of a member table is its index here.
        layout: Memory layout of a record.
        device: Device of IDMap and blocks, if there is no ``placement``.
        seed: Seed of the rows' first values.
        placement: Devices of IDMap and blocks.
        admission: Rule for which ids get a row; None: all ids of training lookups.
        buckets: The first bucket whose ids are looked up here, and the one after the last.
    """

    def __init__(
        self,
        members: Sequence[MemberTable],
        layout: RecordLayout,
        device: torch.device,
        seed: int,
        *,
        placement: Placement | None = None,
        admission: Admission | None = None,
        buckets: tuple[int, int] = (0, BUCKETS),
    ) -> None:
        if not 0 < len(members) <= MAX_MEMBERS:
            raise ValueError(f"a hash table holds 1 to {MAX_MEMBERS} member tables, got {len(members)}")
        self.members = tuple(members)
        for member in self.members:
            refuse_unrepresentable(f"table {member.name!r}", member.initializer, layout.whole.dim, layout.dtype)
        self.layout = layout
        self.placement = placement or Placement.on(device)
        self.map_device = self.placement.map_device(device.index)
        self.device = self.placement.blocks_device(device.index)
        """Device whose kernels access the records."""
        self.admission, self.buckets = admission, buckets
        if self.placement.cache_bytes and not self.on_disk:
            refuse_small_cache(f"table {self.name}", self.placement.cache_bytes, layout.record_bytes)
        self.reseed(seed)
        self.reset()

    def __len__(self) -> int:
        """Return the number of rows in use; waits for the device."""
        return len(self.id_map)

    @property
    def name(self) -> str:
        """Names of the member tables, for messages."""
        return ", ".join(member.name for member in self.members)

    @property
    def on_disk(self) -> bool:
        """True if records are on disk, with a cache in memory."""
        return self.placement.blocks == "disk"

    def reseed(self, seed: int) -> None:
        """Set the seed of first values for rows inserted from now on."""
        self.seed = seed
        dim, first = self.layout.whole.dim, self.layout.first
        words = [initializer_words(m.initializer, dim, seed, m.name, first) for m in self.members]
        self.initializers = torch.tensor(words, dtype=torch.int64, device=self.device)

    def reset(self) -> None:
        """Remove all rows, and free their memory and the admission state."""
        self.id_map = IdMap(self.map_device)
        self.blocks = self._new_blocks()
        share = TableShare(self.map_device, tuple(member.name for member in self.members), self.buckets)
        self.gate = None if self.admission is None else self.admission.gate(share)
        self.compaction: Compaction | None = None
        """The compaction in progress, if there is one."""

    def _new_blocks(self) -> EmbeddingBlocks | DiskBlocks:
        pinned, cache_bytes = self.placement.blocks == "pinned", self.placement.cache_bytes
        if self.on_disk:
            assert self.placement.path is not None
            return DiskBlocks(self.name, self.layout, path=os.fspath(self.placement.path), cache_bytes=cache_bytes)
        return EmbeddingBlocks(self.layout, self.device, pinned=pinned, cache_bytes=cache_bytes)

    def on_map(self, ids: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return tensors on the device of the IDMap."""
        return ids if self.map_device == self.device else [part.to(self.map_device) for part in ids]

    def on_blocks(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device of the blocks."""
        return tensor if self.map_device == self.device else tensor.to(self.device)

    # Lookups

    def find(self, request: Request) -> Tensor:
        """Return the row of each id of a request, int64 ``[N]``, -1 for an id that has none; changes nothing."""
        return self.on_blocks(self.id_map.find(self.on_map(request.ids), request.members, self.on_map(request.used)))

    def stage(self, request: Request) -> None:
        """Start to read the records of a later lookup, if they are on disk."""
        if self.on_disk:
            self.blocks.stage(self.find(request))

    def insert_grouped(
        self, request: Request, out: Tensor | None, starts: Sequence[int]
    ) -> tuple[Tensor, RowGroups, Tensor | None]:
        """Find the rows of a request, insert admitted ids that have none, and group positions by row.

        Args:
            request: The ids of all features.
            out: float32 buffer for gathering the vectors in the same pass, if bags and placement allow it; None to
                gather later.
            starts: For each feature, the offset of its vectors in ``out``.

        Returns:
            The rows, int64 ``[N]``, -1 for an id that is not admitted; the positions grouped by row; and ``out``, or
            None if nothing was gathered.
        """
        self._make_cache()
        rows, groups, gathered = self._insert_grouped(request, out, starts)
        if isinstance(self.blocks, EmbeddingBlocks):
            self.blocks.admit(groups)
        return rows, groups, gathered

    def _insert_grouped(
        self, request: Request, out: Tensor | None, starts: Sequence[int]
    ) -> tuple[Tensor, RowGroups, Tensor | None]:
        ids, members, layout = request.ids, request.members, self.layout
        if self.gate is not None or self.map_device != self.device:
            rows = self.insert(ids, members, self.gate, request.used, request.counts)
            groups = ops.gather.group_rows(rows, members, self.id_map.row_bound, gradient_bags(request.bags))
            return rows, groups, None
        if isinstance(self.blocks, DiskBlocks):
            self._reserve(sum(request.bags.lengths))
            bags = gradient_bags(request.bags)
            return *self.blocks.insert_grouped(self.id_map, ids, members, self.initializers, bags), None
        bound = self._reserve(sum(request.bags.lengths))
        # Bags of several ids are gathered later, and so are vectors that may be cached.
        gathered = out if request.bags.plain and self.blocks.cache is None else None
        self.id_map.count_inserts(sum(request.bags.lengths))
        rows, groups = ops.gather.insert_grouped(
            self.id_map.slots.header,
            self.id_map.counters,
            self.id_map.free_rows,
            self.blocks.new(),
            layout.element,
            layout.dim,
            self.initializers,
            layout.state_args,
            ids,
            members,
            bound,
            gradient_bags(request.bags),
            used=request.used,
            out=gathered,
            starts=() if gathered is None else starts,
        )
        self.id_map.copy_counters()
        return rows, groups, gathered

    def insert(
        self,
        ids: Sequence[Tensor],
        members: list[int],
        gate: Gate | None,
        used: Sequence[Tensor] = (),
        counts: Tensor | None = None,
    ) -> Tensor:
        """Find the rows of ids, and insert ids that have none, with first values.

        Args:
            ids: For each feature, int64.
            members: For each feature, the number of its member table.
            gate: Decides which ids are admitted; None: all.
            used: As ``Request.used``.
            counts: As ``Request.counts``.

        Returns:
            The rows, int64 ``[N]``; -1 for an id that is not admitted.
        """
        map_ids, used = self.on_map(ids), self.on_map(used)
        self._reserve(sum(part.numel() for part in ids))
        admitted = None
        if gate is not None:
            found = self.id_map.find(map_ids, members, used)
            counts = None if counts is None else counts.to(self.map_device)
            admitted = gate.admitted(map_ids, members, found, used, counts)
        map_rows, map_fresh = self.id_map.find_or_insert(map_ids, members, admitted, used)
        try:
            rows, fresh = self.on_blocks(map_rows), self.on_blocks(map_fresh)
            blocks, places = self.blocks.prepare(rows)
            if self.id_map.may_have_fresh:
                ops.blocks.init_fresh(
                    blocks,
                    self.layout.element,
                    self.on_blocks(self.id_map.counters),
                    places,
                    fresh,
                    ids,
                    members,
                    self.initializers,
                    self.layout.dim,
                    self.layout.state_args,
                )
        except BaseException:
            # After an interrupt or without memory for a copy, the records of the new ids are not initialized.
            if self.on_disk:
                self.blocks.forget(map_rows[map_fresh[: int(self.id_map.counters[ops.id_map.FRESH])]])
            self.id_map.withdraw(map_ids, members, map_fresh)
            raise
        self.id_map.commit()
        if gate is not None:
            gate.confirm()
        return rows

    def _make_cache(self) -> None:
        """Allocate the cache of the blocks, if there is to be one on a GPU."""
        if isinstance(self.blocks, DiskBlocks):
            return
        try:
            self.blocks.make_cache()
        except RuntimeError as error:
            raise RuntimeError(
                f"table {self.name}: a cache of cache_bytes={self.placement.cache_bytes:,} does not fit into the "
                f"memory of {self.device}; use a smaller Placement(cache_bytes=): {error}"
            ) from error

    def reserve(self, more: int) -> None:
        """Make room for more ids; if memory runs out, nothing changes."""
        self._make_cache()
        self._reserve(more)

    def _reserve(self, more: int) -> int:
        """Make room for more ids before anything is changed, so that running out of memory changes nothing."""
        if self.compaction is not None:
            self.compaction.provide(more)
        bound = self.id_map.row_bound + more
        if bound > self.blocks.capacity:
            # The bound counts ids, of which most have a row already; blocks that it alone asks for would stay empty.
            bound = self.id_map.row_bound_after_inserts() + more
        self.blocks.reserve(bound)
        self.id_map.reserve(more)
        return bound

    # Bulk access to rows; all methods wait for the device

    def check_ids(self, where: str, member: int, ids: Tensor) -> Tensor:
        """Check ids of a member table, and return them contiguous and on the device of the blocks."""
        return checked_ids(where, self.members, member, ids).to(self.device)

    def check_columns(self, member: int, ids: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Raise TypeError or ValueError if columns do not fit the rows of ``ids`` (int64 ``[n]``)."""
        widths = {part: self.layout.width(part) for part in self.layout.parts}
        refuse_columns(self.members[member].name, ids, columns, widths)

    def write(self, member: int, ids: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Insert ids regardless of admission, and write the given columns; both must have been checked.

        Returns:
            The rows, int64 ``[n]``.
        """
        if ids.numel() > self.blocks.piece_rows:
            pieces = zip(*(values.split(self.blocks.piece_rows) for values in columns.values()), strict=True)
            some = ids.split(self.blocks.piece_rows)
            parts = [dict(zip(columns, piece, strict=True)) for piece in pieces] if columns else [{}] * len(some)
            return torch.cat([self.write(member, part, piece) for part, piece in zip(some, parts, strict=True)])
        rows = self.insert([ids], [member], None) if ids.numel() else ids
        if self.gate is not None:
            self.gate.forget(member, ids.to(self.map_device))
        for part in self.layout.parts:
            if part in columns:
                self.blocks.write(rows, part, columns[part])
        if META[0] in columns:
            meta = torch.stack([columns[name].to(self.device, torch.int64) for name in META])
            self.blocks.write_meta(rows, meta)
        return rows

    def mark_seen(self, rows: Tensor, step: int) -> None:
        """Raise ``seen_step`` of rows (int64 ``[n]``) to at least a step."""
        meta = self.blocks.read_meta(rows)
        meta[1].clamp_(min=step)
        self.blocks.write_meta(rows, meta)

    def ids(self, member: int) -> Tensor:
        """Return the ids of a member table that have a row, int64 ``[n]``, ascending."""
        checked_member("ids", len(self.members), member)
        entries = self.id_map.entries()
        return entries.ids[entries.members == member].sort().values.to(self.device)

    def rows(self, member: int, ids: Tensor) -> Tensor:
        """Return the rows of ids (int64 ``[n]``), -1 for an id that has none."""
        ids = checked_ids("rows", self.members, member, ids)
        return self.on_blocks(self.id_map.find([ids.to(self.map_device)], [member]))

    def export(self, member: int, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Return the records of ids (int64 ``[n]``; None for all, ascending); see :meth:`HashTable.export`."""
        ids = self.ids(member) if ids is None else ids.to(self.device)
        rows = self.rows(member, ids)
        if bool((rows < 0).any()):
            missing = ids[rows < 0][:5].tolist()
            raise KeyError(f"table {self.members[member].name!r}: no row for the ids {missing}; look them up first")
        return {"ids": ids, **self.blocks.columns(rows)}

    def export_all(self) -> list[dict[str, Tensor]]:
        """Return the records of each member table, rows by (bucket, id)."""
        entries = self.id_map.entries()
        order = ops.id_map.bucket_order(entries.ids, entries.members)
        ids, rows = self.on_blocks(entries.ids[order]), self.on_blocks(entries.rows[order])
        counts = entries.members.bincount(minlength=len(self.members)).tolist()
        columns = {"ids": ids, **self.blocks.columns(rows)}
        parts = zip(*(values.split(counts) for values in columns.values()), strict=True)
        return [dict(zip(columns, part, strict=True)) for part in parts]

    def export_none(self) -> dict[str, Tensor]:
        """Return the columns of an export without rows; whole rows, even if rows are split by column."""
        none, layout = torch.empty(0, dtype=torch.int64, device=self.device), self.layout.whole
        parts = {
            part: torch.empty(0, layout.width(part), dtype=layout.part_dtype(part), device=self.device)
            for part in layout.parts
        }
        return {"ids": none, **parts, **dict.fromkeys(META, none)}

    def touched(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ids and member tables, int64 ``[n]`` each, of rows that were looked up or updated after a step."""
        if isinstance(self.blocks, DiskBlocks):
            entries, marks = self.id_map.entries(), self.blocks.touched(step)
            touched = marks[entries.rows].bool()
            return entries.ids[touched], entries.members[touched]
        # Each row's metadata is read once, in memory order, and no slot waits for it.
        marks = torch.empty(self.id_map.row_bound, dtype=torch.uint8, device=self.device)
        ops.blocks.mark_touched(self.blocks.whole(), step, marks)
        ids, members = self.id_map.marked(marks.to(self.map_device))
        return self.on_blocks(ids), self.on_blocks(members)

    def unwanted(
        self,
        rule: EvictionRule | Mapping[int, EvictionRule],
        step: int,
        times: Sequence[StepTimes],
        shared: SharedRows,
        share: tuple[int, int] | None = None,
    ) -> Entries:
        """Return the rows that a rule selects, or that a rule selects in each member table; collective likewise.

        Args:
            rule: A rule for all member tables, each of which it sees alone; or rules by number of the member table.
                Rows of other member tables stay.
            step: Number of steps done on the table, for the rules.
            times: For each member table, the times of its steps.
            shared: Distribution of the rows over ranks.
            share: Apply the rules only to this share of the rows, as ``IdMap.share`` takes it, and keep rows that a
                training lookup after ``step`` has seen. None: apply them to all rows.
        """
        entries = self.id_map.share(*(share or (0, 1)))
        meta = self.blocks.read_meta(self.on_blocks(entries.rows)).to(self.map_device)
        unwanted = torch.zeros_like(entries.ids, dtype=torch.bool)
        for member, own in rules_by_member(rule, len(self.members)):
            at, rows = self._rows_of(member, entries, meta, step, times[member], shared)
            unwanted[at] = unwanted_rows(own, rows)
        if share is not None:
            unwanted &= meta[1] <= step
        return Entries(*(values[unwanted] for values in entries))

    def cutoffs(
        self,
        rule: EvictionRule | Mapping[int, EvictionRule],
        step: int,
        times: Sequence[StepTimes],
        shared: SharedRows,
    ) -> dict[int, EvictionRule]:
        """Return rules by member table, with the result of ranking all rows for each that ranks them; collective."""
        entries = self.id_map.entries()
        meta = self.blocks.read_meta(self.on_blocks(entries.rows)).to(self.map_device)
        rules = dict(rules_by_member(rule, len(self.members)))
        for member, own in rules.items():
            if isinstance(own, Capacity):
                _, rows = self._rows_of(member, entries, meta, step, times[member], shared)
                rules[member] = own.cutoff(rows)
        return rules

    def _rows_of(
        self, member: int, entries: Entries, meta: Tensor, step: int, times: StepTimes, shared: SharedRows
    ) -> tuple[slice | Tensor, Rows]:
        """Return the places of a member table's rows among entries with some metadata, and the rows as rules get them.

        Args:
            member: Number of the member table.
            entries: ``[n]``.
            meta: int64 ``[3, n]``.
            step: Number of steps done on the table, for the rules.
            times: Times of the member table's steps.
            shared: Distribution of the rows over ranks.
        """
        at: slice | Tensor = slice(None)
        if len(self.members) > 1:
            at = (entries.members == member).nonzero().view(-1)
        return at, Rows(
            self.members[member].name,
            entries.ids[at],
            meta[0][at],
            meta[1][at],
            meta[2][at],
            step=step,
            row_bytes=self.layout.whole.record_bytes,
            shared=shared,
            times=times,
            read_norms=partial(self.norms, entries.rows[at]),
        )

    def norms(self, rows: Tensor) -> Tensor:
        """Return the L2 norms of the embeddings of rows (int64 ``[n]``), float32 ``[n]``, read a few MiB at a time."""
        pieces = self.on_blocks(rows).split(max(_SLICE_BYTES // (4 * self.layout.dim), 1))
        norms = [self.blocks.read(piece, "embedding").float().norm(dim=1) for piece in pieces]
        return torch.cat(norms).to(rows.device)

    def erase_slots(self, slots: Tensor) -> int:
        """Erase the ids in slots of the IDMap (int64 ``[n]``, negative: none), and return their number."""
        before = len(self)
        self.blocks.forget(self.id_map.rows_in(slots))  # other ids may get the rows
        self.id_map.erase_slots(slots.contiguous())
        erased = before - len(self)
        if self.compaction is not None:
            self.compaction.withhold(erased)
        return erased

    def begin_compaction(self) -> Compaction:
        """Begin to close gaps between rows, the only operation that moves rows; ends an unfinished compaction."""
        self.compaction = Compaction(self.id_map, self.blocks, self.compaction)
        return self.compaction

    def compact(self, rows: int | None) -> int:
        """Do the next part of the compaction that has begun, and return how many rows have moved.

        Args:
            rows: About how many rows at once; None: all. The last part also copies the IDMap into a smaller one, if
                that takes no longer than other parts.
        """
        assert self.compaction is not None
        moved = self.compaction.advance(rows or max(self.id_map.row_bound, 1))
        if self.compaction.done:
            self.compaction = None
            if rows is None or self.id_map.capacity <= _SLOTS_PER_ROW * rows:
                self.id_map.rehash(len(self))
        return moved

    def row_counts(self) -> list[int]:
        """Return the number of rows of each member table; reads the IDMap if there are several."""
        if len(self.members) == 1:
            return [len(self)]
        counts = torch.zeros(len(self.members), dtype=torch.int64, device=self.map_device)
        for entries in self.id_map.slices():
            counts += entries.members.bincount(minlength=len(self.members))
        return counts.tolist()

    def row_norms(self) -> tuple[Tensor, Tensor]:
        """Return the sum and the maximum of the L2 norms of each member table's embeddings, float64 ``[M]`` each.

        Rows are read a few MiB at a time. Not finite if a row is not.
        """
        sums, highest = torch.zeros(2, len(self.members), dtype=torch.float64, device=self.device).unbind()
        slots = 1 << (_SLICE_BYTES // (4 * self.layout.dim)).bit_length()
        for entries in self.id_map.slices(slots):
            norms = self.blocks.read(self.on_blocks(entries.rows), "embedding").float().norm(dim=1).double()
            members = self.on_blocks(entries.members)
            sums.index_add_(0, members, norms)
            highest.scatter_reduce_(0, members, norms, "amax")
        return sums, highest

    def memory(self) -> dict[str, int]:
        """Return the bytes of each part; see :meth:`HashTable.memory`."""
        parts = {
            "id_map": self.id_map.nbytes,
            **{"blocks": 0, "cache": 0, "locations": 0, "disk": 0, **self.blocks.memory()},
            "free_rows": self.id_map.free_rows.nbytes + (0 if self.compaction is None else self.compaction.nbytes),
            "admission": 0 if self.gate is None else self.gate.nbytes,
        }
        return {**parts, "total": sum(parts.values()) - parts["disk"]}
