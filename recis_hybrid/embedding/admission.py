"""Admission: rules for which ids get a row.

An :class:`Admission` is part of a config; a :class:`Gate` is its state in one table.
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
    """The state of an admission rule in one table."""

    @property
    def nbytes(self) -> int:
        """Bytes of its state."""

    def admitted(
        self, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor, used: Sequence[Tensor] = ()
    ) -> Tensor:
        """Count the ids of a training lookup, and decide which of them get a row.

        Args:
            ids: For each feature, int64 ``[n_f]``.
            members: For each feature, the number of its member table.
            rows: int64 ``[N]``: the row of each id, -1 if it has none.
            used: As in ``ops.id_map.find``.

        Returns:
            uint8 ``[N]``: 1 for an id that has a row or gets one.
        """

    def confirm(self) -> None:
        """Confirm that the ids admitted by the last :meth:`admitted` have rows; not called if inserting them failed."""

    def forget(self, member: int, ids: Tensor) -> None:
        """Drop the state of ids (int64 ``[n]``) that were inserted without admission."""

    def clear(self, member: int | None) -> None:
        """Drop the state of a member table, or of all member tables."""

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return the state of a member table: ``ids`` int64 ``[n]``, and more columns ``[n]``."""

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Load the state that :meth:`state_dict` returned."""


class Admission(Protocol):
    """A rule for which ids get a row; hashable, so that tables with equal rules can be coalesced."""

    def gate(self, device: torch.device) -> Gate:
        """Return a new gate for one table."""


@dataclass(frozen=True)
class MinFrequency:
    """Admits an id once it has been looked up ``count`` times in training.

    The lookup in which an id reaches the count inserts it. Until then, the id has its first value or zeros, depending
    on the config's ``unknown``, and its gradients are dropped. Counts are exact; ids that have a row are not counted.

    An id that never reaches ``count`` takes 21 to 53 bytes. Eviction removes rows but not counts, because the step of
    an id's last count is not stored. ``memory()["admission"]`` reports the bytes of the counts, and
    ``table.store.gate.clear(None)`` drops those of a table and frees their memory: its ids are then counted from zero.

    Example:
        >>> config = EmbeddingConfig(dim=2, admission=MinFrequency(3), unknown="zeros")
    """

    count: int
    """Number of lookups, at least 1; an id that occurs twice in a batch counts twice."""

    def __post_init__(self) -> None:
        check_integer("MinFrequency", "count", self.count, low=1)
        if self.count >= MAX_ROWS:
            raise ValueError(f"MinFrequency: count must be below 2**40, got {self.count}")

    def gate(self, device: torch.device) -> Gate:
        """Return a gate without counts."""
        return FrequencyGate(self.count, device)


class FrequencyGate:
    """Exact counts of the ids that have no row; a count is dropped when its id gets a row."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._least = count
        self._counts = IdCounts(device)
        self._admitted_slots: Tensor | None = None
        """Slots of the counts of the last admitted ids, which have no row yet; negative: none."""

    @property
    def nbytes(self) -> int:
        """Bytes of the counts."""
        return self._counts.nbytes

    def admitted(
        self, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor, used: Sequence[Tensor] = ()
    ) -> Tensor:
        """Count the ids that have no row, and admit those that reach the count."""
        counts = self._counts
        counts.count(ids, members, rows, used)
        admitted = torch.empty(rows.numel(), dtype=torch.uint8, device=rows.device)
        ops.id_map.admit(counts.slots.header, ids, members, rows, self._least, admitted, used=used)
        # Inserting the admitted ids may fail, so keep their counts until they have rows.
        self._admitted_slots = torch.where((admitted == 1) & (rows < 0), counts.slots_of(ids, members), -1)
        return admitted

    def confirm(self) -> None:
        """Drop the counts of the ids that were admitted last."""
        if self._admitted_slots is not None:
            self._counts.erase_slots(self._admitted_slots)
            self._admitted_slots = None

    def forget(self, member: int, ids: Tensor) -> None:
        """Drop the counts of ids."""
        if ids.numel() > 0:
            self._counts.erase_slots(self._counts.slots_of([ids], [member]))

    def clear(self, member: int | None) -> None:
        """Drop the counts of a member table, or of all member tables."""
        if member is None:
            self._counts = IdCounts(self._counts.device)
            return
        entries = self._counts.entries()
        self._counts.erase_slots(entries.slots[entries.members == member])

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return columns ``ids`` (ascending) and ``count``."""
        entries = self._counts.entries()
        mine = entries.members == member
        ids, order = entries.ids[mine].sort()
        return {"ids": ids, "count": entries.rows[mine][order]}

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Load counts of ids that have none."""
        device = self._counts.device
        self._counts.set(state["ids"].to(device).contiguous(), member, state["count"].to(device).contiguous())


def admitted_by_count(
    gate: Gate, ids: Sequence[Tensor], members: Sequence[int], rows: Tensor, counts: Tensor
) -> Tensor:
    """Query a gate as if each id occurred as often as its count.

    Args:
        gate: The gate; called once.
        ids: For each feature, int64 ``[n_f]``.
        members: For each feature, the number of its member table.
        rows: int64 ``[N]``: the row of each id, -1 if it has none.
        counts: int64 ``[N]``, each at least 1.

    Returns:
        uint8 ``[N]``: 1 for an id that has a row or gets one.
    """
    # Ids with a row, i.e. most ids, need not be counted.
    counts = torch.where(rows < 0, counts, 1)
    by_feature = counts.split([part.numel() for part in ids])
    repeated = [part.repeat_interleave(count) for part, count in zip(ids, by_feature, strict=True)]
    admitted = gate.admitted(repeated, members, rows.repeat_interleave(counts))
    return admitted[counts.cumsum(0) - 1]
