"""ColumnDataset: Parquet files as batches, in an order that can be repeated and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from recis_hybrid.ragged import Batch

from .columns import Column
from .order import Batches
from .paths import Paths, find_files
from .prefetch import prefetched

_DECODED_ROWS = 65_536
_STATE_VERSION = 1


@dataclass
class _Position:
    """How far a pass through the data has come; the pass moves it, the dataset reads it."""

    epoch: int
    row: int
    """The first row of the epoch's order that no rank has consumed."""


class ColumnDataset:
    """Batches of columns from Parquet files.

    An epoch has one order of its rows, a function of the files and (seed, epoch). Batches are consecutive rows of that
    order and ranks take them in turn, so that it is the same for every number of ranks. With `shuffle`, the row groups
    of all files are put in a random order, and then the rows of each block of `shuffle_buffer` consecutive rows: the
    smaller the row groups and the larger the buffer, the better the mixing, up to a uniform permutation where the
    buffer holds all rows.

    Each `iter()` is one pass: from the beginning of the epoch, or from where a loaded state stands. A pass that comes
    to its end moves the dataset on to the next epoch; one that is left early does not.

    Numbers without nulls, in the dtype of the file, are not copied on their way from Arrow's decoded buffers into
    tensors, unless shuffled or in one of the few batches which are cut from two buffers (about 65,536 rows are decoded
    at a time). Being slices of a buffer, such tensors keep all of it in memory.

    Args:
        paths: A file, a folder (all .parquet and .pq files below it, by name), a pattern, or a sequence of these.
        columns: The columns to read: names, whose specs then follow from the types in the files, or specs by name (None
            for one that follows from the type). A batch has them in this order.
        batch_size: Rows of a batch on one rank.
        shuffle: Whether each epoch has a random order of its own.
        seed: Of that order, not negative.
        drop_remainder: Whether to leave out the short last batch, and with several ranks the last turn if not all ranks
            would get a full batch in it. Without it, some ranks may get one batch more than others.
        transforms: Called with each batch in the reader's thread; what it returns takes the batch's place.
        prefetch: How many batches a thread prepares ahead; 0 reads in the consumer's thread.
        rank: This process's number among those that share the data.
        world_size: How many processes share the data.
        shuffle_buffer: Rows that are permuted together; two such blocks are in memory at a time.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: A column cannot be read by its spec, or an argument is of a wrong type.
        ValueError: A file is damaged, a column is missing, files disagree about a column, there is not one row (or with
            `drop_remainder` not one batch), or an argument is out of its range.

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
        transforms: Callable[[Batch], Batch] | None = None,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 262_144,
    ) -> None:
        # pyarrow comes with the first dataset, not with the package.
        from .parquet import ParquetFiles
        from .reader import Reader

        self._batch_size = _integer("batch_size", batch_size, 1)
        self._prefetch = _integer("prefetch", prefetch, 0)
        self._world_size = _integer("world_size", world_size, 1)
        self._rank = _integer("rank", rank, 0)
        if rank >= world_size:
            raise ValueError(f"ColumnDataset: rank must be less than world_size, got {rank} of {world_size}")
        self._drop_remainder, self._transforms = drop_remainder, transforms
        block = _integer("shuffle_buffer", shuffle_buffer, 1) if shuffle else None
        self._reader = Reader(
            ParquetFiles.open(find_files(paths), _specs(columns)),
            # A multiple of the batch size: so few batches lie in two of them.
            decoded_rows=-(-_DECODED_ROWS // batch_size) * batch_size,
            seed=_integer("seed", seed, 0),
            block=block,
        )
        self._num_rows = self._reader.rows
        self._position, self._first_row = _Position(0, 0), 0
        if self._num_rows == 0:
            raise ValueError(f"ColumnDataset: there is not one row in {paths}; check what wrote the files")
        if drop_remainder and len(self) == 0:
            raise ValueError(
                f"ColumnDataset: drop_remainder leaves no batch of {self._num_rows} rows, of which {world_size} ranks "
                f"take {batch_size} each in a turn; choose a smaller batch_size"
            )

    def __len__(self) -> int:
        """Returns the number of batches that this rank gets in a whole epoch."""
        return len(self._batches(0))

    @property
    def num_rows(self) -> int:
        """The number of rows in all files."""
        return self._num_rows

    @property
    def columns(self) -> dict[str, Column]:
        """The spec of each column, with the dtype that its tensors have."""
        return {name: converter.spec for name, converter in self._reader.files.converters.items()}

    @property
    def epoch(self) -> int:
        """The epoch that the last pass is in, or that the next pass begins."""
        return self._position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass one of `epoch`: of the whole, unless a state of that very epoch is loaded.

        Args:
            epoch: Not negative.

        Raises:
            TypeError: The epoch is no integer.
            ValueError: The epoch is negative.
        """
        _integer("epoch", epoch, 0)
        if epoch != self._position.epoch:
            self._position, self._first_row = _Position(epoch, 0), 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the reading position, between any two batches, as JSON could hold it.

        A batch counts as consumed once the loop over the dataset was handed it, however far the reader is ahead. The
        state is the same on all ranks that were handed as many batches.
        """
        return {
            "version": _STATE_VERSION,
            "epoch": self._position.epoch,
            "row": self._position.row,
            "order": self._order_settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next pass give exactly what was left when `state` was taken.

        Batch size, number of ranks, columns and prefetch may be others than they were then.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: It is no such state, or one of other files or of another order of rows.
        """
        if state.get("version") != _STATE_VERSION or not {"epoch", "row", "order"} <= state.keys():
            raise ValueError(f"ColumnDataset.load_state_dict: this is no reading position: {dict(state)}")
        mine, order = self._order_settings(), state["order"]
        if changed := [name for name in mine if order.get(name) != mine[name]]:
            differences = ", ".join(f"{name} was {order.get(name)!r} and is {mine[name]!r}" for name in changed)
            raise ValueError(
                f"ColumnDataset.load_state_dict: the rows have another order than when the state was taken "
                f"({differences}); open the dataset as it was then, or begin anew"
            )
        epoch, row = int(state["epoch"]), int(state["row"])
        if epoch < 0 or not 0 <= row <= self._num_rows:
            raise ValueError(
                f"ColumnDataset.load_state_dict: there is no row {row} of epoch {epoch} in {self._num_rows} rows; the "
                f"state was changed after it was taken: load another, or begin anew"
            )
        self._position = _Position(epoch, row)
        self._first_row = self._position.row

    def __iter__(self) -> Iterator[Batch]:
        """Begins a pass; see the class."""
        # A new object for each pass, so that one which was left early no longer moves the dataset.
        position = self._position = _Position(self._position.epoch, self._first_row)
        self._first_row = 0
        return self._pass(position)

    def _pass(self, position: _Position) -> Iterator[Batch]:
        batches = self._batches(position.row)
        with closing(prefetched(self._prepared(position.epoch, batches), self._prefetch)) as ahead:
            turns = 0
            for batch in ahead:
                turns += 1
                position.row = batches.after(turns)
                yield batch
                # The consumer is done with it; held here (or by enumerate) it would be one batch more in memory.
                del batch
        if position is self._position:
            self._position = _Position(position.epoch + 1, 0)

    def _prepared(self, epoch: int, batches: Batches) -> Generator[Batch, None, None]:
        """Yields this rank's batches: what the reader's thread runs."""
        for batch in self._reader.batches(epoch, batches):
            prepared = batch if self._transforms is None else self._transforms(batch)
            if not isinstance(prepared, dict):
                raise TypeError(f"ColumnDataset: transforms must return a batch, got {type(prepared).__name__}")
            yield prepared

    def _batches(self, row: int) -> Batches:
        return Batches(self._num_rows, self._batch_size, row, self._rank, self._world_size, self._drop_remainder)

    def _order_settings(self) -> dict[str, Any]:
        """Returns what, with the epoch, decides the order of the rows."""
        pieces = [(piece.path.name, piece.row_group, piece.rows) for piece in self._reader.files.pieces]
        order: dict[str, Any] = {
            "rows": self._num_rows,
            "row_groups": hashlib.blake2b(repr(pieces).encode(), digest_size=8).hexdigest(),
            "shuffle_buffer": self._reader.block,
        }
        return order if self._reader.block is None else order | {"seed": self._reader.seed}


def _integer(name: str, value: int, least: int) -> int:
    if not isinstance(value, int):
        raise TypeError(f"ColumnDataset: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"ColumnDataset: {name} must be at least {least}, got {value}")
    return value


def _specs(columns: Sequence[str] | Mapping[str, Column | None]) -> dict[str, Column | None]:
    if isinstance(columns, str):
        raise TypeError(f"ColumnDataset: columns must be names or specs by name, got a str; write [{columns!r}]")
    specs = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns)
    if not specs:
        raise ValueError("ColumnDataset: columns must name at least one column, got none")
    if len(specs) != len(columns):
        raise ValueError(f"ColumnDataset: columns must be named once each, got {list(columns)}")
    return specs
