"""IDMap: a growing, collision-free map from (member table, 64-bit id) to row."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import is_accelerator, record_event
from recis_hybrid.embedding.table import slots as slots_module
from recis_hybrid.embedding.table.slots import Slots
from recis_hybrid.ops.id_map import LINE_SLOTS

MAX_LOAD = 0.75
"""Share of the slots in use above which a small map is copied into a larger one."""
GROW_LOAD = 0.61
"""Share of the slots in use above which a map of whole chunks begins to grow in place."""
GROWTH = 1.2
"""Factor by which such a map grows. Its old part reaches a load of at most ``GROW_LOAD * GROWTH``."""
MAX_MEMBERS = 1 << 16
ROW_BITS = 40
MAX_ROWS = 1 << ROW_BITS
_FIRST_SLOTS = 1024
_PLACE_BITS = 32
"""Bits of ``ops.id_map.place_of``."""


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
        capacity: Initial number of slots; rounded up to a power of two, or to whole chunks.
    """

    def __init__(self, device: torch.device, capacity: int = _FIRST_SLOTS) -> None:
        self.slots = Slots(_lines_of(max(capacity, 16)), device)
        self._uncounted = 0
        """Ids that may still be inserted before the slots must have moved all lines."""
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
        return len(self.slots)

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
        """Bytes of slots, their header and counters."""
        return self.slots.nbytes + self.counters.nbytes

    def __len__(self) -> int:
        """Return the number of ids that have a row; waits for the device."""
        return int(self.counters[ops.id_map.LIVE])

    def find(self, ids: Sequence[Tensor], members: Sequence[int], used: Sequence[Tensor] = ()) -> Tensor:
        """Return the row of each id, int64 ``[N]``, -1 for an id that has none; ``used`` as in ``ops.id_map.find``."""
        rows = torch.empty(_total(ids), dtype=torch.int64, device=self.device)
        ops.id_map.find(self.slots.header, ids, members, rows, used=used)
        return rows

    def reserve(self, more: int) -> None:
        """Make room for ``more`` additional ids. If memory runs out, nothing changes.

        A map of whole chunks grows in place: it moves a part of its lines, in proportion to ``more``.
        """
        rest = self._move(more) if self.slots.work_to_do else more
        while not self.slots.work_to_do and not self._has_room(more):
            exact = self._bounds.exact()
            live = exact[ops.id_map.LIVE]
            if live + more > MAX_ROWS:
                raise ValueError(f"a hash table has at most 2**40 rows, but {live + more} are needed")
            if self._room(exact[ops.id_map.USED_SLOTS], more):
                return
            if self.slots.can_grow:
                self._grow(live, more)
                rest = self._move(rest)
            else:
                # Erased ids are dropped, so the number of slots may stay the same. Leave room to spare: otherwise,
                # alternating inserts and erases would rehash at every step.
                self.rehash(min((live + more) * 5 // 4, MAX_ROWS))

    def slots_within(self, more: int) -> int:
        """Return how many slots may be in use before :meth:`reserve` is called again, after it was called for ``more``.

        While lines are being moved, ``more`` ids may be inserted: others would fill the lines that wait faster than
        they are moved. Waits for the device in this case.
        """
        if self.slots.work_to_do:
            return self._bounds.exact()[ops.id_map.USED_SLOTS] + more
        return int((GROW_LOAD if self.slots.can_grow else MAX_LOAD) * self.capacity)

    def _has_room(self, more: int) -> bool:
        used = ops.id_map.USED_SLOTS
        return self._room(self._bounds.bound(used), more) or self._room(self._bounds.bound_after_inserts(used), more)

    def _room(self, used: int, more: int) -> bool:
        """Return whether ``more`` ids may be inserted beside ``used`` slots without growth."""
        return used + more <= (GROW_LOAD if self.slots.can_grow else MAX_LOAD) * self.capacity

    def _grow(self, live: int, more: int) -> None:
        """Start to grow, or to drop erased slots if that suffices."""
        room = GROW_LOAD * self.capacity
        if live + more > room / GROWTH:
            needed = int((live + more) / (GROW_LOAD * LINE_SLOTS)) + 1
            self.slots.start_moving(max(needed, int(self.slots.lines * GROWTH)))
        else:
            self.slots.start_moving(self.slots.lines)
        self._uncounted = max(int(room * (GROWTH - 1)), 1)

    def _move(self, more: int) -> int:
        """Move lines in proportion to ``more`` ids, and return the number of ids after which all were moved."""
        left = self.slots.work_to_do
        counted = min(more, self._uncounted)
        moved_all = self.slots.move(-(-left * counted // self._uncounted), self.counters)
        self._uncounted -= counted
        if not moved_all:
            self._copy_slots(Slots(self.slots.lines, self.device))
        return more - counted

    def rehash(self, ids: int) -> None:
        """Rebuild the slots with room for ``ids`` ids."""
        self._copy_slots(Slots(_lines_for(ids), self.device))

    def _copy_slots(self, slots: Slots) -> None:
        ops.id_map.rehash(self.slots.header, len(self.slots), slots.header)
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
            self.slots.header, self.counters, self.free_rows, admitted, ids, members, rows, fresh, used=used
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
        return list_entries(self.slots.header, len(self.slots), len(self))

    def marked(self, marks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids whose rows are marked (uint8 ``[R]``), and their member tables; waits for the device."""
        ids, members = torch.empty(2, len(self), dtype=torch.int64, device=self.device).unbind()
        count = torch.zeros(1, dtype=torch.int64, device=self.device)
        ops.id_map.list_marked(self.slots.header, len(self.slots), marks, ids, members, count)
        return ids[: int(count)], members[: int(count)]

    @property
    def load(self) -> float:
        """Share of the slots that are in use or erased; waits for the device."""
        return int(self.counters[ops.id_map.USED_SLOTS]) / self.capacity

    def slices(self, slots: int = 1 << 20) -> Iterator[Entries]:
        """Yield the ids of ``slots`` slots at a time; waits for the device."""
        step = -(-slots // LINE_SLOTS)
        for first in range(0, self.slots.lines, step):
            end = min(first + step, self.slots.lines)
            numbers = torch.arange(LINE_SLOTS * first, LINE_SLOTS * end, device=self.device)
            yield _entries_of(self.slots.read(first, end).view(-1, 2), numbers)

    def share(self, number: int, count: int) -> Entries:
        """Return one of ``count`` shares of the ids, about equal in size; waits for the device.

        The share of an id depends only on the id, its member table and ``count``, so all shares together contain each
        id once, however the map changes in between.
        """
        if count == 1:
            return self.entries()
        first, end = (-(-(k << _PLACE_BITS) // count) for k in (number, number + 1))
        if first == end:
            return Entries(*torch.empty(4, 0, dtype=torch.int64, device=self.device).unbind())
        shift = 64 - _PLACE_BITS
        found = _entries_of(*self.slots.find_range(first << shift, end << shift))
        places = ops.id_map.place_of(found.ids, found.members)
        at = ((places >= first) & (places < end)).nonzero().view(-1)
        return Entries(*(values[at] for values in found))

    def erase_slots(self, slots: Tensor) -> None:
        """Erase the ids in slots (int64 ``[n]``, negative: none); their rows are reused."""
        exact = self._bounds.exact()
        rows, free = exact[ops.id_map.ROWS], exact[ops.id_map.FREE]
        if self.free_rows.numel() < rows:
            free_rows = torch.empty(_power_of_two(rows), dtype=torch.int64, device=self.device)
            free_rows[:free] = self.free_rows[:free]
            self.free_rows = free_rows
        ops.id_map.erase(self.slots.header, slots, self.counters, self.free_rows)
        self._bounds.exact()

    def slots_of(self, ids: Sequence[Tensor], members: Sequence[int]) -> Tensor:
        """Return the slot number of each id, int64 ``[N]``, -1 for an id that has none."""
        slots = torch.empty(_total(ids), dtype=torch.int64, device=self.device)
        ops.id_map.find(self.slots.header, ids, members, slots, numbers=True)
        return slots

    def rows_in(self, slots: Tensor) -> Tensor:
        """Return the rows of the ids in slots (int64 ``[n]``, negative: none), int64 ``[n]``, negative for none."""
        _, _, rows = ops.id_map.decode(self.slots.entries_at(slots.clamp(min=0)))
        return torch.where(slots < 0, slots, rows)

    # The free rows; all methods wait for the device

    def row_count(self) -> int:
        """Return the number of rows, in use or not: those before ``row_bound`` that have been created."""
        return self._bounds.exact()[ops.id_map.ROWS]

    def free_count(self) -> int:
        """Return the number of free rows, which inserts use from the last one on before they create rows."""
        return self._bounds.exact()[ops.id_map.FREE]

    def last_free(self, count: int) -> Tensor:
        """Return the last ``count`` free rows, int64 ``[count]``."""
        free = self.free_count()
        return self.free_rows[free - count : free].clone()

    def take_free(self, count: int) -> Tensor:
        """Return the last ``count`` free rows, int64 ``[count]``, which are then no longer in the list."""
        rows = self.last_free(count)
        self.counters[ops.id_map.FREE] -= count
        self._bounds.exact()
        return rows

    def add_free(self, rows: Tensor) -> None:
        """Append rows (int64 ``[n]``) to the free ones."""
        free = self.free_count()
        self.free_rows[free : free + rows.numel()] = rows
        self.counters[ops.id_map.FREE] += rows.numel()
        self._bounds.exact()

    def truncate(self, rows: int) -> None:
        """Forget the rows from ``rows`` on, none of which may be in use or in the list of free rows."""
        self.counters[ops.id_map.ROWS] = rows
        self.free_rows = self.free_rows[: self.free_count()].clone()


class IdCounts(IdMap):
    """A map whose entries hold counts instead of rows: exact counters of ids."""

    def count(
        self,
        ids: Sequence[Tensor],
        members: Sequence[int],
        rows: Tensor,
        used: Sequence[Tensor] = (),
        counts: Tensor | None = None,
    ) -> None:
        """Count each id whose row (int64 ``[N]``) is negative; ``counts`` as in ``ops.id_map.count``."""
        self.reserve(rows.numel())
        self.count_inserts(rows.numel())
        ops.id_map.count(self.slots.header, self.counters, ids, members, rows, used=used, counts=counts)
        self.copy_counters()

    def halve(self, times: int) -> None:
        """Halve the counts ``times`` times, rounding down, drop those that become 0, and free their memory.

        Waits for the device.
        """
        for entries in self.slices():
            counts = entries.rows >> min(times, ROW_BITS)
            kept = counts > 0
            ops.id_map.set_rows(self.slots.header, entries.slots[kept], counts[kept])
            self.erase_slots(entries.slots[~kept])
        if len(self) < self._bounds.exact()[ops.id_map.USED_SLOTS]:
            self.rehash(len(self) * 5 // 4)

    def set(self, ids: Tensor, member: int, counts: Tensor) -> None:
        """Set the counts (int64 ``[n]``) of distinct ids (int64 ``[n]``)."""
        if ids.numel() > 0:
            self.reserve(ids.numel())
            self.find_or_insert([ids], [member])
            self.commit()
            ops.id_map.set_rows(self.slots.header, self.slots_of([ids], [member]), counts)

    def erase_slots(self, slots: Tensor) -> None:
        """Erase the ids in slots (int64 ``[n]``, negative: none), without waiting for the device."""
        ops.id_map.erase(self.slots.header, slots, self.counters, None)


def _entries_of(slots: Tensor, numbers: Tensor) -> Entries:
    """Return the ids in slots (int64 ``[n, 2]``) with some numbers (int64 ``[n]``)."""
    ids, entries = slots.unbind(1)
    states, members, rows = ops.id_map.decode(entries)
    at = (states == ops.id_map.FULL).nonzero().view(-1)
    return Entries(ids[at], members[at], rows[at], numbers[at])


def list_entries(header: Tensor, slots: int, live: int) -> Entries:
    """Return the ``live`` ids in the slots of a header."""
    entries = Entries(*torch.empty(4, live, dtype=torch.int64, device=header.device).unbind())
    count = torch.zeros(1, dtype=torch.int64, device=header.device)
    ops.id_map.list_ids(header, slots, entries.ids, entries.members, entries.rows, entries.slots, count)
    return entries


def bytes_for(ids: int, more: int) -> int:
    """Return the bytes of a map to which training lookups of ``more`` ids each have added ``ids`` ids."""
    lines, used = _FIRST_SLOTS // LINE_SLOTS, 0
    while used <= ids:
        grows = lines >= slots_module.CHUNK_LINES
        load = GROW_LOAD if grows else MAX_LOAD
        if used + more > load * LINE_SLOTS * lines:
            needed = int((used + more) / (GROW_LOAD * LINE_SLOTS)) + 1
            lines = max(needed, int(lines * GROWTH)) if grows else _lines_for(min((used + more) * 5 // 4, MAX_ROWS))
            if lines > slots_module.CHUNK_LINES:
                lines = -(-lines // slots_module.CHUNK_LINES) * slots_module.CHUNK_LINES
        # The number of ids in use beyond which a lookup makes the map grow again.
        load = GROW_LOAD if lines >= slots_module.CHUNK_LINES else MAX_LOAD
        used = max(int(load * LINE_SLOTS * lines) - more + 1, used + 1)
    chunks = max(1, lines // slots_module.CHUNK_LINES)
    return 16 * LINE_SLOTS * lines + 8 * (ops.id_map.HEADER_WORDS + chunks + ops.id_map.COUNTERS)


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


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _lines_of(slots: int) -> int:
    """Return the number of lines for at least some slots: a power of two, or more than a chunk."""
    lines = -(-slots // LINE_SLOTS)
    return lines if lines > slots_module.CHUNK_LINES else _power_of_two(lines)


def _lines_for(ids: int) -> int:
    """Return the number of lines for ids, within the load at which maps of that size grow."""
    lines = _lines_of(max(int(ids / MAX_LOAD) + 1, 16))
    if lines < slots_module.CHUNK_LINES:
        return lines
    return max(slots_module.CHUNK_LINES, _lines_of(int(ids / GROW_LOAD) + 1))
