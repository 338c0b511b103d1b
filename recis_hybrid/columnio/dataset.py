"""ColumnDataset: files as batches, in an order that can be repeated and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import IterableDataset, get_worker_info

from recis_hybrid import distributed
from recis_hybrid.columnio.agreement import agreement, has_other_ranks, warn_unattended
from recis_hybrid.columnio.arguments import integer, one_of, specs
from recis_hybrid.columnio.columns import Column
from recis_hybrid.columnio.convert.assembly import Delivery, check_delivery
from recis_hybrid.columnio.csv_options import CsvOptions
from recis_hybrid.columnio.ranks import rank_and_world_size
from recis_hybrid.columnio.read.position import (
    Position,
    SharedPosition,
    loaded,
    order_settings,
    saved,
    settings_of_all_ranks,
)
from recis_hybrid.columnio.read.prefetch import prefetched
from recis_hybrid.columnio.read.sampler import Batches, Uneven
from recis_hybrid.ragged import Batch, batch_to

if TYPE_CHECKING:
    from recis_hybrid.columnio.errors import Skipped
    from recis_hybrid.columnio.files.filters import Filters
    from recis_hybrid.columnio.files.paths import Paths

MASK = "mask"
"""The column that `uneven="pad"` adds."""


class ColumnDataset(IterableDataset[Batch]):
    """Batches of columns from Parquet, ORC, Arrow IPC, CSV and JSON lines files, or from memory (`from_arrow`).

    An epoch has one order of its rows, a function of the files and (seed, epoch). Batches are consecutive rows of that
    order and ranks take them in turn, so that it is the same for every number of ranks. With `shuffle`, the pieces of
    all files (row groups, stripes, record batches; CSV and JSON are whole) are put in a random order, and then the rows
    of each block of `shuffle_buffer` consecutive rows: the smaller the pieces and the larger the buffer, the better the
    mixing, up to a uniform permutation where the buffer holds all rows.

    Each `iter()` is one pass: from the beginning of the epoch, or from where a loaded state stands. A pass that comes
    to its end moves the dataset on to the next epoch; one that is left early does not.

    Rows are counted after `filters`: a row that they leave out has no place in the order. To know the numbers, opening
    reads the columns that the filters look at, of the pieces that footers and folders' names do not rule out.

    Numbers without nulls, in the dtype of the file, are not copied on their way from Arrow's decoded buffers into
    tensors, unless filtered, shuffled or in one of the few batches which are cut from two buffers (see
    `decoded_rows`). Being slices of a buffer, such tensors keep all of it in memory.

    Under `torch.utils.data.DataLoader(data, batch_size=None, num_workers=n)` the workers share the rank's batches,
    which arrive in the same order. Each worker has a copy of the dataset: call `set_epoch` before each pass, and
    `state_dict(batches)` with the number of batches that the loop was handed in it. Workers that live on
    (`persistent_workers=True`) follow `set_epoch` and `load_state_dict`, too.

    Where several ranks train together, and `rank` and `world_size` are left out, all ranks must open the dataset, in
    the same order among what they do together: they join the default group if a launcher such as torchrun has started
    them and they have not yet, and opening ends with one `all_gather_object` of that group, in which they compare what
    they found. If one of them failed or found other files or rows, all raise. Every row comes once, on one of the
    ranks, and all ranks get equally many batches: the rows of a last turn that has no full batch for each are shared
    out evenly. Passes and workers of a DataLoader talk to nobody.

    Args:
        paths: A file, a folder (all files below it with a known ending, by name), a pattern, a URL of these
            (`s3://bucket/clicks`, and whatever else pyarrow or fsspec knows), or a sequence of them. Text files may be
            compressed (`.csv.gz`, `.bz2`, `.zst`, `.lz4`). Folders named `key=value` give their files a column `key`;
            files that have a column of that name must say the same, else they are refused.
        columns: The columns to read: names, whose specs then follow from the types in the files, or specs by name (None
            for one that follows from the type). A batch has them in this order. A dotted path names a field of a
            struct (`user.age`), or of structs in a list or the `key` or `value` of a map, which give lists. Files may
            hold a column in different types where one spec reads all of them: integers of any width, dates and
            timestamps, lists of any layout, nulls alone; with a dtype in the spec, numbers of any kind.
        batch_size: Rows of a batch on one rank.
        shuffle: Whether each epoch has a random order of its own.
        seed: Of that order, not negative.
        drop_remainder: Whether to leave out the short last batch, and with several ranks the last turn if not all ranks
            would get a full batch in it.
        filters: Which rows to read: a `pyarrow.compute` expression, a list of (column, operator, value) of which all
            must hold, or a list of such lists of which one must. Operators are ==, !=, <, <=, >, >=, `in` and `not in`.
            Values are compared exactly, whatever the column's type: numbers, strings, bytes, booleans, dates and times
            of `datetime` or ISO 8601 (UTC where they say no zone), decimals. A null suits `== None` and an `in` with
            None, and `not in` without; NaN suits `== nan`, `!=`, `in` with NaN and `not in` without.
        transforms: Called with each batch in the reader's threads, by several at once if there are; what it returns
            takes the batch's place.
        rank: This process's number among those that share the data; None takes torch.distributed's, or 0 where one
            process trains. With a rank by hand nothing is compared.
        world_size: How many processes share the data; None as for `rank`.
        uneven: What happens in a last turn that has no full batch for every rank; all ranks get equally many batches in
            any case. None: every row comes once, in short batches of about one size; if that left a rank without rows,
            the turn before is shared out with it. (There are empty batches only where a rank would have none at all, or
            `batch_size` is 1.) For batches of one size: `"wrap"` fills them up with rows from the beginning of the
            epoch's order; `"pad"` does so too and adds a bool column `mask` [B], False for these; `"drop"` leaves the
            turn out unless all ranks get a batch in it.
        num_threads: Threads that decode a piece each, and as many that call `transforms` or pin memory. Where there are
            fewer pieces, or `prefetch` is 0, Arrow decodes columns in its own threads, as many as
            `pyarrow.set_cpu_count` says.
        prefetch: How many batches threads prepare ahead; 0 reads in the consumer's thread. In memory there are at most
            as many batches, and what rows are decoded to before batches are cut from it: `num_threads` + 3 times
            `decoded_rows`, and the blocks of `shuffle_buffer`. Beside these each of the `num_threads` decoders holds
            what pyarrow keeps of its row group, or all of a stripe, a record batch, or a file of text.
        pin_memory: Whether batches are copied to pinned memory, from which a GPU fetches them without the host waiting.
        device: Where batches go when they are handed out, without waiting; None leaves them on the CPU.
        filesystem: Where paths lie, of `pyarrow.fs` or fsspec; None takes the local one, or that of a URL.
        on_bad_file: `"raise"`, or `"skip"` to go on past files that are damaged, vanished or written anew since they
            were opened: each is reported by a RuntimeWarning and in `skipped`. Rows lost in mid-scan make batches
            shorter, even empty, so that the other rows keep their places and the ranks their numbers of batches.
        shuffle_buffer: Rows that are permuted together; two such blocks are in memory at a time.
        decoded_rows: How many rows are decoded at a time, rounded up to whole batches. Fewer take less memory (row
            groups as small take less still) and more time for each row; the order of the rows is the same, and so is
            what a state means.
        csv: Dialect of CSV files; None takes the usual one.
        partitions: Whether folders named `key=value` give their files a column.

    Raises:
        BadFileError: A file is damaged (a ValueError).
        FileNotFoundError: There is no such file.
        RuntimeError: A launcher has started several processes and they cannot be joined.
        TypeError: A column cannot be read by its spec, or an argument is of a wrong type.
        ValueError: A column is missing, files disagree about a column, there is not one row (or with `drop_remainder`
            or `uneven="drop"` not one batch), or an argument is out of its range; or another rank could not open the
            dataset, or found other things.

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
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = None,
        num_threads: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
        device: torch.device | str | int | None = None,
        filesystem: Any = None,
        on_bad_file: Literal["raise", "skip"] = "raise",
        shuffle_buffer: int = 262_144,
        decoded_rows: int = 65_536,
        csv: CsvOptions | None = None,
        partitions: bool = True,
    ) -> None:
        # pyarrow comes with the first dataset, not with the package.
        from recis_hybrid.columnio.files.filters import RowFilter
        from recis_hybrid.columnio.files.in_memory import MemoryFile
        from recis_hybrid.columnio.files.opening import open_files
        from recis_hybrid.columnio.files.paths import find_files
        from recis_hybrid.columnio.read.reader import Reader

        # Given by hand, a rank may be alone in opening this.
        self._by_itself = rank is None and world_size is None
        rank, world_size = rank_and_world_size(rank, world_size)
        together = self._by_itself and has_other_ranks()
        with agreement(together) as found:
            self._batch_size = integer("batch_size", batch_size, 1)
            self._prefetch = integer("prefetch", prefetch, 0)
            integer("num_threads", num_threads, 1)
            self._world_size = integer("world_size", world_size, 1)
            self._rank = integer("rank", rank, 0)
            if rank >= world_size:
                raise ValueError(f"ColumnDataset: rank must be less than world_size, got {rank} of {world_size}")
            one_of("uneven", uneven, (None, "wrap", "drop", "pad"))
            one_of("on_bad_file", on_bad_file, ("raise", "skip"))
            if not isinstance(csv, CsvOptions | None):
                raise TypeError(f"ColumnDataset: csv must be a CsvOptions, got {csv!r}")
            self._drop_remainder, self._uneven = drop_remainder, uneven
            self._device = None if device is None else torch.device(device)
            block = integer("shuffle_buffer", shuffle_buffer, 1) if shuffle else None
            wanted, mask = specs(columns), MASK if uneven == "pad" else None
            check_delivery(pin_memory, wanted, mask)
            files: list[Any] = [paths] if isinstance(paths, MemoryFile) else find_files(paths, filesystem, partitions)
            self._reader = Reader(
                open_files(
                    files,
                    wanted,
                    row_filter=RowFilter.of(filters),
                    skip=on_bad_file == "skip",
                    csv=csv,
                ),
                # A multiple of the batch size: so few batches lie in two of them.
                decoded_rows=-(-integer("decoded_rows", decoded_rows, 1) // batch_size) * batch_size,
                seed=integer("seed", seed, 0),
                block=block,
                decoders=num_threads if prefetch else 1,
                threads=num_threads,
            )
            # To make tensors over memory that there is takes so little that threads would wait for each other.
            self._makers = num_threads if transforms is not None or pin_memory else 1
            self._delivery = Delivery(self._reader.files.converters, mask, transforms, pin_memory)
            self._num_rows, self._order = self._reader.rows, order_settings(self._reader)
            self._shared, self._in_worker = SharedPosition(), False
            self._position, self._begun, self._first_row = Position(0, 0), Position(0, 0), 0
            self._refuse_nothing(paths, filters)
            if together:
                found |= settings_of_all_ranks(
                    self._reader, batch_size=batch_size, uneven=uneven, drop_remainder=drop_remainder
                )
                found["notes"] = "left out " + ", ".join(each.file for each in self.skipped) if self.skipped else ""

    @classmethod
    def from_arrow(
        cls, data: Any, columns: Sequence[str] | Mapping[str, Column | None], batch_size: int, **options: Any
    ) -> ColumnDataset:
        """Read data in memory like a file, with the same arguments.

        Tensors share the memory of `data` by the rules of files, so that neither these nor `data` may be written to.
        A reading position goes with data of as many rows, whose types and sampled values (up to 1,024 rows of every
        column) are the same; it does not see any other change. Workers of a DataLoader that are not forked get a copy.

        Args:
            data: A `pyarrow.Table`, RecordBatch or RecordBatchReader, a pandas or polars DataFrame, a Hugging Face
                dataset, or whatever else has `__arrow_c_stream__`; a dictionary of columns, each an array of numpy [B]
                or [B, L], a tensor, a RaggedTensor or a list; or a list of any of these, one after another. A pandas
                index is left out, and NaN of pandas is a null.

                Or a function without arguments that returns an iterable of such batches, the same at each call (or an
                iterable that can be iterated again and again, such as a streamed Hugging Face dataset): it is called
                twice at opening, for the types and the number of rows, then at each pass. Nothing but some batches is
                in memory. Its batches are one piece, read by one thread: a pass that is resumed, and each rank and
                worker, reads from the first batch on and drops what is not its own.
            columns: See `ColumnDataset`.
            batch_size: See `ColumnDataset`.
            options: The other arguments of `ColumnDataset`.

        Raises:
            TypeError: `data` is of another kind, or an iterator, which can be read only once.
            ValueError: Columns have different lengths, or batches differ in their columns.

        Example:
            >>> data = ColumnDataset.from_arrow({"item": [7, 8, 9], "label": [1.0, 0.0, 1.0]}, ["item", "label"], 2)
            >>> [batch["item"].tolist() for batch in data]
            [[7, 8], [9]]
        """
        from recis_hybrid.columnio.files.in_memory import MemoryFile

        source: Any = MemoryFile.of(data)
        return cls(source, columns, batch_size, **options)

    def __copy__(self) -> ColumnDataset:
        """Return a dataset of the same rows, at the start of this epoch; each has a reading position of its own."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._shared, made._in_worker = SharedPosition(), False
        made._next(Position(self._position.epoch, 0))
        return made

    def _refuse_nothing(self, paths: Paths, filters: Filters) -> None:
        """Raise where there is nothing to read."""
        if self._num_rows == 0:
            among = "" if filters is None else f" that suits the filters {filters}"
            raise ValueError(f"ColumnDataset: there is not one row{among} in {paths}; check what wrote the files")
        if (self._drop_remainder or self._uneven == "drop") and len(self) == 0:
            raise ValueError(
                f"ColumnDataset: {'drop_remainder' if self._drop_remainder else 'uneven=drop'} leaves no batch of "
                f"{self._num_rows} rows, of which {self._world_size} ranks take {self._batch_size} each in a turn; "
                f"choose a smaller batch_size"
            )

    def __len__(self) -> int:
        """Return the number of batches that this rank gets in a whole epoch."""
        return self._batches(0).turns

    @property
    def num_rows(self) -> int:
        """The number of rows in all files, after the filters."""
        return self._num_rows

    @property
    def columns(self) -> dict[str, Column]:
        """The spec of each column, with the dtype that its tensors have."""
        return {name: converter.spec for name, converter in self._reader.files.converters.items()}

    @property
    def skipped(self) -> list[Skipped]:
        """What was damaged and left out so far, by this process."""
        return list(self._reader.files.skipped)

    @property
    def epoch(self) -> int:
        """The epoch that the last pass is in, or that the next pass begins."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass one of `epoch`: of the whole, unless a state of that very epoch is loaded.

        Args:
            epoch: Not negative.

        Raises:
            TypeError: The epoch is no integer.
            ValueError: The epoch is negative.
        """
        integer("epoch", epoch, 0)
        if epoch != self._position.epoch:
            self._next(Position(epoch, 0))
        elif epoch != self._begun.epoch:
            self._begun = replace(self._position)

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Return the reading position, between any two batches, as JSON could hold it.

        A batch counts as consumed once the loop over the dataset was handed it, however far the reader is ahead. The
        state is the same on all ranks that were handed as many batches.

        Args:
            batches: How many batches of the pass the loop was handed by a DataLoader, whose workers read with copies
                of this dataset; None where it was handed them by the dataset itself. The pass is the last one that
                was begun since `load_state_dict`, or since `set_epoch` with another epoch.
        """
        position = self._position
        if batches is not None:
            # Read in this process, a pass that came to its end has moved the dataset on: no batch is one of the next.
            ended = integer("batches", batches, 0) == 0 and position.epoch != self._begun.epoch
            begun = position if ended else self._begun
            position = Position(begun.epoch, self._batches(begun.row).after(batches))
        return saved(position, self._order)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next pass give exactly what was left when `state` was taken.

        Batch size, number of ranks, columns, threads and prefetch may be others than they were then.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: It is no such state, or one of other files, filters or another order of rows.
        """
        self._next(loaded(state, self._order))

    def __iter__(self) -> Iterator[Batch]:
        """Begins a pass; see the class.

        Raises:
            RuntimeError: There are other ranks now than when the dataset was opened.
        """
        if self._by_itself and distributed.is_initialized():
            now = distributed.rank(), distributed.world_size()
            if now != (self._rank, self._world_size):
                raise RuntimeError(
                    f"ColumnDataset: it was opened as rank {self._rank} of {self._world_size}, before "
                    f"torch.distributed was initialised, and this is rank {now[0]} of {now[1]}; call "
                    f"init_process_group before the dataset is opened, or give it rank and world_size"
                )
        in_worker = get_worker_info() is not None
        if in_worker and self._in_worker:
            # A worker's first pass is where its copy stands; of later ones the training's process tells.
            self._begun = self._shared.get()
        else:
            self._begun = Position(self._position.epoch, self._first_row)
        self._in_worker = in_worker
        # A new object for each pass, so that one which was left early no longer moves the dataset.
        position = self._position = replace(self._begun)
        self._first_row = 0
        if not in_worker:
            self._shared.set(Position(position.epoch, 0))
        return self._pass(position)

    def _next(self, position: Position) -> None:
        """Has the next pass begin there."""
        # What is said in a worker is the worker's own.
        if get_worker_info() is None:
            self._shared.set(position)
        self._position, self._begun, self._first_row = position, replace(position), position.row

    def _pass(self, position: Position) -> Iterator[Batch]:
        worker = get_worker_info()
        batches = self._batches(position.row, *((worker.id, worker.num_workers) if worker else (0, 1)))
        cut = self._reader.batches(position.epoch, batches)
        with closing(prefetched(cut, self._delivery, self._prefetch, self._makers)) as ahead:
            turns = 0
            for batch in ahead:
                turns += 1
                position.row = batches.after(turns)
                # On the consumer's current stream, which then finds it in order.
                yield batch if self._device is None else batch_to(batch, self._device, non_blocking=True)
                # The consumer is done with it; held here (or by enumerate) it would be one batch more in memory.
                del batch
        if self._by_itself and worker is None:
            warn_unattended()
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
