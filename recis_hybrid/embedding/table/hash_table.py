"""HashTable: one logical table in training; and its anchor, which represents it in autograd and optimizers.

Letters: n ids, N positions (ids of a call over all features), D dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from recis_hybrid import ops
from recis_hybrid.checkpointing import BUCKETS
from recis_hybrid.embedding.catch_up import caught_up, caught_up_columns, copied_records
from recis_hybrid.embedding.compilation import outside_graphs, prepare, refuse_recording
from recis_hybrid.embedding.eviction import EvictionRule, SharedRows, StepTimes, ranks_rows
from recis_hybrid.embedding.gate import Admission
from recis_hybrid.embedding.optimizer import BeforeRead, OptimizerSpec
from recis_hybrid.embedding.placement import Placement
from recis_hybrid.embedding.table.change_log import ChangeLog, changed_rows
from recis_hybrid.embedding.table.compaction import Compaction
from recis_hybrid.embedding.table.gradients import (
    PendingGradients,
    RemoteGradients,
    checked_gradients,
    gradient_part,
)
from recis_hybrid.embedding.table.id_map import Entries
from recis_hybrid.embedding.table.lookup import FeatureIds, Lookup, Request, next_generation
from recis_hybrid.embedding.table.memory import TableMemory
from recis_hybrid.embedding.table.record_cache import CacheStatistics
from recis_hybrid.embedding.table.record_layout import META, MemberTable, RecordLayout
from recis_hybrid.embedding.table.row_validation import checked_member
from recis_hybrid.embedding.table.store import RowStore
from recis_hybrid.embedding.table.tracking import LookupTracker
from recis_hybrid.ops.program import as_int64
from recis_hybrid.ops.update import Gradients

_MANY_ROWS = 1 << 20
"""Rows that catch up at a time."""


@outside_graphs("gradient_norm", "clip_row_gradients", "announce_gradients", "fetch_gradients")
class HashTable:
    """A growing, collision-free table of records for one or more member tables.

    A :class:`RowStore` holds the rows. This class adds the parts that training needs: lookups and their generation,
    pending gradients, and the log of changes for incremental checkpoints.

    Args:
        members: The member tables; the number of a member table is its index here.
        layout: Memory layout of a record.
        device: Device of IDMap and blocks, if there is no ``placement``.
        seed: Seed of the rows' first values and of stochastic rounding.
        placement: Devices of IDMap and blocks.
        admission: Rule for which ids get a row; None: all ids of training lookups.
        buckets: The first bucket whose ids are looked up here, and the one after the last.
        read_only: Refuse all changes of rows except loading.
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
        buckets: tuple[int, int] = (0, BUCKETS),
        read_only: bool = False,
    ) -> None:
        self._borrowed: Callable[[], None] | None = None
        self._store = RowStore(members, layout, device, seed, placement=placement, admission=admission, buckets=buckets)
        self.members = self.store.members
        self.layout = layout
        self.device = self.store.device
        self.read_only = read_only
        self.generation = next_generation()
        """Changes whenever row numbers of earlier lookups become invalid; unique over all tables of the process."""
        self._step = 0
        self.before_read: BeforeRead | None = None
        """Lets rows catch up on missed steps before they are read; None: they miss none."""
        self.pending = PendingGradients()
        """Gradients that wait for the next step."""
        self.optimizer: OptimizerSpec | None = None
        """The table's own optimizer; None: that of all tables."""
        self.overrides: dict[str, Any] = {}
        """Optimizer hyperparameters for this table only."""
        self.built_alone = False
        """True if the engine was built without a process group, but not explicitly for one process."""
        self.step_times = [StepTimes() for _ in members]
        """For each member table, the times of its steps, for eviction by time."""
        self.tracker: LookupTracker | None = None
        """Counts the ids of training lookups; None: they are not counted."""
        self._unrecorded: Lookup | None = None
        # The remote and the anchor refer to the table. Weak references avoid cycles, which would keep the memory of a
        # dropped table until the garbage collector runs.
        self._remote: weakref.ref[RemoteGradients] | None = None
        self._anchor: weakref.ref[Anchor] | None = None
        self.change_logs: weakref.WeakSet[ChangeLog] = weakref.WeakSet()
        """Logs of changes that are still referenced."""

    def __len__(self) -> int:
        """Return the number of rows in use; waits for the device."""
        return len(self.store)

    def __repr__(self) -> str:
        dtype = str(self.layout.dtype).removeprefix("torch.")
        frozen = ", read_only=True" if self.read_only else ""
        return f"HashTable({self.name}, dim={self.layout.dim}, dtype={dtype}, rows={len(self):,}{frozen})"

    def __reduce__(self) -> Any:
        """Refuse ``copy``, ``deepcopy`` and pickling, which all call this."""
        raise _refused_copy()

    @property
    def name(self) -> str:
        """Names of the member tables, for messages."""
        return self._store.name

    @property
    def store(self) -> RowStore:
        """The rows; waits for a program that has borrowed the table."""
        if self._borrowed is not None:
            self._borrowed()
        return self._store

    @property
    def step(self) -> int:
        """Number of steps done on this table, counted by the optimizer; waits like :attr:`store`."""
        if self._borrowed is not None:
            self._borrowed()
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step

    @property
    def anchor(self) -> Anchor:
        """The parameter that represents the table in autograd and optimizers; the same while anything refers to it."""
        anchor = None if self._anchor is None else self._anchor()
        if anchor is None:
            anchor = Anchor(self)
            self._anchor = weakref.ref(anchor)
        return anchor

    @property
    def rounding_seed(self) -> int:
        """32 bits for the stochastic rounding of the next step."""
        return self.rounding_sequence(self.step + 1)[0] % 2**64 >> 32

    def rounding_sequence(self, step: int) -> tuple[int, int]:
        """Return 64 bits, whose high 32 are the seed of the rounding of a step, and what each further step adds.

        Both are signed integers of 64 bits; the sum is modulo 2^64.
        """
        mixed = (self.store.seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**64
        return as_int64(mixed), as_int64(0xD1B54A32D192ED03)

    # Lookups

    def lookup(self, features: Sequence[FeatureIds], *, train: bool) -> Lookup:
        """Find the rows of all features' ids.

        Args:
            features: The ids, on the table's device.
            train: Insert ids that have no row, if they are admitted, and update the rows' metadata. Otherwise, and in
                a read-only table, nothing is changed, and an unknown id has row -1.

        Raises:
            IndexError: If a feature's member table is not in the table.
            RuntimeError: If offsets decrease or exceed the number of ids.
        """
        refuse_recording()
        for feature in features:
            if not 0 <= feature.member < len(self.members):
                raise IndexError(
                    f"table {self.name}: member table must be 0 to {len(self.members) - 1}, got {feature.member}"
                )
        return self.find(Request.of(features), train=train)

    def find(self, request: Request, *, train: bool, out: Tensor | None = None, starts: Sequence[int] = ()) -> Lookup:
        """Find the rows of a request, like :meth:`lookup`.

        A training lookup also gathers the vectors into ``out`` if possible, and returns that buffer as
        ``Lookup.gathered``.
        """
        store = self.store
        if not train or self.read_only:
            rows = store.find(request)
            return Lookup(request, rows, store.id_map.row_bound, self.generation, False, self.step)
        self.record_lookup()
        if store.gate is not None:
            store.gate.age(self.step)
        request = request.with_own_bags()
        # If before_read may change the rows, they are gathered after it.
        rows, groups, gathered = store.insert_grouped(request, None if self.before_read else out, starts)
        complete, bound = store.gate is None, store.id_map.row_bound
        if self.tracker is not None:
            self.tracker.add(request, rows, complete=complete)
        lookup = Lookup(request, rows, bound, self.generation, complete, self.step + 1, groups, gathered)
        self._catch_up(groups.count, groups.unique)
        self._unrecorded = lookup
        return lookup

    def prefetch(self, request: Request) -> None:
        """Start to read the records of a later lookup, if they are on disk; results are the same as without it."""
        self.store.stage(request)

    def catch_up(self, share: tuple[int, int] | None = None) -> None:
        """Let all rows, or a share of them as in :meth:`evicted_by`, catch up on the steps that they have missed."""
        if self.before_read is not None:
            store = self.store
            for entries in store.id_map.slices() if share is None else [store.id_map.share(*share)]:
                for rows in store.on_blocks(entries.rows).split(min(store.blocks.piece_rows, _MANY_ROWS)):
                    self._catch_up(rows.new_tensor([rows.numel()]), rows)

    def _catch_up(self, count: Tensor, rows: Tensor) -> None:
        """Let the first ``count`` (int64 ``[1]``) of distinct rows (int64 ``[n]``) catch up."""
        if self.before_read is not None:
            blocks, places = self.store.blocks.at(rows, count=count, writes=True)
            self.before_read(blocks, count, places, self.step)

    def record_lookup(self) -> None:
        """Record the last training lookup in the metadata of its rows.

        An update of the same rows does this in the same pass. For lookups without an update, this method does it; call
        it before metadata is read or rows are moved.
        """
        lookup, self._unrecorded = self._unrecorded, None
        if lookup is not None:
            groups = lookup.groups
            blocks, places = self.store.blocks.at(groups.unique, count=groups.count, writes=True)
            ops.blocks.see_rows(blocks, groups.count, places, lookup.occurrences(), lookup.step)

    def gather(self, lookup: Lookup, out: Tensor, starts: Sequence[int], winners: Tensor | None = None) -> None:
        """Write each feature's vectors.

        Args:
            lookup: A lookup in this table.
            out: float32, one buffer for all features.
            starts: For each feature, the offset of its ``[V, D]`` in ``out``.
            winners: int32, shaped like ``out``; needed for gradients of the combiner ``max``.
        """
        self.check(lookup)
        ids, members, bags, unknown, *_ = lookup.request
        if self.before_read is not None and not (lookup.train and lookup.complete):
            # Evaluation must not change rows, and ids without a row have no record that could catch up.
            records, places = copied_records(self.store, lookup)
            blocks = caught_up(self.layout, records, self.before_read, self.step)
        else:
            blocks, places = self.store.blocks.at(lookup.rows)
        ops.gather.gather_bags(
            blocks,
            self.layout.element,
            self.layout.dim,
            places,
            bags,
            [] if lookup.complete else ids,
            unknown,
            self.store.initializers,
            out,
            starts,
            winners,
        )

    # Use by another program

    def lend(self, more: int, take_back: Callable[[], None]) -> TableMemory:
        """Make room for ``more`` new ids, and hand the table's memory to a program without torch.

        Args:
            more: Upper bound on the ids that the program inserts.
            take_back: Called before the table is used again; it must wait for the program, and call :meth:`take_back`.

        Raises:
            RuntimeError: If gradients are pending, which the program could not apply, ids are counted, or records are
                on disk.
        """
        self.refuse_pending("a lookup inside jax.jit")
        if self.tracker is not None:
            raise RuntimeError(
                f"table {self.name}: a lookup inside jax.jit cannot be counted; call engine.track(None) before it, or "
                f"look up outside jit"
            )
        self.record_lookup()
        if not self.read_only:
            self.store.reserve(more)
        memory = TableMemory.of(self._store, 0 if self.read_only else more, self.generation, self._step)
        self._borrowed = take_back
        return memory

    def take_back(self) -> None:
        """End the use by another program; waits for the device."""
        self._borrowed = None
        self._store.id_map.count_again()

    # Gradients and the optimizer's step

    def add_gradients(self, lookup: Lookup, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of a training lookup to those of the next step; None for a feature without one."""
        self.check(lookup)
        part = gradient_part(
            self.name,
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

    def gradients_of(self, lookup: Lookup, gradients: Sequence[Tensor | None]) -> Gradients:
        """Check the gradients of a training lookup, and return them in the form of an update.

        Args:
            lookup: A training lookup in this table.
            gradients: For each feature, float32 ``[V, D]``: a gradient per vector, or per position with the combiner
                ``max``.
        """
        self.check(lookup)
        self.refuse_read_only("apply_gradients")
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                f"table {self.name}: apply_gradients needs a gradient for each feature; pass zeros instead of None"
            )
        return Gradients(
            checked_gradients(self.name, lookup.sources.vectors, gradients, self.layout.dim, self.device), lookup.groups
        )

    def pending_gradients(self) -> Gradients | None:
        """Return all pending gradients for one update, or None; collective if ranks share the table.

        They remain pending until :meth:`clear_gradients`.
        """
        self.fetch_gradients()
        return self.pending.gradients() if self.pending else None

    def records(self, gradients: Gradients) -> tuple[ops.update.Table, Gradients]:
        """Return the records and their gradients in the form of an update, which must follow."""
        unrecorded, layout, groups = self._unrecorded, self.layout, gradients.groups
        marks_seen = (
            unrecorded is not None
            and unrecorded.step == self.step + 1
            and unrecorded.grouped is groups
            and unrecorded.request.counts is None
        )
        if marks_seen:
            self._unrecorded = None
        blocks, places = self.store.blocks.at(groups.unique, count=groups.count, writes=True)
        if self.before_read is not None:  # another step may have been done since the lookup
            self.before_read(blocks, groups.count, places, self.step)
        table = ops.update.Table(
            blocks,
            layout.element,
            layout.state_element,
            layout.dim,
            self.step + 1,
            marks_seen,
            self.rounding_seed,
        )
        if places is groups.unique:
            return table, gradients
        return table, gradients._replace(groups=replace(groups, unique=places))

    def gradient_norm(self) -> Tensor | None:
        """Return the norm of the row gradients in the form of the anchor's ``grad``, or None if there are none.

        Collective if ranks share the table.
        """
        self.fetch_gradients()
        return self.pending.norm(self.layout.dim, self._over_ranks)

    def clip_row_gradients(self, max_norm: float) -> None:
        """Scale the summed gradient of each row down to a norm of at most ``max_norm``; collective likewise."""
        self.fetch_gradients()
        self.pending.clip_rows(self.layout.dim, max_norm)

    def clear_gradients(self) -> None:
        """Drop all pending gradients."""
        self.pending.clear()
        if (remote := self.remote) is not None:
            remote.clear()

    @property
    def remote(self) -> RemoteGradients | None:
        """Gradients still to be exchanged with other ranks; None if the table is not shared."""
        return None if self._remote is None else self._remote()

    @remote.setter
    def remote(self, remote: RemoteGradients) -> None:
        self._remote = weakref.ref(remote)

    @staticmethod
    def announce_gradients(tables: Iterable[HashTable]) -> None:
        """Tell other ranks how many gradients several tables have, before each fetches them; collective."""
        remotes = [remote for table in tables if (remote := table.remote) is not None]
        if remotes:
            remotes[0].announce(remotes)

    def fetch_gradients(self) -> None:
        """Receive the gradients of other ranks for this rank's rows; collective."""
        if (remote := self.remote) is not None:
            for lookup, part in remote.fetch():
                self.check(lookup)
                self.pending.add(part)

    def _over_ranks(self, own: Tensor) -> Tensor:
        """Return the sum of squares over the rows of all ranks, given that of this rank."""
        remote = self.remote
        return own if remote is None else remote.sum_squares(own)

    # Log of changes; all methods wait for the device

    def watch(self) -> ChangeLog:
        """Return a log of all changes from now on, for as long as it is referenced: 8 bytes per erased or inserted id.

        It holds a copy of the admission state: 16 bytes per counted id, or the blocks of a sketch that are not empty.
        """
        self.record_lookup()
        log = ChangeLog(self.step, self.admission_states())
        self.change_logs.add(log)
        return log

    def admission_columns(self) -> dict[str, Tensor]:
        """Return the columns of the admission state, without rows; empty if nothing need be saved."""
        gate = self.store.gate
        return {} if gate is None else gate.columns()

    def admission_states(self) -> list[dict[str, Tensor]]:
        """Return the admission state of each member table; an empty list if nothing need be saved."""
        gate = self.store.gate
        if gate is None or not gate.columns():
            return []
        gate.age(self.step)
        return [gate.state_dict(member) for member in range(len(self.members))]

    def watches(self, log: ChangeLog) -> bool:
        """Return whether :meth:`watch` of this table created the log."""
        return log in self.change_logs

    def changed_rows(self, log: ChangeLog) -> list[tuple[dict[str, Tensor], Tensor | None]]:
        """Return the rows that changed since :meth:`watch`; see :func:`change_log.changed_rows`."""
        self.record_lookup()
        self.catch_up()
        return changed_rows(self.store, log)

    def _log_changes(self, member: int, ids: Tensor) -> None:
        """Log that ids (int64 ``[m]``) of a member table got, changed or lost rows."""
        for log in self.change_logs:
            log.note(member, ids, len(self))

    # Bulk access to rows; all methods wait for the device

    def insert(self, member: int, ids: Tensor, columns: dict[str, Tensor] | None = None) -> Tensor:
        """Insert ids, regardless of admission.

        Args:
            member: Number of the member table.
            ids: int64 ``[n]``; distinct if there are columns.
            columns: Values of the rows, as :meth:`export` returns them. A missing column has its first value in a new
                row, and keeps its value in an existing row. Without metadata, the rows count as seen now.

        Returns:
            int64 ``[n]``: the rows.

        Raises:
            TypeError: If a column is not a tensor, or metadata are not integers.
            ValueError: If columns do not fit the rows, metadata are out of range, or ids are not int64 ``[n]``; nothing
                is changed.
        """
        self.refuse_read_only("insert")
        rows = self.load(member, ids, columns or {})
        if columns is None or META[1] not in columns:
            # As recent as after a lookup, so that the next eviction keeps them.
            self.store.mark_seen(rows, self.step)
        return rows

    def load(self, member: int, ids: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """Insert ids like :meth:`insert`, but also into a read-only table; used to load checkpoints."""
        ids = self.store.check_ids("insert", member, ids)
        self.store.check_columns(member, ids, columns)
        self.record_lookup()
        self._log_changes(member, ids)
        before = len(self)
        if self.before_read is None or not columns or META[0] in columns:
            rows = self.store.write(member, ids, columns)
        else:
            rows = self._write_present(member, ids, columns)
        if self.tracker is not None:
            self.tracker.add_loaded(member, len(self) - before)
        return rows

    def _write_present(self, member: int, ids: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """Write values of now: the rows of ids (int64 ``[n]``, distinct) have missed no step."""
        before = self.store.rows(member, ids)
        known = before[before >= 0]
        self._catch_up(known.new_tensor([known.numel()]), known)
        rows = self.store.write(member, ids, columns)
        meta = self.store.blocks.read_meta(rows)
        meta[0, before < 0] = self.step
        self.store.blocks.write_meta(rows, meta)
        return rows

    def ids(self, member: int) -> Tensor:
        """Return the ids of a member table that have a row, int64 ``[n]``, ascending."""
        return self.store.ids(member)

    def rows(self, member: int, ids: Tensor) -> Tensor:
        """Return the rows of ids (int64 ``[n]``), -1 for an id that has none; valid in this generation only."""
        return self.store.rows(member, ids)

    def export(self, member: int, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Return the records of ids.

        Args:
            member: Number of the member table.
            ids: int64 ``[n]``; None: all ids that have a row, ascending.

        Returns:
            ``ids``; every part of the record, ``[n, width]``; ``updated_step``, ``seen_step`` and ``frequency``.

        Raises:
            KeyError: If an id has no row.
        """
        self.record_lookup()
        columns = self.store.export(member, ids)
        if self.before_read is not None:
            columns = caught_up_columns(self.layout, columns, self.before_read, self.step)
        return columns

    def export_all(self) -> list[dict[str, Tensor]]:
        """Return :meth:`export` of each member table, rows ordered by (bucket, id) as in checkpoints."""
        self.record_lookup()
        self.catch_up()
        return self.store.export_all()

    def erase(self, member: int, ids: Tensor) -> int:
        """Erase ids (int64 ``[n]``) and return how many of them had a row."""
        ids = self.store.check_ids("erase", member, ids).to(self.store.map_device)
        erased = self._erase_slots("erase", self.store.id_map.slots_of([ids], [member]))
        if self.tracker is not None:
            self.tracker.add_erased(member, erased)
        self._log_changes(member, ids)
        return erased

    def evict(self, rule: EvictionRule) -> int:
        """Erase the rows that a rule selects in each member table, and return their number."""
        return self.erase_evicted(self.evicted_by(rule))

    def evicted_by(
        self,
        rule: EvictionRule | Mapping[int, EvictionRule],
        shared: SharedRows | None = None,
        *,
        share: tuple[int, int] | None = None,
        since: int | None = None,
    ) -> Entries:
        """Return the rows that a rule selects, without erasing them; collective if ranks share the table.

        Args:
            rule: A rule for all member tables, or rules by number of the member table.
            shared: Distribution of the rows over ranks; None: this process has them alone.
            share: (number, count): Select from one of ``count`` shares of the rows, and keep rows that training
                lookups have seen after the step ``since``; see ``IdMap.share``. None: select from all rows.
            since: Number of steps done on the table, as the rule gets it; None: the present one.

        Raises:
            RuntimeError: If the table is read-only, or has pending gradients.
            TypeError: If ``rule`` is not a rule, or does not return a bool tensor.
            ValueError: If that tensor does not have one element for each row.
        """
        self.refuse_read_only("evict")
        self.refuse_pending("evict")
        self.record_lookup()
        self.catch_up(share)
        step = self.step if since is None else since
        return self.store.unwanted(rule, step, self.step_times, shared or SharedRows(), share)

    def ranked(
        self, rule: EvictionRule | Mapping[int, EvictionRule], shared: SharedRows
    ) -> EvictionRule | Mapping[int, EvictionRule]:
        """Return rules that decide about each row by itself; collective if a rule ranks rows that ranks share.

        A rule that ranks all rows of the table, such as ``Capacity``, is replaced by the result of ranking them now.

        Raises:
            RuntimeError: If a rule ranks rows, but the table has pending gradients.
        """
        if not ranks_rows(rule):
            return rule
        self.refuse_pending("evict")
        self.record_lookup()
        return self.store.cutoffs(rule, self.step, self.step_times, shared)

    def erase_evicted(self, evicted: Entries) -> int:
        """Erase the rows that :meth:`evicted_by` returned; the table must not have changed since."""
        count = self._erase_slots("evict", evicted.slots)
        if self.tracker is not None:
            for member, rows in enumerate(evicted.members.bincount(minlength=len(self.members)).tolist()):
                self.tracker.add_erased(member, rows)
        if self.change_logs:
            for member in evicted.members.unique().tolist():
                self._log_changes(member, evicted.ids[evicted.members == member])
        return count

    def clear(self, member: int | None = None) -> None:
        """Remove all rows of a member table, or of all member tables, and the admission state of their ids."""
        self.refuse_read_only("clear")
        self.discard(member)

    def discard(self, member: int | None = None) -> None:
        """Remove rows like :meth:`clear`, but also from a read-only table."""
        store = self.store
        if member is not None:
            checked_member("clear", len(self.members), member)
        for log in self.change_logs:
            for number in range(len(self.members)) if member is None else [member]:
                log.note_whole(number)
        if self.tracker is not None:
            for number, rows in enumerate(store.row_counts()):
                if member in (None, number):
                    self.tracker.add_erased(number, rows)
        if member is not None:
            entries = store.id_map.entries()
            self._erase_slots("clear", entries.slots[entries.members == member], loading=True)
            if store.gate is not None:
                store.gate.clear(member)
            return
        store.reset()
        self.clear_gradients()
        self._unrecorded = None
        self.generation = next_generation()

    def compact(self) -> None:
        """Close gaps between rows and free the blocks at the end; the only operation that moves rows."""
        compaction = self.begin_compaction()
        while self.continue_compaction(compaction, None) is not None:
            pass

    def begin_compaction(self) -> Compaction:
        """Begin a compaction in parts; one that is not finished ends."""
        return self.store.begin_compaction()

    def continue_compaction(self, compaction: Compaction, rows: int | None) -> int | None:
        """Do the next part of a compaction.

        Args:
            compaction: The one that has begun.
            rows: About how many rows at once; None: all.

        Returns:
            How many rows have moved; None if the compaction is finished, or has ended because the table was cleared.

        Raises:
            RuntimeError: If there are pending gradients.
        """
        if self.store.compaction is not compaction:
            return None
        self.refuse_pending("compact")
        self.record_lookup()
        self.generation = next_generation()
        return self.store.compact(rows)

    def memory(self) -> dict[str, int]:
        """Return the bytes of each part.

        Of a table whose records are on disk, ``cache`` and ``locations`` are the memory for them, and ``disk`` are the
        bytes on disk. ``total`` is the sum of ``id_map``, ``blocks``, ``cache``, ``locations``, ``free_rows`` and
        ``admission``, without ``disk``. Pending gradients are not counted, nor up to 1 GiB of host memory that the
        process keeps for reuse after tables and batches have freed it.
        """
        return self.store.memory()

    def cache_statistics(self) -> CacheStatistics | None:
        """Return the use of the cache of ``Placement(cache_bytes=)`` since the table was created or cleared.

        None for a table without a cache. Counters are on the GPU, so this waits for it.
        """
        return self.store.blocks.cache_statistics()

    def _erase_slots(self, where: str, slots: Tensor, *, loading: bool = False) -> int:
        if not loading:
            self.refuse_read_only(where)
        self.refuse_pending(where)
        self.record_lookup()
        self.generation = next_generation()
        return self.store.erase_slots(slots)

    def refuse_read_only(self, where: str) -> None:
        """Raise RuntimeError if the table is read-only."""
        if self.read_only:
            raise RuntimeError(
                f"table {self.name}: {where} would change it, but it is read-only; "
                f"build the engine with trainable=True for its features"
            )

    def refuse_pending(self, where: str) -> None:
        """Raise RuntimeError if there are pending gradients, which erasing or moving rows would invalidate."""
        if self.pending or self.remote:
            raise RuntimeError(
                f"table {self.name}: {where} would detach pending gradients from their rows; "
                f"call the optimizer's step or zero_grad first"
            )

    def check(self, lookup: Lookup) -> None:
        """Raise RuntimeError if a lookup is from another generation."""
        if lookup.generation != self.generation:
            raise RuntimeError(
                f"table {self.name}: this lookup is from generation {lookup.generation}, but the table is in "
                f"generation {self.generation}: rows were cleared, erased or moved since, or the lookup is from "
                f"another table; look up the batch again in this table"
            )


@outside_graphs("grad")
class Anchor(nn.Parameter):
    """A parameter with one meaningless element, whose ``grad`` represents all row gradients of its table.

    ``grad`` is float64 ``[2]``, computed when it is read: the L2 norm of the row gradients, and a mark too small to
    change that norm; None if there are no gradients. Multiplying it in place multiplies the row gradients, and
    non-finite gradients make it non-finite. So ``torch.nn.utils.clip_grad_norm_`` and ``torch.amp.GradScaler`` work on
    tables as they do on dense parameters. Norms other than the L2 norm are not supported, and ``clip_grad_value_`` does
    not affect tables. Setting ``grad`` to None, as ``zero_grad`` does, drops the gradients.
    """

    table: HashTable

    def __new__(cls, table: HashTable) -> Anchor:
        """Create the anchor of a table."""
        _watch_steps()
        prepare()
        anchor = super().__new__(cls, torch.zeros(1, device=table.device), requires_grad=not table.read_only)
        anchor.table = table
        return anchor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Anchor({self.table!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Anchor:
        raise _refused_copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _refused_copy()

    @property
    def grad(self) -> Tensor | None:
        """The norm of the table's row gradients; see the class."""
        return self.table.gradient_norm()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("the gradient of an embedding table cannot be set; scale it in place, or set it to None")
        self.table.clear_gradients()


def _refused_copy() -> TypeError:
    """Return the error for copying or pickling a table; a copy would share the memory of its records."""
    return TypeError(
        "an embedding table cannot be copied or pickled; save it with Saver and load it into a new engine, or build "
        "the engine with rows_in_state_dict='record' and load the model's state_dict() into a new model; to average "
        "weights, copy only the towers, e.g. AveragedModel(model.tower)"
    )


@cache
def _watch_steps() -> None:
    """Check every optimizer before its step, because torch.optim accepts anchors as parameters."""
    register_optimizer_step_pre_hook(_refuse_step)


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if hasattr(optimizer, "update_table"):
        return
    # type() instead of isinstance(), which takes twenty times as long on a Parameter: this runs before every step.
    if not any(type(parameter) is Anchor for group in optimizer.param_groups for parameter in group["params"]):
        return
    kind = type(optimizer)
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} cannot update embedding tables, but got their parameters: pass "
        f"engine.parameters() to an optimizer of recis_hybrid.optim, and embedding.dense_parameters(model) to this one"
    )
