"""One part of a checkpoint: an object whose state is saved and loaded under a name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from recis_hybrid.checkpointing import HostMemory, PartState, TableState


class Part(ABC):
    """An object that is saved and loaded under a name; subclasses adapt the kinds of objects that there are."""

    kind: str
    """One of ``manifest.KINDS``."""

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
        """Replace the state by a saved one that fits."""

    def capture(self, memory: HostMemory | None, changes: PartState | None = None) -> Callable[[], PartState]:
        """Return a function that returns the state of now, or what changed in it.

        Args:
            memory: Takes a copy, so that the function may be called in another thread and the object may change. None:
                nothing is copied, and the object must not change before the call.
            changes: What changed, in place of the whole state.
        """
        if memory is None:
            return self.state if changes is None else lambda: changes
        copy = copied(self.state() if changes is None else changes, memory)
        return lambda: copy


def copied(state: PartState, memory: HostMemory) -> PartState:
    """Return a copy of a state that shares no memory with live objects.

    Args:
        state: The state; tensors that it owns and that are on the CPU are not copied.
        memory: Takes the copies.
    """

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if state.owned and tensor.is_cpu:
            return tensor
        if tensor.layout != torch.strided or tensor.is_meta:  # refused when it is written
            return tensor
        target = memory.take(tensor.numel() * tensor.itemsize, pinned=tensor.is_cuda)
        return target.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def rows(table: TableState) -> TableState:
        columns = {column: copy(values) for column, values in table.columns.items()}
        removed = None if table.removed is None else rows(table.removed)
        return TableState(columns, copy(table.buckets), table.meta, removed=removed)

    tables = {name: rows(table) for name, table in state.tables.items()}
    return replace(state, tables=tables, tensors={name: copy(tensor) for name, tensor in state.tensors.items()})
