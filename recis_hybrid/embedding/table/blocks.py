"""EmbeddingBlocks: storage of rows that grows without ever moving a row, with an optional GPU cache.

Letters: n rows.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import is_accelerator, numbers_on
from recis_hybrid.embedding.table.record_cache import CacheStatistics, RecordCache
from recis_hybrid.embedding.table.record_layout import META, RecordLayout
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.gather import RowGroups

_BLOCK_BYTES = 32 << 20


class EmbeddingBlocks:
    """A growing list of blocks of equal size, a power of two of records.

    With a cache, the current record of a row may be in the cache. So kernels get the blocks only by methods that take
    care of it: :meth:`at` for kernels that access records by row, :meth:`whole` for those that read all records,
    :meth:`new` for those that write the records of new rows. Before rows are given to other ids or moved, call
    :meth:`uncache`.

    Args:
        layout: Memory layout of a record.
        device: Device whose kernels access the blocks.
        pinned: Keep the blocks in pinned host memory, which kernels of a CUDA device read and write directly.
        block_rows: Rows per block, a power of two; by default, as many as fit into 32 MiB.
        cache_bytes: GPU memory for a cache of records, if the blocks are pinned; 0: no cache.
    """

    def __init__(
        self,
        layout: RecordLayout,
        device: torch.device,
        *,
        pinned: bool = False,
        block_rows: int | None = None,
        cache_bytes: int = 0,
    ) -> None:
        if block_rows is None:
            block_rows = _rows_of_a_block(layout)
        if block_rows <= 0 or block_rows & (block_rows - 1):
            raise ValueError(f"block_rows must be a power of two, got {block_rows}")
        if pinned and not is_accelerator(device):
            raise ValueError(f"pinned blocks need a CUDA device, got {device}; use blocks='cpu'")
        if cache_bytes and not pinned:
            raise ValueError(f"a cache needs pinned blocks, got cache_bytes={cache_bytes} with pinned=False")
        self.layout = layout
        self.device = device
        self.pinned = pinned
        self.block_rows = block_rows
        self.blocks: list[Tensor] = []
        """uint8 ``[block_rows, record_bytes]`` each; up to date after :meth:`whole`."""
        self.piece_rows = 1 << 62
        """Rows that bulk writes change at a time: all."""
        self.cache = RecordCache(layout.record_bytes, cache_bytes, device) if cache_bytes else None
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
        """Bytes of all blocks, without the cache."""
        return self.capacity * self.layout.record_bytes

    def memory(self) -> dict[str, int]:
        """Return the bytes of each part."""
        return {"blocks": self.nbytes, "cache": 0 if self.cache is None else self.cache.nbytes}

    def reserve(self, rows: int) -> None:
        """Make room for rows 0 to ``rows`` - 1. If memory runs out, nothing changes."""
        if rows > self.capacity:
            more = -(-(rows - self.capacity) // self.block_rows)
            self._set([*self.blocks, *(self._block() for _ in range(more))])

    def truncate(self, rows: int) -> None:
        """Free the blocks that hold none of the first ``rows`` rows."""
        self.uncache()
        self._set(self.blocks[: -(-rows // self.block_rows)])

    # Access to records by kernels, which must be queued next

    def at(self, rows: Tensor, *, count: Tensor | None = None, writes: bool = False) -> tuple[Blocks, Tensor]:
        """Return the blocks and the places of records, for a kernel that accesses the records of rows.

        Args:
            rows: int64 ``[n]``; negative for none.
            count: int64 ``[1]``: number of valid rows; None: all.
            writes: True if the kernel writes records; the valid rows must be distinct.

        Returns:
            The blocks, and int64 ``[n]`` in place of ``rows``; a negative row is its own place.
        """
        if self.cache is None or self.cache.is_empty:
            return self._handle, rows
        return self._handle, self.cache.places(self.capacity, rows, count, writes=writes)

    def whole(self) -> Blocks:
        """Return the blocks with all records up to date, for kernels that read records by any row."""
        if self.cache is not None:
            self.cache.write_back(self._handle, self.capacity)
        return self._handle

    def new(self) -> Blocks:
        """Return the blocks for kernels that only access records of rows that no id had since :meth:`uncache`."""
        return self._handle

    # The cache

    def make_cache(self) -> None:
        """Allocate the cache, if there is to be one. If memory runs out, nothing changes."""
        if self.cache is not None and self.cache.records is None:
            self.cache.allocate()
            try:
                self._set([*self.blocks])
            except RuntimeError:  # without its addresses the cache must not be used
                self.cache.records = None
                raise

    def admit(self, groups: RowGroups) -> None:
        """Cache the records of the rows of a training lookup, as far as there is room."""
        if self.cache is not None:
            self.cache.admit(self._handle, self.capacity, groups)

    def prepare(self, rows: Tensor) -> tuple[Blocks, Tensor]:
        """Return the blocks and the places of new records; those on disk are brought into memory here."""
        return self.new(), rows

    def stage(self, rows: Tensor) -> None:
        """Do nothing; records on disk are read ahead here."""

    def forget(self, rows: Tensor) -> None:
        """Write cached records back, because other ids may get the rows (int64 ``[n]``)."""
        self.uncache()

    def uncache(self) -> None:
        """Write cached records back, and empty the cache."""
        if self.cache is not None:
            self.whole()
            self.cache.empty()

    def cache_statistics(self) -> CacheStatistics | None:
        """Return the statistics of the cache, or None without a cache; waits for the device."""
        return None if self.cache is None else self.cache.statistics()

    # Bulk access to records

    def read(self, rows: Tensor, part: str) -> Tensor:
        """Return a part of the records of ``rows`` (int64 ``[n]``): ``[n, width]`` in the dtype of the part."""
        layout = self.layout
        values = torch.empty(rows.numel(), layout.width(part), dtype=layout.part_dtype(part), device=self.device)
        ops.blocks.read(*self.at(rows), layout.offset(part), values)
        return values

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Return all parts of the records of rows (int64 ``[n]``), and their metadata."""
        parts = {part: self.read(rows, part) for part in self.layout.parts}
        return {**parts, **dict(zip(META, self.read_meta(rows), strict=True))}

    def write(self, rows: Tensor, part: str, values: Tensor) -> None:
        """Overwrite a part of the records of ``rows`` (int64 ``[n]``, distinct) with ``[n, width]``."""
        expected = (rows.numel(), self.layout.width(part))
        if tuple(values.shape) != expected:
            raise ValueError(f"{part}: values must have shape {expected}, got {tuple(values.shape)}")
        values = values.to(device=self.device, dtype=self.layout.part_dtype(part)).contiguous()
        ops.blocks.write(*self.at(rows, writes=True), self.layout.offset(part), values)

    def read_meta(self, rows: Tensor) -> Tensor:
        """Return updated step, seen step and frequency of rows (int64 ``[n]``), as int64 ``[3, n]``."""
        return ops.blocks.read_meta(*self.at(rows))

    def write_meta(self, rows: Tensor, columns: Tensor) -> None:
        """Overwrite the metadata of rows (int64 ``[n]``, distinct) with int64 ``[3, n]``."""
        ops.blocks.write_meta(*self.at(rows, writes=True), columns)

    def copy_records(self, source: Tensor, target: Tensor) -> None:
        """Copy the records of the rows ``source`` to the rows ``target``, as ``ops.blocks.copy_records`` does."""
        self.uncache()
        ops.blocks.copy_records(self._handle, source, target)

    def _block(self) -> Tensor:
        size = self.layout.record_bytes
        if self.pinned:
            return torch.empty(self.block_rows, size, dtype=torch.uint8, pin_memory=True)
        return ops.memory.empty_bytes(self.block_rows * size, self.device).view(self.block_rows, size)

    def _set(self, blocks: list[Tensor]) -> None:
        if self.pinned and len(blocks) < len(self.blocks):
            torch.accelerator.synchronize(self.device)  # torch does not know that kernels use pinned blocks
        cached = [] if self.cache is None else self.cache.addresses(self.block_rows)
        addresses = numbers_on(self.device, [*(block.data_ptr() for block in blocks), *cached])
        self.blocks[:] = blocks
        self._handle = Blocks(
            addresses, self.block_rows.bit_length() - 1, self.layout.meta_offset, self.layout.record_bytes
        )
        """The blocks, followed by those of the cache, in the form kernels expect."""


def in_one_block(layout: RecordLayout, records: Tensor) -> tuple[Blocks, Tensor]:
    """Return records (uint8 ``[n, record_bytes]``), which must stay alive, as blocks, and their rows there."""
    address = numbers_on(records.device, [records.data_ptr()])
    blocks = Blocks(address, 40, layout.meta_offset, layout.record_bytes)
    return blocks, torch.arange(records.size(0), device=records.device)


def blocks_for(layout: RecordLayout, rows: int) -> int:
    """Return the bytes of the blocks of default size for a number of rows."""
    block_rows = _rows_of_a_block(layout)
    return -(-rows // block_rows) * block_rows * layout.record_bytes


def _rows_of_a_block(layout: RecordLayout) -> int:
    return 1 << max(10, (_BLOCK_BYTES // layout.record_bytes).bit_length() - 1)


def _synchronize_and_free(blocks: list[Tensor], device: torch.device) -> None:
    torch.accelerator.synchronize(device)
    blocks.clear()
