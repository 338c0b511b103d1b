"""Protocols of admission: a rule in a config, and its state in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import BUCKETS

ADMISSION_COLUMNS = {"count", *(f"cells{bits}" for bits in ops.id_map.CELL_BITS)}
"""Columns besides ``ids`` of the states of the gates of this package."""


@dataclass(frozen=True)
class TableShare:
    """The part of a logical table that is on this rank, for which a gate decides."""

    device: torch.device
    """Device of the IDMap."""
    members: tuple[str, ...]
    """Names of the member tables; the number of a member table is its index here."""
    buckets: tuple[int, int] = (0, BUCKETS)
    """The first bucket whose ids are looked up here, and the one after the last."""


class Gate(Protocol):
    """The state of an admission rule in one table."""

    @property
    def nbytes(self) -> int:
        """Bytes of its state."""

    def age(self, step: int) -> None:
        """Age the state to the number of steps done on the table; called before every use of the state.

        The first call for a new gate, or after loading, sets the step, and ages nothing.
        """

    def admitted(
        self,
        ids: Sequence[Tensor],
        members: Sequence[int],
        rows: Tensor,
        used: Sequence[Tensor] = (),
        counts: Tensor | None = None,
    ) -> Tensor:
        """Count the ids of a training lookup, and decide which of them get a row.

        Args:
            ids: For each feature, int64 ``[n_f]``.
            members: For each feature, the number of its member table.
            rows: int64 ``[N]``: the row of each id, -1 if it has none.
            used: As in ``ops.id_map.find``.
            counts: int64 ``[N]``, at least 1: how often each id occurs; None: once.

        Returns:
            uint8 ``[N]``: 1 for an id that has a row or gets one. All positions of an id must agree.
        """

    def confirm(self) -> None:
        """Confirm that the ids admitted by the last :meth:`admitted` have rows; not called if inserting them failed."""

    def forget(self, member: int, ids: Tensor) -> None:
        """Drop the state of ids (int64 ``[n]``) that were inserted without admission."""

    def clear(self, member: int | None) -> None:
        """Drop the state of a member table, or of all member tables."""

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of :meth:`state_dict` without rows; empty if there is no state to save."""

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return the state of a member table: ``ids`` int64 ``[n]``, ascending, and more columns ``[n, ...]``.

        The ids need not be those that were looked up, but ranks save and load the rows of their own buckets.
        """

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Add the state that :meth:`state_dict` returned, or a part of its rows, to a gate without state of them."""


class Admission(Protocol):
    """A rule for which ids get a row; hashable, so that tables with equal rules can be coalesced."""

    def gate(self, share: TableShare) -> Gate:
        """Return a new gate for one table."""


class StatelessGate:
    """Base class of gates without state."""

    nbytes = 0

    def age(self, step: int) -> None:
        """Do nothing."""

    def confirm(self) -> None:
        """Do nothing."""

    def forget(self, member: int, ids: Tensor) -> None:
        """Do nothing."""

    def clear(self, member: int | None) -> None:
        """Do nothing."""

    def columns(self) -> dict[str, Tensor]:
        """Return no columns."""
        return {}

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return no columns."""
        return {}

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Do nothing."""
