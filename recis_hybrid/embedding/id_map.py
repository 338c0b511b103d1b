"""IDMap: (member table, id) → row, for every 64-bit id, growing and without collisions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_hybrid import ops

MAX_LOAD = 0.75
MAX_MEMBERS = 1 << 16
MAX_ROWS = 1 << 40


class IdMap:
    """An open-addressing hash table in torch tensors, changed in place by native operators.

    Rows are numbered from 0 in order of arrival, which several threads settle among themselves: which id got which row
    is not part of any promise. The host never waits for a device to learn how full the map is: it keeps an upper bound
    (ids looked up so far, corrected by a count copied late) and grows by that.

    Args:
        device: Where the slots live.
        capacity: Slots to begin with; rounded up to a power of two.
    """

    def __init__(self, device: torch.device, capacity: int = 1024) -> None:
        self.slots = _empty_slots(_power_of_two(max(capacity, 16)), device)
        """int64 ``[S, 2]``."""
        self.counters = torch.zeros(2, dtype=torch.int64, device=device)
        """int64 ``[2]``: rows handed out, and rows whose records have first values."""
        self._late = _LateCount(self.counters)

    @property
    def device(self) -> torch.device:
        """Where the slots live."""
        return self.slots.device

    @property
    def capacity(self) -> int:
        """Slots."""
        return self.slots.size(0)

    @property
    def row_bound(self) -> int:
        """Greater than every row handed out so far; on the CPU, just the number of rows."""
        return self._late.bound

    def __len__(self) -> int:
        """Rows handed out; waits for the device."""
        return int(self.counters[0])

    def find(self, ids: Sequence[Tensor], members: Sequence[int]) -> Tensor:
        """Returns the row of each id, int64 ``[N]``, -1 for an id that has none."""
        rows = torch.empty(_total(ids), dtype=torch.int64, device=self.device)
        ops.id_map.find(self.slots, ids, members, rows)
        return rows

    def reserve(self, more: int) -> None:
        """Makes room for ``more`` further ids. If memory runs out, the map is as before."""
        needed = self.row_bound + more
        if needed > MAX_LOAD * self.capacity:
            needed = self._late.exact() + more
        if needed > MAX_ROWS:
            raise ValueError(f"a hash table has at most 2**40 rows, and {needed} were asked for")
        if needed <= MAX_LOAD * self.capacity:
            return
        grown = _empty_slots(_power_of_two(int(needed / MAX_LOAD) + 1), self.device)
        ops.id_map.rehash(self.slots, grown)
        self.slots = grown

    def find_or_insert(self, ids: Sequence[Tensor], members: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Finds each id or gives it a new row. Call :meth:`reserve` for as many ids before.

        Args:
            ids: For each feature, int64 ``[n_f]``, contiguous.
            members: For each feature, its member table's number.

        Returns:
            ``rows`` int64 ``[N]``, and ``fresh`` int64 ``[N]``: for each new row, a position that holds it.
        """
        total = _total(ids)
        rows, fresh = torch.empty(2, total, dtype=torch.int64, device=self.device).unbind()
        ops.id_map.find_or_insert(self.slots, self.counters, ids, members, rows, fresh)
        self._late.inserted(total)
        return rows, fresh

    def ids(self, member: int) -> tuple[Tensor, Tensor]:
        """Returns the ids of a member table and their rows, int64 ``[n]`` each, sorted by id; waits for the device."""
        ids, rows = torch.empty(2, len(self), dtype=torch.int64, device=self.device).unbind()
        count = torch.zeros(1, dtype=torch.int64, device=self.device)
        ops.id_map.list_ids(self.slots, member, ids, rows, count)
        n = int(count)
        ids, order = torch.sort(ids[:n])
        return ids, rows[:n][order]


class _LateCount:
    """An upper bound of a device counter that the host may read at any time.

    On CUDA the counter is copied after each insert without waiting; when the copy is found to have arrived, the bound
    becomes what it says plus what was inserted since.
    """

    def __init__(self, counters: Tensor) -> None:
        self._counters = counters
        self._counted = int(counters[0])
        self._since = 0
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        self._since_copy = 0

    @property
    def bound(self) -> int:
        if not self._counters.is_cuda:
            return int(self._counters[0])
        if self._copy is not None and self._copy[1].query():
            self._counted = int(self._copy[0][0])
            self._since = self._since_copy
            self._copy = None
        return self._counted + self._since

    def exact(self) -> int:
        self._counted = int(self._counters[0])
        self._since = 0
        self._copy = None
        return self._counted

    def inserted(self, at_most: int) -> None:
        if not self._counters.is_cuda:
            return
        self._since += at_most
        self._since_copy += at_most
        if self._copy is None:
            host = torch.empty(2, dtype=torch.int64, pin_memory=True)
            host.copy_(self._counters, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copy = (host, event)
            self._since_copy = 0


def _total(ids: Sequence[Tensor]) -> int:
    return sum(part.numel() for part in ids)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _empty_slots(capacity: int, device: torch.device) -> Tensor:
    slots = ops.memory.empty_bytes(16 * capacity, device).view(torch.int64).view(capacity, 2)
    return slots.zero_()
