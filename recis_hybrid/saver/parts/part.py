"""One part of a checkpoint: an object whose state is saved and loaded under a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from recis_hybrid.accelerator import is_accelerator
from recis_hybrid.checkpointing import (
    HostMemory,
    Loadable,
    PartState,
    Saveable,
    SaveableTables,
    StateLoader,
    TableState,
)
from recis_hybrid.saver.errors import OTHER_STEP, CorruptCheckpoint
from recis_hybrid.saver.parts.compare import refuse_differences, state_differences
from recis_hybrid.saver.runtime.ranks import Ranks


class Part(ABC):
    """An object that is saved and loaded under a name; subclasses adapt the supported kinds of objects."""

    kind: str
    """One of ``manifest.KINDS``."""
    tables: SaveableTables | None = None
    """The object if it has large tables, which it copies itself and whose changes it records; otherwise None."""

    @abstractmethod
    def state(self) -> PartState:
        """Return the current state; its tensors may be the object's own."""

    @abstractmethod
    def check(self, where: str, saved: PartState) -> None:
        """Compare a saved state with the object, changing nothing.

        Raises:
            CheckpointMismatch: The state does not fit.
        """

    @abstractmethod
    def load(self, saved: PartState) -> None:
        """Replace the state with a saved one that fits."""

    def capture(self, memory: HostMemory | None) -> Callable[[], PartState]:
        """Return a function that returns the current state.

        Args:
            memory: Holds a copy, so that the function can be called in another thread while the object changes. None
                copies nothing, and the object must not change before the call.
        """
        return self.state if memory is None else captured(self.state(), memory)


def captured(state: PartState, memory: HostMemory | None) -> Callable[[], PartState]:
    """Return a function that returns a state, copied as in :meth:`Part.capture`."""
    copy = state if memory is None else _copy_state(state, memory)
    return lambda: copy


class SaveablePart(Part):
    """An object that implements ``Saveable``."""

    def __init__(self, value: Saveable) -> None:
        self.value = value
        self.kind: str = getattr(value, "checkpoint_kind", "saveable")
        self.tables = value if isinstance(value, SaveableTables) else None

    def state(self) -> PartState:
        """Return the object's state."""
        return self.value.checkpoint_state()

    @property
    def streams(self) -> bool:
        """True if the object loads rows as they are read, through its :meth:`loader`."""
        return isinstance(self.value, Loadable)

    def loader(self, saved: PartState) -> StateLoader:
        """Return the object's loader for a saved state without rows."""
        assert isinstance(self.value, Loadable)
        return self.value.checkpoint_loader(saved)

    def buckets(self, table: str, ranks: Ranks) -> tuple[int, int]:
        """Return the buckets whose rows of a table this rank loads: the first, and the one after the last."""
        own = None if self.tables is None else self.tables.checkpoint_buckets(table)
        return ranks.buckets if own is None else own

    def check(self, where: str, saved: PartState) -> None:
        """Compare names, dtypes, widths, shapes and table metadata with the current state."""
        live = self.state() if self.tables is None else self.tables.checkpoint_layout()
        refuse_differences(where, state_differences(saved, live))

    def load(self, saved: PartState) -> None:
        """Pass the state to the object.

        Raises:
            CorruptCheckpoint: The object rejects the state.
        """
        try:
            self.value.load_checkpoint_state(saved)
        except ValueError as error:
            raise CorruptCheckpoint(
                f"{type(self.value).__name__}: rejects the saved state: {error}. {OTHER_STEP}"
            ) from error


def _copy_state(state: PartState, memory: HostMemory) -> PartState:
    """Return a copy of a state that shares no memory with live objects.

    Args:
        state: The state. Tensors on the CPU that it owns are not copied.
        memory: Memory for the copies.
    """

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if state.owned and tensor.is_cpu:
            return tensor
        if tensor.layout != torch.strided or tensor.is_meta:  # writing it raises
            return tensor
        target = memory.take(tensor.numel() * tensor.itemsize, pinned=is_accelerator(tensor))
        return target.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def rows(table: TableState) -> TableState:
        columns = {column: copy(values) for column, values in table.columns.items()}
        removed = None if table.removed is None else rows(table.removed)
        return TableState(columns, copy(table.buckets), table.meta, removed=removed)

    tables = {name: rows(table) for name, table in state.tables.items()}
    return replace(state, tables=tables, tensors={name: copy(tensor) for name, tensor in state.tensors.items()})
