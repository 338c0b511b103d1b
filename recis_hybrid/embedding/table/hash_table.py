"""HashTable: one logical table in training; and its anchor, by which autograd and optimizers know it.

Letters: n ids, N positions (ids of a call over all features), D dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from recis_hybrid import ops
from recis_hybrid.embedding.admission import Admission
from recis_hybrid.embedding.compilation import outside_graphs, prepare, refuse_recording
from recis_hybrid.embedding.eviction import Eviction
from recis_hybrid.embedding.optimizer import BeforeRead
from recis_hybrid.embedding.placement import Placement
from recis_hybrid.embedding.table.change_log import ChangeLog, changed_rows
from recis_hybrid.embedding.table.gradients import (
    PendingGradients,
    Reduced,
    RemoteGradients,
    checked_gradients,
    gradient_part,
)
from recis_hybrid.embedding.table.id_map import Entries
from recis_hybrid.embedding.table.lookup import FeatureIds, Lookup, Request, next_generation
from recis_hybrid.embedding.table.record_layout import META, MemberTable, RecordLayout
from recis_hybrid.embedding.table.row_validation import checked_member
from recis_hybrid.embedding.table.store import RowStore
from recis_hybrid.ops.gather import RowGroups
from recis_hybrid.ops.update import Gradients


@outside_graphs("reduced_gradients", "replace_gradients")
class HashTable:
    """A growing, collision-free table of records for one or more member tables.

    A :class:`RowStore` holds the rows; this class adds what training needs: lookups and their generation, gradients
    until an optimizer uses them, and the log of changes for incremental checkpoints.

    Args:
        members: The member tables; their number is their index here.
        layout: How a record lies in memory.
        device: Where IDMap and blocks live, unless ``placement`` says otherwise.
        seed: Seed of the rows' first values and of stochastic rounding.
        placement: Where IDMap and blocks live, each.
        admission: Which ids get a row; None: all that a training lookup finds.
        read_only: Refuse every change of rows, except loading them.
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
        self.store = RowStore(members, layout, device, seed, placement=placement, admission=admission)
        self.members = self.store.members
        self.layout = layout
        self.device = self.store.device
        self.read_only = read_only
        self.generation = next_generation()
        """Changed by whatever makes row numbers of earlier lookups meaningless; no two tables have the same."""
        self.step = 0
        """Steps done on this table; the optimizer counts them."""
        self.before_read: BeforeRead | None = None
        """Called in each training lookup, before values are read."""
        self.pending = PendingGradients()
        """Gradients that backward has left here."""
        self.overrides: dict[str, Any] = {}
        """Hyperparameters of the optimizer for this table alone."""
        self.built_alone = False
        """True if its engine was built without a process group, and not explicitly for one process."""
        self._unrecorded: Lookup | None = None
        # The remote and the anchor hold the table. If the table held them too, the memory of a table that is dropped
        # would wait for the garbage collector.
        self._remote: weakref.ref[RemoteGradients] | None = None
        self._anchor: weakref.ref[Anchor] | None = None
        self.change_logs: weakref.WeakSet[ChangeLog] = weakref.WeakSet()
        """Logs of changes that somebody holds."""

    def __len__(self) -> int:
        """Rows in use; waits for the device."""
        return len(self.store)

    def __repr__(self) -> str:
        dtype = str(self.layout.dtype).removeprefix("torch.")
        frozen = ", read_only=True" if self.read_only else ""
        return f"HashTable({self.name}, dim={self.layout.dim}, dtype={dtype}, rows={len(self):,}{frozen})"

    def __reduce__(self) -> Any:
        """Refuse ``copy``, ``deepcopy`` and pickling, which all come here."""
        raise _refused_copy()

    @property
    def name(self) -> str:
        """Names of the member tables, for messages."""
        return self.store.name

    @property
    def anchor(self) -> Anchor:
        """The table's place in autograd and in optimizers: the same as long as anyone holds it."""
        anchor = None if self._anchor is None else self._anchor()
        if anchor is None:
            anchor = Anchor(self)
            self._anchor = weakref.ref(anchor)
        return anchor

    @property
    def rounding_seed(self) -> int:
        """32 bits for the stochastic rounding of the next step."""
        mixed = (self.store.seed * 0x9E3779B97F4A7C15 + (self.step + 1) * 0xD1B54A32D192ED03) & (1 << 64) - 1
        return mixed >> 32

    # Lookups

    def lookup(self, features: Sequence[FeatureIds], *, train: bool) -> Lookup:
        """Find the rows of all features' ids.

        Args:
            features: The ids, on the table's device.
            train: Insert ids that have no row, as far as they are admitted, and update the rows' metadata. Otherwise,
                and in a read-only table, nothing is changed, and an unknown id has row -1.

        Raises:
            IndexError: If a feature's member table is not one of the table's.
            RuntimeError: If offsets decrease, or lie outside of the ids.
        """
        refuse_recording()
        for feature in features:
            if not 0 <= feature.member < len(self.members):
                raise IndexError(
                    f"table {self.name}: member table must be 0 to {len(self.members) - 1}, got {feature.member}"
                )
        return self.find(Request.of(features), train=train)

    def find(self, request: Request, *, train: bool, out: Tensor | None = None, starts: Sequence[int] = ()) -> Lookup:
        """Find the rows of a request, as :meth:`lookup` does.

        A training lookup also gathers the vectors into ``out`` where it can, and returns the buffer as
        ``Lookup.gathered``.
        """
        store = self.store
        if not train or self.read_only:
            rows = store.find(request)
            return Lookup(request, rows, store.id_map.row_bound, self.generation, False, self.step)
        self.record_lookup()
        request = request.with_own_bags()
        # Rows that before_read changes are gathered after it.
        rows, groups, gathered = store.insert_grouped(request, None if self.before_read else out, starts)
        complete, bound = store.gate is None, store.id_map.row_bound
        lookup = Lookup(request, rows, bound, self.generation, complete, self.step + 1, groups, gathered)
        if self.before_read is not None:
            self.before_read(store, groups, self.step)
        self._unrecorded = lookup
        return lookup

    def record_lookup(self) -> None:
        """Write the last training lookup into the metadata of its rows.

        An update of the same rows does this in the same pass. This method does it for lookups without an update, and
        must come before metadata is read or rows are moved.
        """
        lookup, self._unrecorded = self._unrecorded, None
        if lookup is not None:
            groups, handle = lookup.groups, self.store.blocks.handle
            ops.blocks.see_rows(handle, groups.count, groups.unique, lookup.occurrences(), lookup.step)

    def gather(self, lookup: Lookup, out: Tensor, starts: Sequence[int], winners: Tensor | None = None) -> None:
        """Write each feature's vectors.

        Args:
            lookup: A lookup in this table.
            out: float32, one buffer for all features.
            starts: For each feature, the offset of its ``[V, D]`` in ``out``.
            winners: int32, shaped as ``out``; needed for gradients of the combiner ``max``.
        """
        self.check(lookup)
        ids, members, bags, unknown, *_ = lookup.request
        ops.gather.gather_bags(
            self.store.blocks.handle,
            self.layout.element,
            self.layout.dim,
            lookup.rows,
            bags,
            [] if lookup.complete else ids,
            unknown,
            self.store.initializers,
            out,
            starts,
            winners,
        )

    # Gradients and the optimizer's step

    def add_gradients(self, lookup: Lookup, gradients: Sequence[Tensor | None]) -> None:
        """Keep the gradients of a training lookup for the next step; None for a feature without one."""
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
        """Return the gradients of a training lookup as an update takes them, after checking them.

        Args:
            lookup: A training lookup in this table.
            gradients: For each feature, float32 ``[V, D]``: of its vectors, or of its positions with the combiner
                ``max``.
        """
        self.check(lookup)
        self.refuse_read_only("apply_gradients")
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                f"table {self.name}: apply_gradients takes a gradient for each feature; give zeros for None"
            )
        return Gradients(
            checked_gradients(self.name, lookup.sources.vectors, gradients, self.layout.dim, self.device), lookup.groups
        )

    def pending_gradients(self) -> Gradients | None:
        """Return the gradients that backward has left, for one update, or None; collective where ranks share the table.

        They stay until :meth:`clear_gradients`.
        """
        self.fetch_gradients()
        return self.pending.gradients() if self.pending else None

    def records(self, gradients: Gradients) -> ops.update.Table:
        """Return the records as an update by these gradients takes them; the update must follow."""
        unrecorded, layout = self._unrecorded, self.layout
        marks_seen = (
            unrecorded is not None
            and unrecorded.step == self.step + 1
            and unrecorded.grouped is gradients.groups
            and unrecorded.request.counts is None
        )
        if marks_seen:
            self._unrecorded = None
        return ops.update.Table(
            self.store.blocks.handle,
            layout.element,
            layout.state_element,
            layout.dim,
            self.step + 1,
            marks_seen,
            self.rounding_seed,
        )

    def reduced_gradients(self) -> Reduced | None:
        """Return the summed gradient of each row and their norm, or None; collective where ranks share the table."""
        self.fetch_gradients()
        return self.pending.reduced(self.layout.dim, self._norm)

    def replace_gradients(self, groups: RowGroups, sums: Tensor, row_bound: int) -> None:
        """Replace the summed gradients of the rows of ``groups``; see :meth:`reduced_gradients`."""
        self.pending.replace_sums(groups, sums, row_bound, self._norm)

    def clear_gradients(self) -> None:
        """Drop all gradients that no step has used."""
        self.pending.clear()
        if (remote := self.remote) is not None:
            remote.clear()

    @property
    def remote(self) -> RemoteGradients | None:
        """Gradients still to be exchanged with other ranks; None if the table is on one rank."""
        return None if self._remote is None else self._remote()

    @remote.setter
    def remote(self, remote: RemoteGradients) -> None:
        self._remote = weakref.ref(remote)

    def fetch_gradients(self) -> None:
        """Receive the gradients that other ranks have for this rank's rows; collective."""
        if (remote := self.remote) is not None:
            for lookup, part in remote.fetch():
                self.check(lookup)
                self.pending.add(part)

    def _norm(self, own: Tensor) -> Tensor:
        """Return the norm over all ranks' rows, from that over this rank's."""
        remote = self.remote
        return own if remote is None else remote.norm(own)

    # The log of changes; all of it waits for the device

    def watch(self) -> ChangeLog:
        """Return a log of changes from now on, filled as long as it lives: 8 bytes for each id erased or inserted.

        It has a copy of the state of admission, 16 bytes an id.
        """
        self.record_lookup()
        gate = self.store.gate
        admission = {} if gate is None else {m: gate.state_dict(m) for m in range(len(self.members))}
        log = ChangeLog(self.step, admission)
        self.change_logs.add(log)
        return log

    def watches(self, log: ChangeLog) -> bool:
        """Return whether :meth:`watch` of this table returned the log."""
        return log in self.change_logs

    def changed_rows(self, log: ChangeLog) -> list[tuple[dict[str, Tensor], Tensor | None]]:
        """Return the rows that changed since :meth:`watch`; see :func:`change_log.changed_rows`."""
        self.record_lookup()
        return changed_rows(self.store, log)

    def _log_changes(self, member: int, ids: Tensor) -> None:
        """Log that ids (int64 ``[m]``) of a member table got, changed or lost rows."""
        for log in self.change_logs:
            log.note(member, ids, len(self))

    # Rows in bulk; all of it waits for the device

    def insert(self, member: int, ids: Tensor, columns: dict[str, Tensor] | None = None) -> Tensor:
        """Insert ids, regardless of admission.

        Args:
            member: Number of the member table.
            ids: int64 ``[n]``; distinct where columns are given.
            columns: Values of the rows, as :meth:`export` returns them. A column that is missing has its first value in
                a new row, and keeps its value in a row that exists. Without metadata the rows count as seen now.

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
            # As recent as if a lookup had just found them: the next eviction leaves them.
            self.store.mark_seen(rows, self.step)
        return rows

    def load(self, member: int, ids: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """Insert ids as :meth:`insert` does, also into a read-only table: how a checkpoint is loaded."""
        ids = self.store.check_ids("insert", member, ids)
        self.store.check_columns(member, ids, columns)
        self.record_lookup()
        self._log_changes(member, ids)
        return self.store.write(member, ids, columns)

    def ids(self, member: int) -> Tensor:
        """Return the ids of a member table that have a row, int64 ``[n]``, ascending."""
        return self.store.ids(member)

    def rows(self, member: int, ids: Tensor) -> Tensor:
        """Return the rows of ids (int64 ``[n]``), -1 for an id that has none; they hold for this generation."""
        return self.store.rows(member, ids)

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
        self.record_lookup()
        return self.store.export(member, ids)

    def export_all(self) -> list[dict[str, Tensor]]:
        """Return :meth:`export` of each member table, rows by (bucket, id), as checkpoints have them."""
        self.record_lookup()
        return self.store.export_all()

    def erase(self, member: int, ids: Tensor) -> int:
        """Erase ids (int64 ``[n]``) and return how many of them had a row."""
        ids = self.store.check_ids("erase", member, ids).to(self.store.map_device)
        erased = self._erase_slots("erase", self.store.id_map.slots_of([ids], [member]))
        self._log_changes(member, ids)
        return erased

    def evict(self, rule: Eviction) -> int:
        """Erase the rows that a rule names, and return how many there were."""
        return self.erase_evicted(self.evicted_by(rule))

    def evicted_by(self, rule: Eviction) -> Entries:
        """Return the rows that a rule names, without erasing them.

        Raises:
            RuntimeError: If the table is read-only, or gradients wait for its rows.
            TypeError: If it is no rule, or does not return a tensor of bool.
            ValueError: If that does not have as many elements as the table has rows.
        """
        self.refuse_read_only("evict")
        self.refuse_pending("evict")
        self.record_lookup()
        return self.store.unwanted(rule, self.step)

    def erase_evicted(self, evicted: Entries) -> int:
        """Erase the rows that :meth:`evicted_by` returned, if nothing has changed the table since."""
        count = self._erase_slots("evict", evicted.slots)
        if self.change_logs:
            for member in evicted.members.unique().tolist():
                self._log_changes(member, evicted.ids[evicted.members == member])
        return count

    def clear(self, member: int | None = None) -> None:
        """Remove every row of a member table, or of all, and the state of admission for their ids."""
        self.refuse_read_only("clear")
        self.discard(member)

    def discard(self, member: int | None = None) -> None:
        """Remove rows as :meth:`clear` does, also from a read-only table."""
        store = self.store
        if member is not None:
            checked_member("clear", len(self.members), member)
        for log in self.change_logs:
            for cleared in range(len(self.members)) if member is None else [member]:
                log.note_whole(cleared)
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
        """Move rows together and give back blocks at the end; the only thing that moves rows."""
        self.refuse_pending("compact")
        self.record_lookup()
        self.generation = next_generation()
        self.store.compact()

    def memory(self) -> dict[str, int]:
        """Return the bytes of each part: ``id_map``, ``blocks``, ``free_rows``, ``admission``, and ``total``.

        Not counted are gradients that wait for a step, and up to 1 GiB of host memory that the process keeps for reuse
        after tables and batches have given it back.
        """
        return self.store.memory()

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
                f"table {self.name}: {where} would change it, and it is read-only; "
                f"build the engine with trainable=True for its features"
            )

    def refuse_pending(self, where: str) -> None:
        """Raise RuntimeError if gradients wait for rows that would be erased or moved."""
        if self.pending or self.remote:
            raise RuntimeError(
                f"table {self.name}: {where} would separate gradients that wait here from their rows; "
                f"call the optimizer's step or zero_grad first"
            )

    def check(self, lookup: Lookup) -> None:
        """Raise RuntimeError for a lookup of another generation."""
        if lookup.generation != self.generation:
            raise RuntimeError(
                f"table {self.name}: this lookup is of generation {lookup.generation} and the table is in generation "
                f"{self.generation}: rows were cleared, erased or moved since, or it was made by another table; look "
                f"the batch up again, in this one"
            )


@outside_graphs("grad")
class Anchor(nn.Parameter):
    """A parameter of one meaningless element, whose ``grad`` stands for all row gradients of its table.

    ``grad`` is their L2 norm (and in a second element, too small to count, a mark), float64 ``[2]``, computed when it
    is read; None if there are none. Whatever multiplies it in place multiplies the row gradients, and non-finite
    gradients make it non-finite: so ``torch.nn.utils.clip_grad_norm_`` and ``torch.amp.GradScaler`` work on tables as
    on dense parameters. Norms other than the L2 norm are not supported, and ``clip_grad_value_`` leaves tables alone.
    Setting it to None, as ``zero_grad`` does, drops the gradients.
    """

    table: HashTable

    def __new__(cls, table: HashTable) -> Anchor:
        """Make the anchor of a table."""
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
        reduced = self.table.reduced_gradients()
        return None if reduced is None else reduced.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("the gradient of an embedding table cannot be set; scale it in place, or set it to None")
        self.table.clear_gradients()


def _refused_copy() -> TypeError:
    """Return the error for copying or pickling a table: records lie at addresses that a copy would share."""
    return TypeError(
        "an embedding table cannot be copied or pickled; save it with Saver and load it into a new engine, or build "
        "the engine with rows_in_state_dict='record', take the model's state_dict() and load it into a new one; to "
        "average weights, copy the towers alone, as AveragedModel(model.tower)"
    )


@cache
def _watch_steps() -> None:
    """Check every optimizer before its step: torch.optim accepts an anchor as any other parameter."""
    register_optimizer_step_pre_hook(_refuse_step)


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if hasattr(optimizer, "update_table"):
        return
    # By type: isinstance of a Parameter takes twenty times as long, and this comes before every step.
    if not any(type(parameter) is Anchor for group in optimizer.param_groups for parameter in group["params"]):
        return
    kind = type(optimizer)
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} cannot update embedding tables, and was given their parameters: give "
        f"engine.parameters() to an optimizer of recis_hybrid.optim, and embedding.dense_parameters(model) to this one"
    )
