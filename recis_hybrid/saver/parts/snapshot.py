"""A state that nobody changes any more, in memory that is used again for the next one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.saver.parts.protocol import PartState, TableState


class Memory:
    """Host memory for snapshots. What was handed out is handed out again after `reuse`: fresh pages would cost more
    than the copies themselves."""  # noqa: D205, D209

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}
        self._used: list[tuple[tuple[int, bool], Tensor]] = []

    def take(self, size: int, *, pinned: bool = False) -> Tensor:
        """Return memory of any contents.

        Args:
            size: bytes.
            pinned: whether a GPU will copy into it.

        Returns:
            uint8 [size], on the CPU.
        """
        key = (size, pinned)
        free = self._free.get(key)
        if free:
            data = free.pop()
        elif pinned:
            data = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        else:
            data = ops.memory.empty_bytes(size, torch.device("cpu"))
        self._used.append((key, data))
        return data

    def reuse(self) -> None:
        """Let all that was handed out be used again; what the last snapshot did not need is given back."""
        self._free = {}
        for key, data in self._used:
            self._free.setdefault(key, []).append(data)
        self._used = []


def snapshot(state: PartState, memory: Memory) -> Callable[[], PartState]:
    """Copy a state, so that it shares no memory with live objects.

    Args:
        state: what a part hands out.
        memory: where the copies go.

    Returns:
        Hands out the same values; its tensors are copies, unless they are the state's own and on the CPU already.
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
    copied = replace(state, tables=tables, tensors={name: copy(tensor) for name, tensor in state.tensors.items()})
    return lambda: copied
