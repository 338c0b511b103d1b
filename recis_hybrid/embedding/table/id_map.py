"""IDMap: a growing, collision-free map from (member table, 64-bit id) to row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import is_accelerator, record_event

MAX_LOAD = 0.75
_TAG_BITS = 6  # of an entry, below the row; see csrc/core/table.h
MAX_MEMBERS = 1 << 16
MAX_ROWS = 1 << 40
_FIRST_SLOTS = 1024


class Entries(NamedTuple):
    """All ids of a map, in no particular order; int64 ``[n]`` each."""

    ids: Tensor
    members: Tensor
    """Numbers of the member tables."""
    rows: Tensor
    slots: Tensor
    """Numbers of the slots."""


class IdMap:
    """An open-addressing hash table in torch tensors, changed in place by native operators.

    The assignment of rows to ids depends on thread timing and is not deterministic; rows of erased ids are reused. The
    host never waits for a device to learn how full the map is. It grows the map based on an upper bound: the number of
    ids looked up so far, corrected by a count that is copied asynchronously.

    Args:
        device: Device of the slots.
        capacity: Initial number of slots; rounded up to a power of two.
    """

    def __init__(self, device: torch.device, capacity: int = _FIRST_SLOTS) -> None:
        self.slots = _empty_slots(_power_of_two(max(capacity, 16)), device)
        """int64 ``[S, 2]``."""
        # A tensor created in inference mode cannot be written outside of it.
        with torch.inference_mode(False):
            self.counters = torch.zeros(ops.id_map.COUNTERS, dtype=torch.int64, device=device)
        """int64 ``[6]``, indexed by the constants of ``ops.id_map``."""
        self.free_rows = torch.empty(0, dtype=torch.int64, device=device)
        """int64: rows of erased ids; the counters hold their number."""
        self._bounds = CounterBounds(self.counters)

    @property
    def device(self) -> torch.device:
        """Device of the slots."""
        return self.slots.device

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.slots.size(0)

    @property
    def row_bound(self) -> int:
        """Greater than every row assigned so far; on the CPU, exactly the number of rows ever created."""
        return self._bounds.bound(ops.id_map.ROWS)

    def row_bound_after_inserts(self) -> int:
        """Like ``row_bound``, but the number of rows itself if all are committed; waits for the inserts only."""
        return self._bounds.bound_after_inserts(ops.id_map.ROWS)

    @property
    def may_have_fresh(self) -> bool:
        """True if :meth:`find_or_insert` may have assigned new rows; exact on the CPU."""
        return self._bounds.bound(ops.id_map.FRESH) > 0

    @property
    def nbytes(self) -> int:
        """Bytes of slots and counters."""
        return self.slots.nbytes + self.counters.nbytes

    def __len__(self) -> int:
        """Return the number of ids that have a row; waits for the device."""
        return int(self.counters[ops.id_map.LIVE])

    def find(self, ids: Sequence[Tensor], members: Sequence[int], used: Sequence[Tensor] = ()) -> Tensor:
        """Return the row of each id, int64 ``[N]``, -1 for an id that has none; ``used`` as in ``ops.id_map.find``."""
        rows = torch.empty(_total(ids), dtype=torch.int64, device=self.device)
        ops.id_map.find(self.slots, ids, members, rows, used=used)
        return rows

    def reserve(self, more: int) -> None:
        """Make room for ``more`` additional ids. If memory runs out, nothing changes."""
        if self._bounds.bound(ops.id_map.USED_SLOTS) + more <= MAX_LOAD * self.capacity:
            return
        if self._bounds.bound_after_inserts(ops.id_map.USED_SLOTS) + more <= MAX_LOAD * self.capacity:
            return
        exact = self._bounds.exact()
        if exact[ops.id_map.LIVE] + more > MAX_ROWS:
            raise ValueError(f"a hash table has at most 2**40 rows, but {exact[ops.id_map.LIVE] + more} are needed")
        if exact[ops.id_map.USED_SLOTS] + more > MAX_LOAD * self.capacity:
            # Erased ids are dropped, so the number of slots may stay the same. Leave room to spare: otherwise,
            # alternating inserts and erases would rehash at every step.
            self.rehash(min((exact[ops.id_map.LIVE] + more) * 5 // 4, MAX_ROWS))

    def rehash(self, ids: int) -> None:
        """Rebuild the slots with room for ``ids`` ids."""
        slots = _empty_slots(_power_of_two(_slots_for(ids)), self.device)
        ops.id_map.rehash(self.slots, slots)
        self.slots = slots
        self.counters[ops.id_map.USED_SLOTS] = self.counters[ops.id_map.LIVE]
        self._bounds.exact()

    def find_or_insert(
        self,
        ids: Sequence[Tensor],
        members: Sequence[int],
        admitted: Tensor | None = None,
        used: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        """Find the row of each id, or insert it. Call :meth:`reserve` for the ids before, and :meth:`commit` after.

        Args:
            ids: For each feature, int64 ``[n_f]``, contiguous.
            members: For each feature, its member table's number.
            admitted: uint8 ``[N]``: 0 for ids that must not be inserted and get row -1; None: insert all.
            used: As in ``ops.id_map.find``.

        Returns:
            ``rows`` int64 ``[N]``, and ``fresh`` int64 ``[N]``: for each new row, a position in ``rows`` with it.
        """
        total = _total(ids)
        rows, fresh = torch.empty(2, total, dtype=torch.int64, device=self.device).unbind()
        self.count_inserts(total)
        ops.id_map.find_or_insert(
            self.slots, self.counters, self.free_rows, admitted, ids, members, rows, fresh, used=used
        )
        self.copy_counters()
        return rows, fresh

    def count_inserts(self, at_most: int) -> None:
        """Count ids that an operator may insert; before the operator, so that the bounds hold even if it raises."""
        self._bounds.count_inserts(at_most)

    def copy_counters(self) -> None:
        """Start to copy the counters to the host after an operator that may have inserted ids; does not wait."""
        self._bounds.copy()

    def count_again(self) -> None:
        """Read the counters after another program may have inserted ids; waits for the device."""
        self._bounds.exact()

    def commit(self) -> None:
        """Complete a :meth:`find_or_insert` after its new rows have got their first values."""
        ops.id_map.commit(self.counters)

    def withdraw(self, ids: Sequence[Tensor], members: Sequence[int], fresh: Tensor) -> None:
        """Undo a :meth:`find_or_insert` that was not committed; waits for the device."""
        count = self._bounds.exact()[ops.id_map.FRESH]
        slots = self.slots_of(ids, members)[fresh[:count]]
        self.commit()
        self.erase_slots(slots)

    def entries(self) -> Entries:
        """Return all ids; waits for the device."""
        return list_entries(self.slots, len(self))

    @property
    def load(self) -> float:
        """Share of the slots that are in use or erased; waits for the device."""
        return int(self.counters[ops.id_map.USED_SLOTS]) / self.capacity

    def slices(self, slots: int = 1 << 20) -> Iterator[Entries]:
        """Yield the ids of ``slots`` slots at a time; waits for the device. Numbers of slots start at 0 in each."""
        for part in self.slots.split(slots):
            entries = Entries(*torch.empty(4, part.size(0), dtype=torch.int64, device=self.device).unbind())
            count = torch.zeros(1, dtype=torch.int64, device=self.device)
            ops.id_map.list_ids(part, entries.ids, entries.members, entries.rows, entries.slots, count)
            yield Entries(*(values[: int(count)] for values in entries))

    def erase_slots(self, slots: Tensor) -> None:
        """Erase the ids in slots (int64 ``[n]``, negative: none); their rows are reused."""
        rows = self._bounds.exact()[ops.id_map.ROWS]
        if self.free_rows.numel() < rows:
            free_rows = torch.empty(_power_of_two(rows), dtype=torch.int64, device=self.device)
            free_rows[: self.free_rows.numel()] = self.free_rows
            self.free_rows = free_rows
        ops.id_map.erase(self.slots, slots, self.counters, self.free_rows)
        self._bounds.exact()

    def slots_of(self, ids: Sequence[Tensor], members: Sequence[int]) -> Tensor:
        """Return the slot number of each id, int64 ``[N]``, -1 for an id that has none."""
        slots = torch.empty(_total(ids), dtype=torch.int64, device=self.device)
        ops.id_map.find(self.slots, ids, members, slots, numbers=True)
        return slots

    def rows_in(self, slots: Tensor) -> Tensor:
        """Return the rows of the ids in slots (int64 ``[n]``, negative: none), int64 ``[n]``, negative for none."""
        entries = self.slots[slots.clamp(min=0), 1]
        rows = entries >> _TAG_BITS & MAX_ROWS - 1
        return torch.where(slots < 0, slots, rows)

    def move(self, moved: Tensor, rows: int) -> None:
        """Move each id from its row to ``moved[row]`` (int64), all below ``rows``; no row is free afterwards."""
        ops.id_map.move(self.slots, moved)
        self.counters[ops.id_map.ROWS] = rows
        self.counters[ops.id_map.FREE] = 0
        self.free_rows = self.free_rows[:0].clone()
        self._bounds.exact()


class IdCounts(IdMap):
    """A map whose entries hold counts instead of rows: exact counters of ids."""

    def count(self, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor, used: Sequence[Tensor] = ()) -> None:
        """Count each id whose row (int64 ``[N]``) is negative."""
        self.reserve(rows.numel())
        self.count_inserts(rows.numel())
        ops.id_map.count(self.slots, self.counters, ids, members, rows, used=used)
        self.copy_counters()

    def set(self, ids: Tensor, member: int, counts: Tensor) -> None:
        """Set the counts (int64 ``[n]``) of distinct ids (int64 ``[n]``)."""
        if ids.numel() > 0:
            self.reserve(ids.numel())
            self.find_or_insert([ids], [member])
            self.commit()
            ops.id_map.set_rows(self.slots, self.slots_of([ids], [member]), counts)

    def erase_slots(self, slots: Tensor) -> None:
        """Erase the ids in slots (int64 ``[n]``, negative: none), without waiting for the device."""
        ops.id_map.erase(self.slots, slots, self.counters, None)


def list_entries(slots: Tensor, live: int) -> Entries:
    """Return the ``live`` ids of slots (int64 ``[S, 2]``)."""
    entries = Entries(*torch.empty(4, live, dtype=torch.int64, device=slots.device).unbind())
    count = torch.zeros(1, dtype=torch.int64, device=slots.device)
    ops.id_map.list_ids(slots, entries.ids, entries.members, entries.rows, entries.slots, count)
    return entries


def bytes_for(ids: int, more: int) -> int:
    """Return the bytes of a map to which training lookups of ``more`` ids each have added ``ids`` ids."""
    slots, used = _FIRST_SLOTS, 0
    while used <= ids:
        if used + more > MAX_LOAD * slots:
            slots = _power_of_two(_slots_for(min((used + more) * 5 // 4, MAX_ROWS)))
        # The number of ids in use beyond which a lookup makes the map grow again.
        used = max(int(MAX_LOAD * slots) - more + 1, used + 1)
    return 16 * slots + 8 * ops.id_map.COUNTERS


class CounterBounds:
    """Upper bounds of device counters that the host can read at any time.

    On CUDA, the counters are copied asynchronously after each insert. When a copy has arrived, the bound becomes the
    copied count plus the number of ids inserted since.
    """

    def __init__(self, counters: Tensor) -> None:
        self._counters = counters
        self._view = None if is_accelerator(counters) else counters.numpy()
        self._counted = counters.tolist()
        self._inserted = 0
        self._copied = 0
        """``_inserted`` when the last copy was started."""
        self._counted_at = 0
        """``_inserted`` when ``_counted`` was copied, less the rows that were not committed then."""
        self._copies: deque[tuple[Tensor, torch.Event, int]] = deque()

    def bound(self, counter: int) -> int:
        """Return an upper bound of a counter without waiting; on the CPU, the counter itself."""
        if self._view is not None:
            return int(self._view[counter])
        while self._copies and self._copies[0][1].query():
            self._take_copy()
        return int(self._counted[counter]) + self._inserted - self._counted_at

    def bound_after_inserts(self, counter: int) -> int:
        """Return an upper bound of a counter after waiting for the inserts, but not for what was queued after them.

        It is the counter itself if all inserts have committed their rows.
        """
        if self._copied < self._inserted:  # an insert has failed
            self.exact()
        elif self._copies:
            self._copies[-1][1].synchronize()
        return self.bound(counter)

    def exact(self) -> list[int]:
        """Return the counters; waits for the device."""
        self._counted = _checked(self._counters)
        self._counted_at = self._copied = self._inserted
        self._copies.clear()
        return [int(count) for count in self._counted]

    def count_inserts(self, at_most: int) -> None:
        """Count ids that a call may insert; before the call, so that the bound holds even if it raises."""
        self._inserted += at_most

    def copy(self) -> None:
        """Start copying the counters."""
        self._copied = self._inserted
        if self._view is None:
            host = torch.empty(ops.id_map.COUNTERS, dtype=torch.int64, pin_memory=True)
            host.copy_(self._counters, non_blocking=True)
            self._copies.append((host, record_event(self._counters.device), self._inserted))

    def _take_copy(self) -> None:
        host, _, inserted = self._copies.popleft()
        self._counted = _checked(host)
        # The copied count does not include rows that were assigned but not yet committed at that time.
        self._counted_at = inserted - int(self._counted[ops.id_map.FRESH])


def _checked(counters: Tensor) -> list[int]:
    counted: list[int] = counters.tolist()
    if counted[ops.id_map.OVERFLOW]:
        raise RuntimeError("IdMap: an insert found no free slot, and its ids have no row; reserve slots before inserts")
    return counted


def _total(ids: Sequence[Tensor]) -> int:
    return sum(part.numel() for part in ids)


def _slots_for(ids: int) -> int:
    """Return the least number of slots for a number of ids."""
    return max(int(ids / MAX_LOAD) + 1, 16)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _empty_slots(capacity: int, device: torch.device) -> Tensor:
    slots = ops.memory.empty_bytes(16 * capacity, device).view(torch.int64).view(capacity, 2)
    return slots.zero_()
