"""DiskBlocks: storage of rows that is on disk, with a cache of records in memory.

Letters: n rows, N positions (ids of a call), R rows of the table, M member tables.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.table.blocks import in_one_block
from recis_hybrid.embedding.table.id_map import IdMap
from recis_hybrid.embedding.table.record_cache import CacheStatistics
from recis_hybrid.embedding.table.record_layout import META, RecordLayout
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.disk import BYTES_OF_A_FRAME, DiskFigures
from recis_hybrid.ops.gather import Bags, RowGroups

_LEAST_FRAMES = 64
_PIECE_BYTES = 16 << 20
_MAX_PIECE = 1 << 16
_PIECE_BYTES_OF_SAVE = 64 << 20
_SHIFT = 40  # all rows are in one block
_CPU = torch.device("cpu")


class DiskBlocks:
    """The methods of EmbeddingBlocks for records on disk.

    Each row has a location: where its record is in memory, or in a log on disk. Kernels get the frames in memory as one
    block, and the frames of rows as places there, after :meth:`at`, :meth:`prepare` or :meth:`insert_grouped` has
    brought the records of their rows into memory.

    Args:
        name: Name of the table, for messages.
        layout: Memory layout of a record.
        path: Folder of the log.
        cache_bytes: Memory for records.
    """

    def __init__(self, name: str, layout: RecordLayout, *, path: str, cache_bytes: int) -> None:
        each = layout.record_bytes + BYTES_OF_A_FRAME
        if cache_bytes < _LEAST_FRAMES * each:
            raise ValueError(
                f"table {name}: cache_bytes={cache_bytes} is too small for records on disk: all rows of a batch must "
                f"fit into it, at {each} bytes each; use at least {_LEAST_FRAMES * each}"
            )
        self.name = name
        self.layout = layout
        self.device = _CPU
        frames = cache_bytes // each
        self.piece_rows = max(1, min(frames // 4, _MAX_PIECE))
        """Rows that bulk writes change at a time."""
        self._path = path
        self._disk = ops.disk.open_disk(
            name, path, record_bytes=layout.record_bytes, meta_offset=layout.meta_offset, frames=frames
        )
        self._handle = Blocks(self._disk, _SHIFT, layout.meta_offset, layout.record_bytes)
        self.locations = torch.zeros(0, dtype=torch.int64)
        """int64 ``[R]``; see ``recis_hybrid.ops.disk``."""
        self._places: tuple[tuple[Tensor, Tensor], ...] = ()
        """Rows of the last training lookup and their places; empty if a record may have left them or been saved."""

    @property
    def capacity(self) -> int:
        """Number of rows that have a location."""
        return self.locations.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of blocks in memory: none."""
        return 0

    def memory(self) -> dict[str, int]:
        """Return the bytes of each part; ``disk`` is not memory."""
        figures = self.figures()
        return {
            "blocks": 0,
            "cache": figures.memory_bytes,
            "locations": self.locations.nbytes,
            "disk": figures.log_bytes,
        }

    def reserve(self, rows: int) -> None:
        """Make room for rows 0 to ``rows`` - 1. If memory runs out, nothing changes."""
        if rows > self.capacity:
            locations = ops.memory.zero_bytes(8 * _locations_for(rows), _CPU).view(torch.int64)
            locations[: self.capacity] = self.locations
            self.locations = locations

    def truncate(self, rows: int) -> None:
        """Drop the records of all rows from ``rows`` on."""
        self.forget(torch.arange(rows, self.capacity))
        self.locations = self.locations[:rows].clone()

    # Access to records by kernels, which must be called next

    def at(self, rows: Tensor, *, count: Tensor | None = None, writes: bool = False) -> tuple[Blocks, Tensor]:
        """Return the blocks and the places of records, as :meth:`EmbeddingBlocks.at` does.

        Raises:
            RuntimeError: If there are more distinct rows than fit into the cache, or the disk is full or fails; no
                record has changed.
        """
        # The records of a training lookup are written by its update, so they count as changed already.
        for known, places in self._places:
            if rows is known:
                return self._handle, places
        self._places = ()
        return self._handle, ops.disk.fetch(self._disk, self.locations, rows, count=count, writes=writes)

    def prepare(self, rows: Tensor) -> tuple[Blocks, Tensor]:
        """Bring the records of a training lookup's rows (int64 ``[n]``, negative for none) into memory like :meth:`at`.

        Raises:
            RuntimeError: As :meth:`at`.
        """
        self._places = ()
        places = ops.disk.fetch(self._disk, self.locations, rows, writes=True, counts=True)
        self._places = ((rows, places),)
        return self._handle, places

    def insert_grouped(
        self, id_map: IdMap, ids: Sequence[Tensor], members: Sequence[int], initializers: Tensor, bags: Bags
    ) -> tuple[Tensor, RowGroups]:
        """Find or insert the ids of a training lookup, and bring their records into memory like :meth:`prepare`.

        Args:
            id_map: The map of the table.
            ids: For each feature, int64.
            members: For each feature, the number of its member table.
            initializers: int64 ``[M, 5]``: initializer of each member table.
            bags: The bags of the gradients.

        Returns:
            The rows, int64 ``[N]``, and the positions grouped by row.

        Raises:
            RuntimeError: As :meth:`at`; no id has been inserted.
        """
        self._places = ()
        layout = self.layout
        id_map.count_inserts(sum(bags.lengths))
        rows, groups, places, unique_places = ops.disk.insert_grouped(
            self._disk,
            self.locations,
            id_map.slots.header,
            id_map.counters,
            id_map.free_rows,
            layout.element,
            layout.dim,
            initializers,
            layout.state_args,
            ids,
            members,
            bags,
        )
        id_map.copy_counters()
        self._places = ((rows, places), (groups.unique, unique_places))
        return rows, groups

    def stage(self, rows: Tensor) -> None:
        """Start to read the records of a later lookup's rows (int64 ``[n]``, negative for none)."""
        ops.disk.stage(self._disk, self.locations, rows)

    def whole(self) -> Blocks:
        """Raise RuntimeError, because not all records are in memory."""
        raise RuntimeError(
            f"table {self.name}: its records are on disk, and programs without torch, such as lookups inside jax.jit, "
            f"need all of them in memory; use a Placement with blocks='cpu', or look up outside of jax.jit"
        )

    def forget(self, rows: Tensor) -> None:
        """Drop the records of rows (int64 ``[n]``, negative for none), because other ids may get the rows."""
        self._places = ()
        ops.disk.forget(self._disk, self.locations, rows)

    def figures(self) -> DiskFigures:
        """Return figures of the cache and the log."""
        return ops.disk.figures(self._disk)

    def cache_statistics(self) -> CacheStatistics:
        """Return the statistics of the cache."""
        figures = self.figures()
        return CacheStatistics(figures.hits, figures.misses, 0, figures.written_back)

    # Bulk access to records

    def read(self, rows: Tensor, part: str) -> Tensor:
        """Return a part of the records of ``rows`` (int64 ``[n]``): ``[n, width]`` in the dtype of the part."""
        layout = self.layout
        values = torch.empty(rows.numel(), layout.width(part), dtype=layout.part_dtype(part))
        for index, blocks, places in self._pieces(rows):
            piece = values.new_empty(places.numel(), values.size(1))
            ops.blocks.read(blocks, places, layout.offset(part), piece)
            values[index] = piece
        return values

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Return all parts of the records of rows (int64 ``[n]``), and their metadata."""
        layout, n = self.layout, rows.numel()
        parts = {part: torch.empty(n, layout.width(part), dtype=layout.part_dtype(part)) for part in layout.parts}
        columns = {**parts, **{name: torch.empty(n, dtype=torch.int64) for name in META}}
        for index, blocks, places in self._pieces(rows):
            piece = {name: values.new_empty(places.numel(), *values.shape[1:]) for name, values in columns.items()}
            export_records(layout, blocks, places, piece)
            for name, values in columns.items():
                values[index] = piece[name]
        return columns

    def read_meta(self, rows: Tensor) -> Tensor:
        """Return updated step, seen step and frequency of rows (int64 ``[n]``), as int64 ``[3, n]``."""
        columns = torch.empty(3, rows.numel(), dtype=torch.int64)
        for index, blocks, places in self._pieces(rows):
            columns[:, index] = ops.blocks.read_meta(blocks, places)
        return columns

    def write(self, rows: Tensor, part: str, values: Tensor) -> None:
        """Overwrite a part of the records of ``rows`` (int64 ``[n]``, distinct) with ``[n, width]``."""
        expected = (rows.numel(), self.layout.width(part))
        if tuple(values.shape) != expected:
            raise ValueError(f"{part}: values must have shape {expected}, got {tuple(values.shape)}")
        values = values.to(dtype=self.layout.part_dtype(part)).contiguous()
        for some, piece in zip(rows.split(self.piece_rows), values.split(self.piece_rows), strict=True):
            ops.blocks.write(*self.at(some, writes=True), self.layout.offset(part), piece)

    def write_meta(self, rows: Tensor, columns: Tensor) -> None:
        """Overwrite the metadata of rows (int64 ``[n]``, distinct) with int64 ``[3, n]``."""
        for some, piece in zip(rows.split(self.piece_rows), columns.split(self.piece_rows, dim=1), strict=True):
            ops.blocks.write_meta(*self.at(some, writes=True), piece.contiguous())

    def copy_records(self, source: Tensor, target: Tensor) -> None:
        """Copy the records of the rows ``source`` to the rows ``target``, as ``ops.blocks.copy_records`` does."""
        pairs = zip(source.split(self.piece_rows), target.split(self.piece_rows), strict=True)
        try:
            for some, other in pairs:
                blocks, places = self.at(torch.cat([some, other]), writes=True)
                ops.blocks.copy_records(blocks, *places.split(some.numel()))
        except BaseException:
            self.forget(target)
            raise

    def touched(self, step: int) -> Tensor:
        """Return whether each row was updated or seen by a training lookup after a step, uint8 ``[R]``."""
        return ops.disk.touched(self._disk, self.locations, step)

    def snapshot(self) -> DiskSnapshot:
        """Return the records of this moment, which later changes leave alone; writes changed records to the disk.

        Raises:
            RuntimeError: If the disk is full or fails; no record has changed.
        """
        self._places = ()
        slots, number = ops.disk.pin(self._disk, self.locations)
        return DiskSnapshot(self.name, self._path, self._disk, number, slots, self.layout)

    def _pieces(self, rows: Tensor) -> Iterator[tuple[Tensor, Blocks, Tensor]]:
        """Yield copies of the records of rows in pieces: indices into ``rows``, blocks, and the rows in them."""
        n = max(1, _PIECE_BYTES // self.layout.record_bytes)
        # In the order of the log, neighboring records are read together; the last piece reads almost all pages.
        order = self.locations[rows].argsort() if rows.numel() > n else torch.arange(rows.numel())
        for index in order.split(n):
            records = ops.memory.empty((index.numel(), self.layout.record_bytes), torch.uint8, _CPU)
            ops.disk.read(self._disk, self.locations, rows[index], records)
            yield index, *in_one_block(self.layout, records)


class DiskSnapshot:
    """The records of a table on disk at one moment, kept in the log as long as this object lives.

    Args:
        name: Name of the table, for messages.
        path: Folder of the log, and of copies of the records in another order.
        disk: Handle of the records.
        number: Number of the pin.
        slots: int64 ``[R]``: where each row's record is.
        layout: Memory layout of a record.
    """

    def __init__(self, name: str, path: str, disk: Tensor, number: int, slots: Tensor, layout: RecordLayout) -> None:
        self.name, self.path, self.layout = name, path, layout
        self._disk, self._slots = disk, slots
        self.last_slot = int(slots.max()) if slots.numel() else -1
        """The last place in the log of a record."""
        weakref.finalize(self, ops.disk.unpin, disk, number)

    def slots(self, rows: Tensor) -> Tensor:
        """Return the places of the records of rows in the log, int64 ``[n]``: their order there."""
        return self._slots[rows]

    def read(self, rows: Tensor, memory: Tensor | None = None) -> Tensor:
        """Return the records of rows; in any thread.

        Args:
            rows: int64 ``[n]``.
            memory: uint8 ``[n or more, record_bytes]`` for the result; None: new memory.

        Returns:
            uint8 ``[n, record_bytes]``.

        Raises:
            RuntimeError: If the disk fails.
        """
        n = rows.numel()
        records = self.memory(n) if memory is None else memory[:n]
        ops.disk.read_pinned(self._disk, rows, self._slots[rows], records)
        return records

    def memory(self, n: int) -> Tensor:
        """Return memory for ``n`` records, uint8 ``[n, record_bytes]``."""
        return ops.memory.empty((n, self.layout.record_bytes), torch.uint8, _CPU)


def bytes_on_disk(layout: RecordLayout, rows: int, more: int, cache_bytes: int) -> dict[str, int]:
    """Return the parts of :meth:`DiskBlocks.memory`, without buffers that come and go.

    Args:
        layout: Memory layout of a record.
        rows: Number of rows.
        more: Number of ids of one more lookup, for which there is room.
        cache_bytes: As for DiskBlocks.

    Returns:
        Bytes by part. ``disk``, which is not memory, is the most that compaction leaves of the log.
    """
    frame = layout.record_bytes + BYTES_OF_A_FRAME
    return {
        "cache": cache_bytes // frame * frame,
        "locations": 8 * _locations_for(rows + more),
        "disk": ops.disk.most_log_bytes(rows, layout.record_bytes, more),
    }


def rows_of_piece(record_bytes: int) -> int:
    """Return the number of rows whose records a save reads in one go."""
    return max(1, _PIECE_BYTES_OF_SAVE // record_bytes)


def bytes_of_save(record_bytes: int, rows: int) -> int:
    """Return the bytes on disk that a save takes for a copy of the records of a member table's rows, by piece."""
    piece = rows_of_piece(record_bytes)
    if rows <= piece:
        return 0
    places = 4 * piece * -(-rows // piece)
    return places + record_bytes * rows


def _locations_for(rows: int) -> int:
    """Return the number of locations for a number of rows: at most a quarter more."""
    step = max(1 << max(rows.bit_length() - 3, 0), 512)
    return -(-rows // step) * step


def export_records(layout: RecordLayout, blocks: Blocks, rows: Tensor, out: Mapping[str, Tensor]) -> None:
    """Copy all parts and metadata of records of rows (int64 ``[n]``) into columns ``[n, ...]``."""
    offsets = [layout.offset(part) for part in layout.parts]
    ops.blocks.export(blocks, rows, offsets, [out[part] for part in layout.parts], [out[name] for name in META])
