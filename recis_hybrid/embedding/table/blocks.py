"""EmbeddingBlocks: storage of rows that grows without ever moving a row."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import is_accelerator, numbers_on
from recis_hybrid.embedding.table.record_layout import RecordLayout

_BLOCK_BYTES = 32 << 20


class EmbeddingBlocks:
    """A growing list of blocks of equal size, a power of two of records.

    Args:
        layout: Memory layout of a record.
        device: Device whose kernels access the blocks.
        pinned: Keep the blocks in pinned host memory, which kernels of a CUDA device read and write directly.
        block_rows: Rows per block, a power of two; by default, as many as fit into 32 MiB.
    """

    def __init__(
        self, layout: RecordLayout, device: torch.device, *, pinned: bool = False, block_rows: int | None = None
    ) -> None:
        if block_rows is None:
            block_rows = 1 << max(10, (_BLOCK_BYTES // layout.record_bytes).bit_length() - 1)
        if block_rows <= 0 or block_rows & (block_rows - 1):
            raise ValueError(f"block_rows must be a power of two, got {block_rows}")
        if pinned and not is_accelerator(device):
            raise ValueError(f"pinned blocks need a CUDA device, got {device}; use blocks='cpu'")
        self.layout = layout
        self.device = device
        self.pinned = pinned
        self.block_rows = block_rows
        self.blocks: list[Tensor] = []
        """uint8 ``[block_rows, record_bytes]`` each."""
        if pinned:
            # Kernels may still be queued when the table is dropped.
            weakref.finalize(self, _synchronize_and_free, self.blocks, device)
        self._set([])

    @property
    def capacity(self) -> int:
        """Number of rows that fit into the blocks."""
        return len(self.blocks) * self.block_rows

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.capacity * self.layout.record_bytes

    def reserve(self, rows: int) -> None:
        """Make room for rows 0 to ``rows`` - 1. If memory runs out, nothing changes."""
        if rows > self.capacity:
            more = -(-(rows - self.capacity) // self.block_rows)
            self._set([*self.blocks, *(self._block() for _ in range(more))])

    def truncate(self, rows: int) -> None:
        """Free the blocks that hold none of the first ``rows`` rows."""
        self._set(self.blocks[: -(-rows // self.block_rows)])

    def read(self, rows: Tensor, part: str) -> Tensor:
        """Return a part of the records of ``rows`` (int64 ``[n]``): ``[n, width]`` in the dtype of the part."""
        layout = self.layout
        values = torch.empty(rows.numel(), layout.width(part), dtype=layout.part_dtype(part), device=self.device)
        ops.blocks.read(self.handle, rows, layout.offset(part), values)
        return values

    def write(self, rows: Tensor, part: str, values: Tensor) -> None:
        """Overwrite a part of the records of ``rows`` (int64 ``[n]``, distinct) with ``[n, width]``."""
        expected = (rows.numel(), self.layout.width(part))
        if tuple(values.shape) != expected:
            raise ValueError(f"{part}: values must have shape {expected}, got {tuple(values.shape)}")
        values = values.to(device=self.device, dtype=self.layout.part_dtype(part)).contiguous()
        ops.blocks.write(self.handle, rows, self.layout.offset(part), values)

    def _block(self) -> Tensor:
        size = self.layout.record_bytes
        if self.pinned:
            return torch.empty(self.block_rows, size, dtype=torch.uint8, pin_memory=True)
        return ops.memory.empty_bytes(self.block_rows * size, self.device).view(self.block_rows, size)

    def _set(self, blocks: list[Tensor]) -> None:
        if self.pinned and len(blocks) < len(self.blocks):
            torch.accelerator.synchronize(self.device)  # torch does not know that kernels use pinned blocks
        addresses = numbers_on(self.device, [block.data_ptr() for block in blocks])
        self.blocks[:] = blocks
        self.handle = ops.blocks.Blocks(
            addresses, self.block_rows.bit_length() - 1, self.layout.meta_offset, self.layout.record_bytes
        )
        """The blocks in the form kernels expect."""


def _synchronize_and_free(blocks: list[Tensor], device: torch.device) -> None:
    torch.accelerator.synchronize(device)
    blocks.clear()
