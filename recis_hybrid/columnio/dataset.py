"""ColumnDataset: batches of columns from files, in a reproducible and resumable order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from recis_hybrid import distributed
from recis_hybrid.columnio.columns import Column
from recis_hybrid.columnio.options import ReadOptions, ShardOptions
from recis_hybrid.columnio.ranks import open_on_all_ranks, warn_gradients_not_averaged
from recis_hybrid.columnio.read.position import Position, SharedPosition
from recis_hybrid.columnio.read.sampler import Batches
from recis_hybrid.ragged import Batch, batch_to
from recis_hybrid.validation import check_integer

if TYPE_CHECKING:
    from recis_hybrid.columnio.errors import Skipped
    from recis_hybrid.columnio.files.filters import Filters
    from recis_hybrid.columnio.files.paths import Paths

MASK = "mask"
"""Name of the column that ``ShardOptions(uneven="pad")`` adds."""

_READ, _SHARD = ReadOptions(), ShardOptions()


class ColumnDataset(IterableDataset[Batch]):
    """Batches of columns from Parquet, ORC, Arrow IPC, CSV and JSON lines files, or from memory (``from_arrow``).

    The order of the rows of an epoch depends only on the files and (seed, epoch). Batches are consecutive rows in that
    order, and ranks take them in turn, so the order is the same for any number of ranks. With ``shuffle``, the pieces
    of all files (row groups, stripes, record batches; a CSV or JSON file is one piece) are permuted first, and then the
    rows within each block of ``shuffle_buffer`` consecutive rows. Smaller pieces and a larger buffer mix better. A
    buffer that holds all rows gives a uniform permutation.

    Each ``iter()`` starts a pass, from the start of the epoch or from a loaded position. A complete pass advances the
    dataset to the next epoch; an interrupted one does not.

    Rows are counted after ``filters``; excluded rows are not part of the order. To count rows, opening reads the filter
    columns of each piece that footers and folder names cannot rule out.

    Numbers without nulls that keep the dtype of the file share the memory of Arrow's decoded buffers, unless they are
    filtered, shuffled, or in one of the few batches that span two buffers (see ``ReadOptions.decoded_rows``). Such
    tensors are slices of a buffer and keep the whole buffer in memory.

    With ``torch.utils.data.DataLoader(data, batch_size=None, num_workers=n)``, the workers share the rank's batches,
    which arrive in the same order. Each worker has a copy of the dataset, so call ``set_epoch`` before each pass, and
    pass ``state_dict(batches)`` the number of batches that the loop received in the pass. Persistent workers
    (``persistent_workers=True``) follow ``set_epoch`` and ``load_state_dict`` too.

    When several ranks train together, all of them must open the dataset, in the same order relative to their other
    collectives (unless ``ShardOptions`` sets an explicit rank). Processes started by a launcher such as torchrun join
    the default group if the program has not initialized it. Opening ends with a collective in which the ranks compare
    what they found. If one of them failed, or found different files or rows, all raise. Each row is read by one rank,
    and all ranks get the same number of batches: if the last turn cannot fill a batch for every rank, its rows are
    divided evenly (see ``ShardOptions.uneven``). Passes and DataLoader workers do not communicate.

    Args:
        paths: A file, a folder (all files below it with a known suffix, sorted by name), a glob pattern, a URL of any
            of these (``s3://bucket/clicks``, or any other scheme that pyarrow or fsspec supports), or a sequence of
            them. Text files may be compressed (``.csv.gz``, ``.bz2``, ``.zst``, ``.lz4``). Folders named ``key=value``
            add a column ``key`` to their files. A file with its own column of that name must agree with the folder.
        columns: Columns to read, in the order of a batch: names, with specs inferred from the types in the files, or
            specs by name (None infers the spec). A dotted path selects a field of a struct (``user.age``) or of structs
            in a list, or the ``key`` or ``value`` of a map; fields of lists and maps become lists. A column may have
            different types in different files if one spec reads all of them: integers of any width, dates and
            timestamps, any list layout, all nulls; with a dtype in the spec, any kind of number.
        batch_size: Rows per batch on one rank.
        shuffle: Read each epoch in a different random order.
        seed: Seed of the random order, not negative.
        drop_remainder: Drop the short last batch; with several ranks, drop the last turn unless it fills a batch for
            every rank.
        filters: Rows to read: a ``pyarrow.compute`` expression, a list of (column, operator, value) conditions that
            must all hold, or a list of such lists, of which at least one must hold. Operators are ==, !=, <, <=, >, >=,
            ``in`` and ``not in``. Values are compared exactly, whatever the type of the column: numbers, strings,
            bytes, booleans, decimals, and dates and times as ``datetime`` or ISO 8601 (UTC without a zone). A null
            matches ``== None``, ``in`` with None, and ``not in`` without None; NaN matches ``== nan``, ``!=``, ``in``
            with NaN and ``not in`` without.
        transforms: Applied to each batch in the reader's threads, possibly concurrently; the result replaces the batch.
        device: Device to which batches are copied without blocking; None leaves them on the CPU.
        read: Options for reading files: threads, prefetching, memory, file system, CSV dialect.
        shard: Rank, world size, and handling of an incomplete last turn.

    Raises:
        BadFileError: A file is damaged (a ValueError).
        FileNotFoundError: A file does not exist.
        RuntimeError: A launcher started several processes, but they cannot form a process group.
        TypeError: A spec cannot read its column, or an argument has the wrong type.
        ValueError: A column is missing, files disagree on the type of a column, there are no rows (or no batches, with
            ``drop_remainder`` or ``uneven="drop"``), or an argument is out of range; or another rank could not open the
            dataset, or found different files, rows or settings.

    Example:
        >>> data = ColumnDataset("clicks/", ["user", "item", "label"], 4096, shuffle=True)  # doctest: +SKIP
        >>> for batch in data:  # doctest: +SKIP
        ...     batch["user"], batch["label"]  # int64 [4096], float32 [4096]
    """

    def __init__(
        self,
        paths: Paths,
        columns: Sequence[str] | Mapping[str, Column | None],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_remainder: bool = False,
        filters: Filters = None,
        transforms: Callable[[Batch], Batch] | None = None,
        device: torch.device | str | int | None = None,
        read: ReadOptions | None = None,
        shard: ShardOptions | None = None,
    ) -> None:
        # Imported with the first dataset, so that the package does not need pyarrow.
        from recis_hybrid.columnio.files.opening import open_files
        from recis_hybrid.columnio.read.delivery import Delivery
        from recis_hybrid.columnio.read.reader import Reader

        read = read or _READ
        with open_on_all_ranks(shard or _SHARD) as opening:
            self._rank, self._world_size = opening.rank, opening.world_size
            self._follows_group = opening.follows_group
            self._drop_remainder, self._uneven = drop_remainder, opening.uneven
            self._device = None if device is None else torch.device(device)
            self._batch_size = check_integer("ColumnDataset", "batch_size", batch_size, 1)
            seed = check_integer("ColumnDataset", "seed", seed, 0)
            files = open_files(paths, columns, filters, read)
            mask = MASK if self._uneven == "pad" else None
            delivery = Delivery(files.converters, mask, transforms, read.pin_memory)
            self._reader = Reader(files, self._batch_size, seed if shuffle else None, delivery, read)
            self._num_rows = self._reader.num_rows
            self._shared, self._in_worker = SharedPosition(), False
            self._position, self._pass_start, self._next_row = Position(0, 0), Position(0, 0), 0
            self._check_not_empty(paths, filters)
            if opening.together:
                settings = {"batch_size": batch_size, "uneven": self._uneven, "drop_remainder": drop_remainder}
                opening.settings |= self._reader.shared_settings(settings)
                opening.notes = "skipped " + ", ".join(each.file for each in self.skipped) if self.skipped else ""

    @classmethod
    def from_arrow(
        cls, data: Any, columns: Sequence[str] | Mapping[str, Column | None], batch_size: int, **options: Any
    ) -> ColumnDataset:
        """Read in-memory data like a file, with the same arguments.

        Tensors share the memory of ``data``, so write to neither. A reading position can be loaded for data with the
        same number of rows, the same types and the same sampled values (up to 1,024 rows per column); other changes are
        not detected. DataLoader workers that are not forked get a copy.

        Args:
            data: A ``pyarrow.Table``, RecordBatch or RecordBatchReader, a pandas or polars DataFrame, a Hugging Face
                dataset, or anything else with ``__arrow_c_stream__``; a dictionary of columns, each a numpy array [B]
                or [B, L], a tensor, a RaggedTensor or a list; or a list of any of these, read in sequence. A pandas
                index is ignored, and a pandas NaN is a null.

                Or a function without arguments that returns an iterable of such batches, the same on each call (or an
                iterable that can be iterated repeatedly, such as a streamed Hugging Face dataset). It is called three
                times on opening, for the types and the number of rows, then once per pass, and only a few batches are
                in memory at a time. Its batches form one piece, read by one thread: a resumed pass, and each rank and
                worker, reads from the first batch and discards what it does not need.
            columns: See ``ColumnDataset``.
            batch_size: See ``ColumnDataset``.
            options: Other arguments of ``ColumnDataset``.

        Raises:
            TypeError: ``data`` is of an unknown kind, or an iterator, which can be read only once.
            ValueError: Columns have different lengths, or batches have different columns.

        Example:
            >>> data = ColumnDataset.from_arrow({"item": [7, 8, 9], "label": [1.0, 0.0, 1.0]}, ["item", "label"], 2)
            >>> [batch["item"].tolist() for batch in data]
            [[7, 8], [9]]
        """
        from recis_hybrid.columnio.files.memory_file import MemoryFile

        source: Any = MemoryFile.of(data)
        return cls(source, columns, batch_size, **options)

    def __copy__(self) -> ColumnDataset:
        """Return a dataset of the same rows with an independent reading position, at the start of the epoch."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._shared, copy._in_worker = SharedPosition(), False
        copy._start_at(Position(self._position.epoch, 0))
        return copy

    def __repr__(self) -> str:
        files = self._reader.file_names
        names = f"{len(files)} files from {files[0]} to {files[-1]}" if len(files) > 2 else " and ".join(files)
        columns = ", ".join(f"{name}: {spec}" for name, spec in self.columns.items())
        return (
            f"ColumnDataset({names}; {self._num_rows:,} rows; batch_size={self._batch_size}, rank {self._rank} of "
            f"{self._world_size}; columns {{{columns}}})"
        )

    def _check_not_empty(self, paths: Paths, filters: Filters) -> None:
        """Raise if there are no rows or no batches."""
        if self._num_rows == 0:
            matching = "" if filters is None else f" that match the filters {filters}"
            raise ValueError(
                f"ColumnDataset: there are no rows{matching} in {paths}; check the files and the job that wrote them"
            )
        if (self._drop_remainder or self._uneven == "drop") and len(self) == 0:
            option = "drop_remainder" if self._drop_remainder else "uneven='drop'"
            raise ValueError(
                f"ColumnDataset: {option} leaves no batch of {self._num_rows} rows, because {self._world_size} ranks "
                f"take {self._batch_size} rows each per turn; choose a smaller batch_size"
            )

    def __len__(self) -> int:
        """Return the number of batches that this rank gets in a whole epoch."""
        return self._batches(0).turns

    @property
    def num_rows(self) -> int:
        """Number of rows in all files, after the filters."""
        return self._num_rows

    @property
    def columns(self) -> dict[str, Column]:
        """Spec of each column, with the dtype of its tensors."""
        return {name: converter.spec for name, converter in self._reader.files.converters.items()}

    @property
    def skipped(self) -> list[Skipped]:
        """Damaged files and pieces that this process has skipped so far."""
        return list(self._reader.files.skipped)

    @property
    def epoch(self) -> int:
        """Epoch of the current pass, or of the next one if none is running."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass read all of ``epoch``; a loaded state of the same epoch is kept.

        Args:
            epoch: Not negative.

        Raises:
            TypeError: The epoch is not an integer.
            ValueError: The epoch is negative.
        """
        epoch = check_integer("ColumnDataset.set_epoch", "epoch", epoch, 0)
        if epoch != self._position.epoch:
            self._start_at(Position(epoch, 0))
        elif epoch != self._pass_start.epoch:
            self._pass_start = replace(self._position)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return the reading position in JSON types; may be called between any two batches.

        A batch counts as consumed once the loop over the dataset has received it, no matter how far the reader is
        ahead. The state is the same on all ranks that have received the same number of batches.

        Args:
            batches: Number of batches of the pass that the loop received from a DataLoader, whose workers read with
                copies of this dataset; None if the loop iterates over the dataset itself. The pass is the last one
                started since ``load_state_dict``, or since ``set_epoch`` with a different epoch.
        """
        position = self._position
        if batches is not None:
            batches = check_integer("ColumnDataset.state_dict", "batches", batches, 0)
            # A complete pass in this process has advanced the dataset to the next epoch, of which no batch is consumed.
            complete = batches == 0 and position.epoch != self._pass_start.epoch
            start = position if complete else self._pass_start
            position = Position(start.epoch, self._batches(start.row).after(batches))
        return position.state(self._reader.order)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next pass yield exactly the rows that remained when ``state`` was saved.

        Batch size, number of ranks, columns, threads and prefetching may differ.

        Args:
            state: The result of ``state_dict``.

        Raises:
            ValueError: ``state`` is not a reading position, or belongs to different files, filters or row order.
        """
        self._start_at(Position.from_state(state, self._reader.order))

    def __iter__(self) -> Iterator[Batch]:
        """Start a pass; see the class.

        Raises:
            RuntimeError: Rank or world size differ from those at opening.
        """
        if self._follows_group and distributed.is_initialized():
            now = distributed.rank(), distributed.world_size()
            if now != (self._rank, self._world_size):
                raise RuntimeError(
                    f"ColumnDataset: opened as rank {self._rank} of {self._world_size}, before torch.distributed was "
                    f"initialized, but this is rank {now[0]} of {now[1]}; call init_process_group before opening the "
                    f"dataset, or pass shard=ShardOptions(rank=..., world_size=...)"
                )
        in_worker = get_worker_info() is not None
        if in_worker and self._in_worker:
            # A worker's first pass starts at the position of its copy; later passes follow the main process.
            self._pass_start = self._shared.get()
        else:
            self._pass_start = Position(self._position.epoch, self._next_row)
        self._in_worker = in_worker
        # A new object for each pass, so that an interrupted pass no longer advances the dataset.
        position = self._position = replace(self._pass_start)
        self._next_row = 0
        if not in_worker:
            self._shared.set(Position(position.epoch, 0))
        return self._pass(position)

    def _start_at(self, position: Position) -> None:
        """Make the next pass start at a position."""
        # A worker changes only its own copy.
        if get_worker_info() is None:
            self._shared.set(position)
        self._position, self._pass_start, self._next_row = position, replace(position), position.row

    def _pass(self, position: Position) -> Iterator[Batch]:
        worker = get_worker_info()
        batches = self._batches(position.row, *((worker.id, worker.num_workers) if worker else (0, 1)))
        with closing(self._reader.batches(position.epoch, batches)) as ahead:
            turns = 0
            for batch in ahead:
                turns += 1
                position.row = batches.after(turns)
                # Copied on the consumer's current stream, so that the consumer needs no synchronization.
                yield batch if self._device is None else batch_to(batch, self._device, non_blocking=True)
                # A reference here would keep one more batch in memory while waiting for the next.
                del batch
        if self._follows_group and worker is None:
            warn_gradients_not_averaged()
        if position is self._position:
            self._position = Position(position.epoch + 1, 0)
            if get_worker_info() is None:
                self._shared.set(self._position)

    def _batches(self, row: int, worker: int = 0, workers: int = 1) -> Batches:
        return Batches(
            self._num_rows,
            self._batch_size,
            row,
            self._rank,
            self._world_size,
            self._drop_remainder,
            self._uneven,
            worker,
            workers,
        )
