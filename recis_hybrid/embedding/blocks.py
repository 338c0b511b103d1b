"""EmbeddingBlocks: the rows' storage, growing without ever moving a row."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.record_layout import RecordLayout

_BLOCK_BYTES = 32 << 20


class EmbeddingBlocks:
    """A growing list of equal blocks of a power of two of records.

    Args:
        layout: How a record lies in memory.
        device: Where the blocks live.
        block_rows: Rows of a block, a power of two; by default what fits 32 MiB.
    """

    def __init__(self, layout: RecordLayout, device: torch.device, block_rows: int | None = None) -> None:
        if block_rows is None:
            block_rows = 1 << max(10, (_BLOCK_BYTES // layout.record_bytes).bit_length() - 1)
        if block_rows <= 0 or block_rows & (block_rows - 1):
            raise ValueError(f"block_rows must be a power of two, got {block_rows}")
        self.layout = layout
        self.device = device
        self.block_rows = block_rows
        self.blocks: list[Tensor] = []
        """uint8 ``[block_rows, record_bytes]`` each."""
        self._addresses = torch.empty(0, dtype=torch.int64, device=device)

    @property
    def capacity(self) -> int:
        """Rows there is memory for."""
        return len(self.blocks) * self.block_rows

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.capacity * self.layout.record_bytes

    @property
    def handle(self) -> ops.blocks.Blocks:
        """What kernels take."""
        return ops.blocks.Blocks(self._addresses, self.block_rows.bit_length() - 1, self.layout.record_bytes)

    def reserve(self, rows: int) -> None:
        """Makes room for rows 0 to ``rows`` - 1. If memory runs out, the blocks are as before."""
        if rows <= self.capacity:
            return
        size = self.layout.record_bytes
        fresh = [
            ops.memory.empty_bytes(self.block_rows * size, self.device).view(self.block_rows, size)
            for _ in range(-(-(rows - self.capacity) // self.block_rows))
        ]
        blocks = [*self.blocks, *fresh]
        self._addresses = torch.tensor([block.data_ptr() for block in blocks], dtype=torch.int64, device=self.device)
        self.blocks = blocks

    def read(self, rows: Tensor, part: str) -> Tensor:
        """Returns a part of the records of ``rows`` (int64 ``[n]``): float32 ``[n, width]``."""
        values = torch.empty(rows.numel(), self.layout.width(part), dtype=torch.float32, device=self.device)
        ops.blocks.read(self.handle, rows, self.layout.offset(part), values)
        return values

    def write(self, rows: Tensor, part: str, values: Tensor) -> None:
        """Overwrites a part of the records of ``rows`` (int64 ``[n]``, distinct) with float32 ``[n, width]``."""
        expected = (rows.numel(), self.layout.width(part))
        if tuple(values.shape) != expected:
            raise ValueError(f"{part}: values must have shape {expected}, got {tuple(values.shape)}")
        values = values.to(device=self.device, dtype=torch.float32).contiguous()
        ops.blocks.write(self.handle, rows, self.layout.offset(part), values)
