"""In-memory data read like a file: Arrow, pandas, polars, Hugging Face and numpy. Imports pyarrow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from recis_hybrid.columnio.formats import Contents, Format
from recis_hybrid.ragged import RaggedTensor, to_arrow

# Maximum number of rows sampled for a fingerprint.
_SAMPLE = 1024
# Rows per batch of a streamed Hugging Face dataset.
_STREAMED = 1024
# Rows per piece, whatever the chunks of a table, so that the order of an epoch depends only on the rows.
_PIECE_ROWS = 65_536


@dataclass(frozen=True, repr=False)
class MemoryFile:
    """A table, or the batches of a function, read like a file."""

    table: Any
    """A ``pyarrow.Table``; None for the batches of a function."""
    batches: Callable[[], Iterable[Any]] | None
    """Returns all batches from the first on each call; None for a table."""
    fingerprint: str
    """Hash of the types and of a sample of the values."""
    partition: dict[str, Any] = field(default_factory=dict)
    """See ``File``; always empty."""
    is_local: ClassVar[bool] = False

    @classmethod
    def of(cls, data: Any) -> MemoryFile:
        """Return a MemoryFile of data that ``ColumnDataset.from_arrow`` accepts.

        Raises:
            TypeError: The data is of an unknown kind.
            ValueError: The data has no columns, or columns of different lengths.
        """
        if isinstance(data, list | tuple):
            if not data:
                raise ValueError("ColumnDataset.from_arrow: needs at least one batch, got an empty sequence")
            first = as_table(data[0])
            return cls._of_table(
                pa.concat_tables([first, *(like_first(as_table(each), first.schema) for each in data[1:])])
            )
        batches = _batches_of(data)
        if batches is None:
            return cls._of_table(as_table(data))
        first_batch = next(iter(batches()), None)
        if first_batch is None:
            raise ValueError("ColumnDataset.from_arrow: needs at least one batch, but the function returned none")
        return cls(None, batches, _fingerprint(as_table(first_batch)))

    @classmethod
    def _of_table(cls, table: Any) -> MemoryFile:
        if not table.num_columns:
            raise ValueError("ColumnDataset.from_arrow: needs at least one column, got none")
        return cls(table, None, _fingerprint(table))

    @property
    def path(self) -> str:
        """Name of the data in the order of files."""
        return f"data in memory {self.fingerprint}"

    @property
    def name(self) -> str:
        """See ``File``."""
        return str(self)

    @property
    def format(self) -> Format:
        """Format of data in memory."""
        return _TABLES

    def stamp(self) -> None:
        """Return None: the data never changes."""

    def tables(self) -> Iterator[Any]:
        """Yield the table, or the batches of a new call of the function as tables in the types of the first.

        Raises:
            RuntimeError: The function failed.
            TypeError: A batch is of an unknown kind.
            ValueError: The columns of a batch differ from those of the first.
        """
        if self.batches is None:
            yield self.table
            return
        schema = None
        for batch in _user_batches(self.batches):
            table = as_table(batch)
            schema = table.schema if schema is None else schema
            yield like_first(table, schema)

    def __str__(self) -> str:
        return "data in memory"

    __repr__ = __str__


class _TableFormat:
    """Format of a MemoryFile: a table is read in slices, the batches of a function as one piece."""

    NAME, PIECE = "in-memory", "piece"

    def inspect(self, file: MemoryFile, types: Mapping[str, Any]) -> Contents:
        """See ``Format``."""
        if file.table is None:
            return Contents(next(file.tables()).schema, [None])
        rows = file.table.num_rows
        sizes = [min(_PIECE_ROWS, rows - first) for first in range(0, rows, _PIECE_ROWS)]
        return Contents(file.table.schema, sizes)

    def read(
        self, file: MemoryFile, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool
    ) -> Iterator[Any]:
        """See ``Format``."""
        for table in file.tables():
            selected = table.select(columns)
            if file.table is not None:
                selected = selected.slice(piece * _PIECE_ROWS, _PIECE_ROWS)
            for first in range(0, selected.num_rows, rows):
                part = selected.slice(first, rows)
                # Combine small chunks once, not for each batch that spans several.
                chunks = max(column.num_chunks for column in part.columns)
                yield from (part if chunks == 1 else part.combine_chunks()).to_batches()


_TABLES: Format = _TableFormat()


def as_table(data: Any) -> Any:
    """Return a table, or one batch of a stream, as a ``pyarrow.Table``, without copying where possible.

    Raises:
        TypeError: The data is of an unknown kind, or a column has no Arrow type.
        ValueError: The columns have different lengths.
    """
    if isinstance(data, pa.Table):
        return data
    if isinstance(data, pa.RecordBatch):
        return pa.Table.from_batches([data])
    if isinstance(data, Mapping):
        return _of_columns(data)
    try:
        if _is_of(data, "pandas") and hasattr(data, "columns"):
            return pa.Table.from_pandas(data, preserve_index=False)
        if hasattr(data, "with_format") and hasattr(data, "flatten_indices"):
            # Hugging Face: the underlying table has all rows, even those that ``select`` dropped.
            return data.with_format("arrow")[:]
        if hasattr(data, "__arrow_c_stream__"):
            return pa.table(data)
        if hasattr(data, "__arrow_c_array__"):
            return pa.Table.from_batches([pa.record_batch(data)])
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise TypeError(
            f"ColumnDataset.from_arrow: this {type(data).__name__} cannot become an Arrow table ({error}); give each "
            f"column values of one type"
        ) from error
    lazy = "; collect() it first" if hasattr(data, "collect") else ""
    raise TypeError(
        f"ColumnDataset.from_arrow: takes a table (pyarrow, pandas, polars, datasets, or anything with "
        f"__arrow_c_stream__), a dictionary of columns, a list of these, or a function that returns an iterable of "
        f"them, got {type(data).__name__}{lazy}"
    )


def like_first(table: Any, schema: Any) -> Any:
    """Return the columns of a batch in the order and types of the first batch.

    Raises:
        ValueError: The columns differ, or a value does not fit its type.
    """
    if table.schema.equals(schema):
        return table
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(
            f"ColumnDataset.from_arrow: all batches must have the columns of the first, "
            f"{', '.join(f'{each.name} {each.type}' for each in schema)}, but one has "
            f"{', '.join(f'{each.name} {each.type}' for each in table.schema)} ({error}); give all of them the same "
            f"columns"
        ) from error


def _batches_of(data: Any) -> Callable[[], Iterable[Any]] | None:
    """Return a function that yields the batches at each call; None for a single table."""
    if isinstance(data, Mapping | str | bytes) or _is_of(data, "pandas") or hasattr(data, "__arrow_c_array__"):
        return None
    if _is_of(data, "datasets") and hasattr(data, "with_format") and not hasattr(data, "flatten_indices"):
        return _Streamed(data)
    if hasattr(data, "__arrow_c_stream__") or hasattr(data, "flatten_indices"):
        return None
    if hasattr(data, "__next__"):
        raise TypeError(
            f"ColumnDataset.from_arrow: a {type(data).__name__} can be read only once, but each epoch reads the data "
            f"again; pass the function that creates it, from_arrow(lambda: batches()), or a list of its batches"
        )
    if callable(data) and not isinstance(data, type):
        return _Function(data)
    return data.__iter__ if hasattr(data, "__iter__") and not isinstance(data, np.ndarray) else None


@dataclass(frozen=True)
class _Function:
    """A user's function, wrapped so that it can be sent to spawned workers if the function can be pickled."""

    function: Callable[[], Any]

    def __call__(self) -> Iterable[Any]:
        result = self.function()
        if hasattr(result, "__arrow_c_stream__") and not hasattr(result, "__next__"):
            return [result]
        if isinstance(result, Mapping | str | bytes) or not hasattr(result, "__iter__"):
            raise TypeError(
                f"ColumnDataset.from_arrow: the function must return an iterable of batches, got "
                f"{type(result).__name__}"
            )
        batches: Iterable[Any] = result
        return batches


@dataclass(frozen=True)
class _Streamed:
    """A streamed Hugging Face dataset."""

    data: Any

    def __call__(self) -> Iterable[Any]:
        batches: Iterable[Any] = self.data.with_format("arrow").iter(batch_size=_STREAMED)
        return batches


def _user_batches(batches: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Yield batches; an error in the user's function must not be mistaken for a damaged file."""
    try:
        yield from batches()
    except (OSError, pa.ArrowException) as error:
        raise RuntimeError(f"ColumnDataset.from_arrow: the function that makes the batches failed: {error}") from error


def _of_columns(columns: Mapping[str, Any]) -> Any:
    arrays = {}
    for name, values in columns.items():
        if hasattr(values, "flatten_indices"):
            raise TypeError(
                f"ColumnDataset.from_arrow: got several datasets, {', '.join(map(repr, columns))}; pass one of them, "
                f"data[{name!r}]"
            )
        if not isinstance(name, str):
            raise TypeError(f"ColumnDataset.from_arrow: column names must be strings, got {name!r}")
        try:
            arrays[name] = _array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise TypeError(
                f"ColumnDataset.from_arrow: column {name!r} cannot become an Arrow column ({error}); use an array "
                f"or a list with a value (or a list of values) per row, all of one type; convert rows that are "
                f"dictionaries with pyarrow.Table.from_pylist"
            ) from error
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"ColumnDataset.from_arrow: all columns must have the same number of rows, got {lengths}")
    return pa.table(arrays)


def _array(values: Any) -> Any:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, RaggedTensor):
        return to_arrow(values)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray):
        return _of_numpy(values)
    if _is_of(values, "pandas"):
        return pa.Array.from_pandas(values)
    if hasattr(values, "__arrow_c_stream__"):
        return pa.chunked_array(values)
    if hasattr(values, "__array__"):
        return _of_numpy(np.asarray(values))
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise TypeError(f"it is {type(values).__name__}")
    values = list(values)
    if values and all(isinstance(each, np.ndarray) and each.ndim == 1 for each in values):
        lengths = np.array([0, *(len(each) for each in values)], np.int64)
        return pa.LargeListArray.from_arrays(lengths.cumsum(), _of_numpy(np.concatenate(values)))
    return pa.array([each.tolist() if isinstance(each, np.ndarray | torch.Tensor) else each for each in values])


def _of_numpy(values: Any) -> Any:
    if values.ndim == 0:
        raise TypeError("it is a single value")
    if values.dtype.kind == "O" and values.ndim == 1:
        return _array(values.tolist())
    if values.dtype.kind == "M" and np.datetime_data(values.dtype)[0] in ("h", "m"):
        values = values.astype("datetime64[s]")
    mask = np.ma.getmaskarray(values).reshape(-1) if isinstance(values, np.ma.MaskedArray) else None
    # Arrow arrays have native byte order and no strides.
    flat = np.ascontiguousarray(np.asarray(values).reshape(-1)).astype(values.dtype.newbyteorder("="), copy=False)
    array = pa.array(flat, mask=mask)
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _is_of(data: Any, package: str) -> bool:
    return any(base.__module__.partition(".")[0] == package for base in type(data).__mro__)


def _fingerprint(table: Any) -> str:
    step = max(-(-table.num_rows // _SAMPLE), 1)
    rows = range(0, table.num_rows, step)
    digest = hashlib.blake2b(repr([(each.name, str(each.type)) for each in table.schema]).encode(), digest_size=8)
    for column in table.columns:
        digest.update(repr([column[row].as_py() for row in rows]).encode())
    return digest.hexdigest()
