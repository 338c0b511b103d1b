"""Admission: which ids get a row.

A policy is what a user writes into a config; a gate is its state within one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.table.id_map import MAX_ROWS, IdCounts
from recis_hybrid.validation import check_integer


class Gate(Protocol):
    """What a policy keeps for one table, and how it decides."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    def admitted(
        self, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor, used: Sequence[Tensor] = ()
    ) -> Tensor:
        """Note a training lookup and decides about it.

        Args:
            ids: For each feature, int64 ``[n_f]``.
            members: For each feature, its member table's number.
            rows: int64 ``[N]``: the ids' rows, -1 for an id that has none.
            used: As in ``ops.id_map.find``.

        Returns:
            uint8 ``[N]``: 1 where an id has a row or is to get one.
        """

    def confirm(self) -> None:
        """Note that the ids which the last :meth:`admitted` let in have rows now; not called if inserting failed."""

    def forget(self, member: int, ids: Tensor) -> None:
        """Forgets what it knows of ids (int64 ``[n]``): they were given rows without asking."""

    def clear(self, member: int | None) -> None:
        """Forgets what it knows of the ids of a member table, or of all."""

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return what it knows of a member table: ``ids`` int64 ``[n]``, and further columns ``[n]``."""

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave."""


class Admission(Protocol):
    """A rule that says which ids get a row; hashable, so that tables with equal rules can be one."""

    def gate(self, device: torch.device) -> Gate:
        """Return a gate without a past."""


@dataclass(frozen=True)
class MinFrequency:
    """An id gets a row once it was looked up ``count`` times in training.

    The lookup in which an id reaches the count is the first to find it. Counts are exact; ids that have a row need none
    and hold none. Until then an id counts with its first value, or as zeros, as the config's ``unknown`` says, and its
    gradients go nowhere.

    An id that never gets there keeps its count, 21 to 53 bytes. Eviction gives up rows and leaves counts alone, for it
    is not noted when an id was last counted. ``memory()["admission"]`` says what counts hold, and
    ``table.store.gate.clear(None)`` forgets all of a table's and gives their memory back: its ids are counted anew.

    Example:
        >>> config = EmbeddingConfig(dim=2, admission=MinFrequency(3), unknown="zeros")
    """

    count: int
    """Lookups, at least 1; an id that occurs twice in a batch is looked up twice."""

    def __post_init__(self) -> None:
        check_integer("MinFrequency", "count", self.count, low=1)
        if self.count >= MAX_ROWS:
            raise ValueError(f"MinFrequency: count must be below 2**40, where counts end, got {self.count}")

    def gate(self, device: torch.device) -> Gate:
        """Return a gate that has counted nothing."""
        return FrequencyGate(self.count, device)


class FrequencyGate:
    """Exact counts of the ids that have no row: forgotten when they get one."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._least = count
        self._counts = IdCounts(device)
        self._let_in: Tensor | None = None
        """Slots of the counts of those who were admitted last, and have no row yet; below 0: none."""

    @property
    def nbytes(self) -> int:
        """Bytes of the counts."""
        return self._counts.nbytes

    def admitted(
        self, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor, used: Sequence[Tensor] = ()
    ) -> Tensor:
        """Count the ids that have no row, and admits those that have been counted often enough."""
        counts = self._counts
        counts.count(ids, members, rows, used)
        admitted = torch.empty(rows.numel(), dtype=torch.uint8, device=rows.device)
        ops.id_map.admit(counts.slots, ids, members, rows, self._least, admitted, used=used)
        # Whoever gets a row needs no count, but until it has the row, nothing else says how often it was met.
        self._let_in = torch.where((admitted == 1) & (rows < 0), counts.slots_of(ids, members), -1)
        return admitted

    def confirm(self) -> None:
        """Drop the counts of the ids that were admitted last."""
        if self._let_in is not None:
            self._counts.erase_slots(self._let_in)
            self._let_in = None

    def forget(self, member: int, ids: Tensor) -> None:
        """Forgets the counts of ids."""
        if ids.numel() > 0:
            self._counts.erase_slots(self._counts.slots_of([ids], [member]))

    def clear(self, member: int | None) -> None:
        """Forgets counts."""
        if member is None:
            self._counts = IdCounts(self._counts.device)
            return
        entries = self._counts.entries()
        self._counts.erase_slots(entries.slots[entries.members == member])

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return ``ids``, ascending, and ``count``."""
        entries = self._counts.entries()
        mine = entries.members == member
        ids, order = entries.ids[mine].sort()
        return {"ids": ids, "count": entries.rows[mine][order]}

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Take over counts of ids that it knows nothing of."""
        device = self._counts.device
        self._counts.set(state["ids"].to(device).contiguous(), member, state["count"].to(device).contiguous())


def admitted_often(gate: Gate, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor, counts: Tensor) -> Tensor:
    """Asks a gate about ids that each stand for several: as if each were there as often as it counts.

    Args:
        gate: Asked once.
        ids: For each feature, int64 ``[n_f]``.
        members: For each feature, its member table's number.
        rows: int64 ``[N]``: the ids' rows, -1 for an id that has none.
        counts: int64 ``[N]``, at least 1 each.

    Returns:
        uint8 ``[N]``: 1 where an id has a row or is to get one.
    """
    # One that has a row needs no counting, and most have.
    counts = torch.where(rows < 0, counts, 1)
    each = counts.split([part.numel() for part in ids])
    often = [part.repeat_interleave(count) for part, count in zip(ids, each, strict=True)]
    admitted = gate.admitted(often, members, rows.repeat_interleave(counts))
    return admitted[counts.cumsum(0) - 1]
