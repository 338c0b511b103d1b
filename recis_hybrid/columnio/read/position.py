"""Reading position: a row in the order of an epoch, in JSON types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_VERSION = 3


@dataclass
class Position:
    """Progress of a pass over the data; the pass advances it, and the dataset reads it."""

    epoch: int
    """The epoch."""
    row: int
    """First row of the epoch's order that no rank has consumed."""

    def state(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Return the position, together with the settings that determine the order of the rows."""
        return {"version": _VERSION, "epoch": self.epoch, "row": self.row, "order": dict(order)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], order: Mapping[str, Any]) -> Position:
        """Return the position of a state.

        Args:
            state: The result of ``state``.
            order: The current settings that determine the order of the rows.

        Raises:
            ValueError: ``state`` is not a reading position, or its rows had a different order.
        """
        if state.get("version") != _VERSION or not {"epoch", "row", "order"} <= state.keys():
            raise ValueError(f"ColumnDataset.load_state_dict: this is not a reading position: {dict(state)}")
        before = state["order"]
        if different := [name for name in order if before.get(name) != order[name]]:
            differences = ", ".join(f"{name} was {before.get(name)!r} and is {order[name]!r}" for name in different)
            raise ValueError(
                f"ColumnDataset.load_state_dict: the rows are in a different order than when the state was saved "
                f"({differences}); open the dataset with the same files and options, or start from the beginning"
            )
        epoch, row = int(state["epoch"]), int(state["row"])
        if epoch < 0 or not 0 <= row <= order["rows"]:
            raise ValueError(
                f"ColumnDataset.load_state_dict: there is no row {row} of epoch {epoch} in {order['rows']} rows; the "
                f"state was modified after it was saved: load another, or start from the beginning"
            )
        return cls(epoch, row)


class SharedPosition:
    """Start of the next pass, in memory shared with the workers of a DataLoader.

    Persistent workers keep the copy of the dataset that they were started with. Through this memory, they follow
    ``set_epoch`` and ``load_state_dict`` of the main process.
    """

    def __init__(self) -> None:
        self._numbers: torch.Tensor = torch.zeros(2, dtype=torch.int64, device="cpu").share_memory_()

    def set(self, position: Position) -> None:
        """Store a position."""
        self._numbers.copy_(torch.tensor([position.epoch, position.row]))

    def get(self) -> Position:
        """Return the position stored last."""
        return Position(*self._numbers.tolist())

    def __getstate__(self) -> torch.Tensor:
        return self._numbers

    def __setstate__(self, numbers: torch.Tensor) -> None:
        # Memory sent to a worker is already shared; a copy of a dataset has new memory.
        self._numbers = numbers.share_memory_()
