"""Where in the order of rows a dataset stands, as JSON can hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from recis_hybrid.columnio.read.reader import Reader

_VERSION = 3


@dataclass
class Position:
    """How far a pass through the data has come; the pass moves it, the dataset reads it."""

    epoch: int
    row: int
    """The first row of the epoch's order that no rank has consumed."""


class SharedPosition:
    """Where the next pass begins, in memory that the workers of a DataLoader see.

    Workers that live on from pass to pass keep the copy of the dataset that they were started with: this is how they
    learn of what the training's process says later.
    """

    def __init__(self) -> None:
        self._numbers: torch.Tensor = torch.zeros(2, dtype=torch.int64, device="cpu").share_memory_()

    def set(self, position: Position) -> None:
        """Says the position."""
        self._numbers.copy_(torch.tensor([position.epoch, position.row]))

    def get(self) -> Position:
        """Return what was said last."""
        return Position(*self._numbers.tolist())

    def __getstate__(self) -> torch.Tensor:
        return self._numbers

    def __setstate__(self, numbers: torch.Tensor) -> None:
        # What a DataLoader hands to a worker is shared already; a copy of a dataset gets memory of its own.
        self._numbers = numbers.share_memory_()


def order_settings(reader: Reader) -> dict[str, Any]:
    """Return what, with the epoch, decides the order of the rows."""
    # By the files' places below their common folder: the data may lie elsewhere when a job is resumed.
    pieces = [
        (place, piece.number, piece.rows) for place, piece in zip(reader.places, reader.files.pieces, strict=True)
    ]
    wanted = reader.files.row_filter
    order: dict[str, Any] = {
        "rows": reader.rows,
        "pieces": hashlib.blake2b(repr(pieces).encode(), digest_size=8).hexdigest(),
        "filters": None if wanted is None else str(wanted),
        "shuffle_buffer": reader.block,
    }
    return order if reader.block is None else order | {"seed": reader.seed}


def settings_of_all_ranks(reader: Reader, **more: Any) -> dict[str, Any]:
    """Return what must be the same on all ranks, in words for messages.

    Args:
        reader: What was opened.
        more: Further settings.
    """
    files: dict[str, tuple[int, ...]] = {}
    for place, piece in zip(reader.places, reader.files.pieces, strict=True):
        files[place] = (*files.get(place, ()), piece.rows)
    order = order_settings(reader)
    # The pieces are told by the files.
    del order["pieces"]
    return {"rows by file": files, **more, **order}


def saved(position: Position, order: Mapping[str, Any]) -> dict[str, Any]:
    """Return a position with what its order depends on."""
    return {"version": _VERSION, "epoch": position.epoch, "row": position.row, "order": dict(order)}


def loaded(state: Mapping[str, Any], order: Mapping[str, Any]) -> Position:
    """Return the position of a state.

    Args:
        state: What `saved` returned.
        order: What the order depends on now.

    Raises:
        ValueError: It is no such state, or one of another order.
    """
    if state.get("version") != _VERSION or not {"epoch", "row", "order"} <= state.keys():
        raise ValueError(f"ColumnDataset.load_state_dict: this is no reading position: {dict(state)}")
    before = state["order"]
    if changed := [name for name in order if before.get(name) != order[name]]:
        differences = ", ".join(f"{name} was {before.get(name)!r} and is {order[name]!r}" for name in changed)
        raise ValueError(
            f"ColumnDataset.load_state_dict: the rows have another order than when the state was taken "
            f"({differences}); open the dataset as it was then, or begin anew"
        )
    epoch, row = int(state["epoch"]), int(state["row"])
    if epoch < 0 or not 0 <= row <= order["rows"]:
        raise ValueError(
            f"ColumnDataset.load_state_dict: there is no row {row} of epoch {epoch} in {order['rows']} rows; the "
            f"state was changed after it was taken: load another, or begin anew"
        )
    return Position(epoch, row)
