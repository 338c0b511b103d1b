"""HashTable: one logical table, IDMap, EmbeddingBlocks and row metadata together.

Letters: n ids, N positions (ids of a call over all features), D dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.admission import Admission
from recis_hybrid.embedding.compilation import refuse_recording
from recis_hybrid.embedding.eviction import Eviction
from recis_hybrid.embedding.initializers import initializer_words, refuse_unrepresentable
from recis_hybrid.embedding.placement import Placement
from recis_hybrid.embedding.table.anchor import Anchor, refused_copy
from recis_hybrid.embedding.table.blocks import EmbeddingBlocks
from recis_hybrid.embedding.table.change_log import Changes
from recis_hybrid.embedding.table.exporting import export_members, export_rows
from recis_hybrid.embedding.table.gradients import Pending, part_of, usable
from recis_hybrid.embedding.table.id_map import MAX_MEMBERS, IdMap
from recis_hybrid.embedding.table.inserting import insert_grouped, insert_rows
from recis_hybrid.embedding.table.lookup import FeatureIds, Lookup, Request, next_generation
from recis_hybrid.embedding.table.protocols import META, BeforeRead, MemberTable, RowUpdate
from recis_hybrid.embedding.table.reclaiming import compact_rows, erase_evicted, evicted_by
from recis_hybrid.embedding.table.record_layout import RecordLayout
from recis_hybrid.embedding.table.row_validation import checked_ids, checked_member, refuse_columns
from recis_hybrid.ops.update import Gradients


class HashTable:
    """A growing, collision-free table of records for one or more member tables.

    Args:
        members: The member tables; their number is their index here.
        layout: How a record lies in memory.
        device: Where IDMap and blocks live, where ``placement`` does not say.
        seed: Of the rows' first values and of stochastic rounding.
        placement: Where IDMap and blocks live, each.
        admission: Which ids get a row; None: all that a training lookup meets.
        read_only: Refuses whatever would change rows, but for loading them.
    """

    def __init__(
        self,
        members: Sequence[MemberTable],
        layout: RecordLayout,
        device: torch.device,
        seed: int = 0,
        *,
        placement: Placement | None = None,
        admission: Admission | None = None,
        read_only: bool = False,
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
        """Whose kernels work on the records."""
        self.admission = admission
        self.read_only = read_only
        self.generation = next_generation()
        """Another one from whatever makes row numbers of earlier lookups meaningless; no two tables have the same."""
        self.step = 0
        """Steps done: how often an optimizer over this table has stepped."""
        self.before_read: BeforeRead | None = None
        """Called in each training lookup, before values are read."""
        self.pending = Pending()
        self._unseen: Lookup | None = None
        self.reseed(seed)
        self._empty()
        self.overrides: dict[str, Any] = {}
        self.built_alone = False
        """Whether its engine was built without a process group, and not explicitly for one process."""
        """Hyperparameters of the optimizer that are others for this table."""
        self._anchor: weakref.ref[Anchor] | None = None
        self.watched: weakref.WeakSet[Changes] = weakref.WeakSet()

    def __len__(self) -> int:
        """Rows in use; waits for the device."""
        return len(self.id_map)

    def __repr__(self) -> str:
        return f"HashTable({self._name}, dim={self.layout.dim}, {len(self)} rows)"

    def __reduce__(self) -> Any:
        """Refuses ``copy``, ``deepcopy`` and pickling, which all come here."""
        raise refused_copy()

    @property
    def anchor(self) -> Anchor:
        """The table's place in autograd and in optimizers: the same as long as anyone holds it."""
        # The anchor holds the table. Were that so the other way round, too, the memory of a table that is dropped would
        # wait for the garbage collector.
        anchor = None if self._anchor is None else self._anchor()
        if anchor is None:
            anchor = Anchor(self)
            self._anchor = weakref.ref(anchor)
        return anchor

    def reseed(self, seed: int) -> None:
        """Set the seed of first values, for rows that are not there yet."""
        self.seed = seed
        dim, first = self.layout.whole.dim, self.layout.first
        words = [initializer_words(m.initializer, dim, seed, m.name, first) for m in self.members]
        self.initializers = torch.tensor(words, dtype=torch.int64, device=self.device)

    @property
    def rounding_seed(self) -> int:
        """32 bits for the stochastic rounding of the step under way."""
        mixed = (self.seed * 0x9E3779B97F4A7C15 + (self.step + 1) * 0xD1B54A32D192ED03) & (1 << 64) - 1
        return mixed >> 32

    # Lookups

    def lookup(self, features: Sequence[FeatureIds], *, train: bool) -> Lookup:
        """Find the rows of all features' ids.

        Args:
            features: The ids, on the table's device.
            train: Gives ids that have no row one, as far as they are admitted, and notes what was met in the rows'
                metadata. Else, and in a read-only table, nothing is changed, and an unknown id's row is -1.

        Raises:
            IndexError: If a feature's member table is none of the table's.
            RuntimeError: If offsets decrease, or lie outside of the ids.
        """
        refuse_recording()
        for feature in features:
            if not 0 <= feature.member < len(self.members):
                raise IndexError(
                    f"table {self._name}: member table must be 0 to {len(self.members) - 1}, got {feature.member}"
                )
        return self.find(Request.of(features), train=train)

    def find(self, request: Request, *, train: bool, out: Tensor | None = None, starts: Sequence[int] = ()) -> Lookup:
        """As :meth:`lookup`, of features side by side.

        A training lookup does along with it what :meth:`gather` does, where a buffer for that is given and it can, and
        hands the buffer on as ``Lookup.gathered``.
        """
        if not train or self.read_only:
            rows = self.on_blocks(
                self.id_map.find(self.on_map(request.ids), request.members, self.on_map(request.used))
            )
            return Lookup(request, rows, self.id_map.row_bound, self.generation, False, self.step)
        self.see()
        lookup = insert_grouped(self, request.kept(), out, starts)
        if self.before_read is not None:
            self.before_read(self, lookup.groups)
        self._unseen = lookup
        return lookup

    def see(self) -> None:
        """Note in the rows' metadata what the last training lookup met.

        An update of the same rows does this along with its own work; it is done here for lookups that none follows, and
        before anything looks at metadata or moves rows.
        """
        lookup, self._unseen = self._unseen, None
        if lookup is not None:
            groups = lookup.groups
            ops.blocks.see_rows(self.blocks.handle, groups.count, groups.unique, lookup.occurrences(), lookup.step)

    def records(self, gradients: Gradients) -> ops.update.Table:
        """Return the records as an update by these gradients sees them; the update must follow."""
        unseen, layout = self._unseen, self.layout
        sees = (
            unseen is not None
            and unseen.step == self.step + 1
            and unseen.grouped is gradients.groups
            and unseen.request.counts is None
        )
        if sees:
            self._unseen = None
        return ops.update.Table(
            self.blocks.handle,
            layout.element,
            layout.state_element,
            layout.dim,
            self.step + 1,
            sees,
            self.rounding_seed,
        )

    def gather(self, lookup: Lookup, out: Tensor, starts: Sequence[int], winners: Tensor | None = None) -> None:
        """Write each feature's vectors.

        Args:
            lookup: Of this table.
            out: float32, one buffer for all features.
            starts: For each feature, where in ``out`` its ``[V, D]`` begin.
            winners: int32, as ``out``; needed for gradients where a combiner takes the greatest.
        """
        self.check(lookup)
        ids, members, bags, unknown, *_ = lookup.request
        ops.gather.gather_bags(
            self.blocks.handle,
            self.layout.element,
            self.layout.dim,
            lookup.rows,
            bags,
            [] if lookup.complete else ids,
            unknown,
            self.initializers,
            out,
            starts,
            winners,
        )

    def on_map(self, ids: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return tensors on the device of the IDMap."""
        return ids if self.map_device == self.device else [part.to(self.map_device) for part in ids]

    def on_blocks(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device of the blocks."""
        return tensor if self.map_device == self.device else tensor.to(self.device)

    # Gradients

    def gradients(self, lookup: Lookup, gradients: Sequence[Tensor | None]) -> Gradients:
        """Return the gradients of a training lookup as :meth:`apply_gradients` takes them, after checking them.

        Args:
            lookup: From :meth:`lookup`.
            gradients: For each feature, float32 ``[V, D]``: of its vectors, or of its positions where the combiner
                takes the greatest.
        """
        self.check(lookup)
        self.refuse_read_only("apply_gradients")
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                f"table {self._name}: apply_gradients takes a gradient for each feature; give zeros for None"
            )
        return Gradients(
            usable(self._name, lookup.sources.vectors, gradients, self.layout.dim, self.device), lookup.groups
        )

    def apply_gradients(self, gradients: Gradients, update: RowUpdate) -> None:
        """Update rows: one step of an optimizer."""
        update(self, gradients)
        self.step += 1

    def add_gradients(self, lookup: Lookup, gradients: Sequence[Tensor | None]) -> None:
        """Keep the gradients of a training lookup until :meth:`apply_pending`; None for a feature without one."""
        self.check(lookup)
        part = part_of(
            self._name,
            lookup.rows,
            lookup.request.members,
            lookup.row_bound,
            lookup.sources,
            lookup.groups,
            gradients,
            self.layout.dim,
        )
        if part is not None:
            self.pending.add(part)

    def apply_pending(self, update: RowUpdate) -> None:
        """Does a step: reduces what backward has left here, once, and updates the rows."""
        self.pending.fetch()
        update(self, self.pending.gradients() if self.pending else None)
        self.pending.clear()
        self.step += 1

    # What changes; all of it waits for the device

    def watch(self) -> Changes:
        """Begins to note what changes, for as long as the result lives: 8 bytes for each id that is erased or inserted.

        A copy of what admission knows is in it, 16 bytes an id.
        """
        self.see()
        known = {} if self.gate is None else {m: self.gate.state_dict(m) for m in range(len(self.members))}
        changes = Changes(self.step, known)
        self.watched.add(changes)
        return changes

    def watches(self, changes: Changes) -> bool:
        """Whether it was :meth:`watch` of this table that returned ``changes``."""
        return changes in self.watched

    def note(self, member: int, ids: Tensor) -> None:
        """Note for whoever watches that ids (int64 ``[m]``) of a member table got, changed or lost rows."""
        for changes in self.watched:
            changes.note(member, ids, len(self))

    # Rows in bulk; all of it waits for the device

    def insert(self, member: int, ids: Tensor, columns: dict[str, Tensor] | None = None) -> Tensor:
        """Give ids rows, whatever admission says.

        Args:
            member: Number of the member table.
            ids: int64 ``[n]``; distinct where columns are given.
            columns: What the rows hold, as :meth:`export` gives it. What is not named starts with its first value in a
                new row, and stays as it is in a row that is there already. Without metadata the rows count as met now.

        Raises:
            TypeError: If a column is no tensor, or metadata are no integers.
            ValueError: If columns do not fit the rows, metadata are out of range, or ids are not int64 ``[n]``; nothing
                is changed.

        Returns:
            int64 ``[n]``: the rows.
        """
        self.refuse_read_only("insert")
        rows = self.load(member, ids, columns or {})
        if columns is None or META[1] not in columns:
            # As recent as if a lookup had just met them: the next eviction leaves them.
            meta = ops.blocks.read_meta(self.blocks.handle, rows)
            meta[1].clamp_(min=self.step)
            ops.blocks.write_meta(self.blocks.handle, rows, meta)
        return rows

    def load(self, member: int, ids: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """As :meth:`insert`, also for a read-only table: how a checkpoint comes in."""
        ids = self._ids("insert", member, ids)
        widths = {part: self.layout.width(part) for part in self.layout.parts}
        refuse_columns(self.members[member].name, ids, columns, widths)
        self.see()
        self.note(member, ids)
        rows = insert_rows(self, [ids], [member], None) if ids.numel() else ids
        if self.gate is not None:
            self.gate.forget(member, ids.to(self.map_device))
        for part in self.layout.parts:
            if part in columns:
                self.blocks.write(rows, part, columns[part])
        if META[0] in columns:
            meta = torch.stack([columns[name].to(self.device, torch.int64) for name in META])
            ops.blocks.write_meta(self.blocks.handle, rows, meta)
        return rows

    def ids(self, member: int) -> Tensor:
        """Return the ids of a member table that have a row, int64 ``[n]``, ascending."""
        self._ids("ids", member)
        entries = self.id_map.entries()
        return entries.ids[entries.members == member].sort().values.to(self.device)

    def rows(self, member: int, ids: Tensor) -> Tensor:
        """Return the rows of ids (int64 ``[n]``), -1 for an id that has none; they hold for this generation."""
        return self.on_blocks(self.id_map.find([self._ids("rows", member, ids).to(self.map_device)], [member]))

    def export(self, member: int, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Return the records of ids.

        Args:
            member: Number of the member table.
            ids: int64 ``[n]``; None: all that have a row, ascending.

        Returns:
            ``ids``; every part of the record, ``[n, width]``; ``updated_step``, ``seen_step`` and ``frequency``.

        Raises:
            KeyError: If an id has no row.
        """
        return export_rows(self, member, ids)

    def export_all(self) -> list[dict[str, Tensor]]:
        """Return what :meth:`export` gives for each member table, rows by (bucket, id), as checkpoints have them."""
        return export_members(self)

    def export_none(self) -> dict[str, Tensor]:
        """Return what :meth:`export` would give of no ids, and of whole rows: its columns."""
        none, layout = torch.empty(0, dtype=torch.int64, device=self.device), self.layout.whole
        parts = {
            part: torch.empty(0, layout.width(part), dtype=layout.part_dtype(part), device=self.device)
            for part in layout.parts
        }
        return {"ids": none, **parts, **dict.fromkeys(META, none)}

    def erase(self, member: int, ids: Tensor) -> int:
        """Give up the rows of ids (int64 ``[n]``); those that have none are passed over. Returns how many it had."""
        ids = self._ids("erase", member, ids).to(self.map_device)
        erased = self.erase_slots("erase", self.id_map.slots_of([ids], [member]))
        self.note(member, ids)
        return erased

    def evict(self, rule: Eviction) -> int:
        """Give up the rows that a rule names. Returns how many."""
        return erase_evicted(self, evicted_by(self, rule))

    def clear(self, member: int | None = None) -> None:
        """Remove every row of a member table, or of all, and what admission knows of their ids."""
        self.refuse_read_only("clear")
        self.discard(member)

    def discard(self, member: int | None = None) -> None:
        """As :meth:`clear`, also for a read-only table."""
        if member is not None:
            checked_member("clear", len(self.members), member)
        for changes in self.watched:
            for cleared in range(len(self.members)) if member is None else [member]:
                changes.note_whole(cleared)
        if member is not None:
            entries = self.id_map.entries()
            self.erase_slots("clear", entries.slots[entries.members == member], loading=True)
            if self.gate is not None:
                self.gate.clear(member)
            return
        self._empty()
        self.generation = next_generation()

    def compact(self) -> None:
        """Move rows together, so that blocks at the end can be given back; the only thing that moves rows."""
        compact_rows(self)

    def memory(self) -> dict[str, int]:
        """Return the bytes that each part holds: ``id_map``, ``blocks``, ``free_rows``, ``admission``, and ``total``.

        Beside them are gradients that wait for a step, and for the whole process up to 1 GiB of host memory that tables
        and batches gave back, which is kept for the next that ask for as much.
        """
        parts = {
            "id_map": self.id_map.nbytes,
            "blocks": self.blocks.nbytes,
            "free_rows": self.id_map.free_rows.nbytes,
            "admission": 0 if self.gate is None else self.gate.nbytes,
        }
        return {**parts, "total": sum(parts.values())}

    def _ids(self, what: str, member: int, ids: Tensor | None = None) -> Tensor:
        return checked_ids(what, self.members, member, self.id_map.counters[:0] if ids is None else ids).to(self.device)

    def _empty(self) -> None:
        self.id_map = IdMap(self.map_device)
        self.blocks = EmbeddingBlocks(self.layout, self.device, pinned=self.placement.blocks == "pinned")
        self.gate = None if self.admission is None else self.admission.gate(self.map_device)
        self.pending.clear()
        self._unseen = None

    def erase_slots(self, what: str, slots: Tensor, *, loading: bool = False) -> int:
        """Give up the rows of slots (int64 ``[n]``), for ``what``, which is named where it is refused."""
        if not loading:
            self.refuse_read_only(what)
        self.refuse_pending(what)
        self.see()
        before = len(self)
        self.generation = next_generation()
        self.id_map.erase_slots(slots.contiguous())
        return before - len(self)

    @property
    def _name(self) -> str:
        return ", ".join(member.name for member in self.members)

    def refuse_read_only(self, what: str) -> None:
        """Raise RuntimeError if nothing may change the rows."""
        if self.read_only:
            raise RuntimeError(
                f"table {self._name}: {what} would change it, and it is read-only; "
                f"build the engine with trainable=True for its features"
            )

    def refuse_pending(self, what: str) -> None:
        """Raise RuntimeError if gradients wait for rows that would go or move."""
        if self.pending:
            raise RuntimeError(
                f"table {self._name}: {what} would part gradients that wait here from their rows; "
                f"call the optimizer's step or zero_grad first"
            )

    def check(self, lookup: Lookup) -> None:
        """Raise RuntimeError for a lookup of another generation."""
        if lookup.generation != self.generation:
            raise RuntimeError(
                f"table {self._name}: this lookup is of generation {lookup.generation} and the table is in generation "
                f"{self.generation}: rows were cleared, erased or moved since, or it was made by another table; look "
                f"the batch up again, in this one"
            )
