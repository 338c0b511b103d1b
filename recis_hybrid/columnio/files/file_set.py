"""Opened files with the same columns: their pieces in order, and the rows of each piece. Imports pyarrow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recis_hybrid.columnio.columns import Column, Dense, Ragged, Weighted
from recis_hybrid.columnio.convert.convert import Converter
from recis_hybrid.columnio.convert.layouts import (
    field as field_of,
    field_type,
    nested_names,
    plain,
    plain_type,
    resolve,
)
from recis_hybrid.columnio.convert.numbers import Array, ArrowType, Place, a_few
from recis_hybrid.columnio.convert.row_slice import Rows
from recis_hybrid.columnio.errors import BadFileError, Skipped, changed_file, missing_file, unreadable_piece
from recis_hybrid.columnio.files.filters import BoundFilter, RowFilter
from recis_hybrid.columnio.files.paths import Source
from recis_hybrid.columnio.files.unify import unified_type
from recis_hybrid.columnio.formats import Contents, Format

DAMAGE = (OSError, pa.ArrowException)
"""Errors of pyarrow for files that it cannot read."""

_COUNTED_ROWS = 65_536


@dataclass(frozen=True)
class OpenedFile:
    """A file with known columns."""

    file: Source
    contents: Contents
    partition: Mapping[str, ArrowType]
    """Types of the columns in its folder names, by column."""
    stamp: tuple[int | None, int | None] | None = None
    """Result of ``File.stamp`` before the contents were inspected."""
    condition: BoundFilter | None = None
    """Filter of its rows; None for all."""

    @property
    def format(self) -> Format:
        """Format of the file; looked up each time, because a module cannot be pickled."""
        return self.file.format

    @cached_property
    def schema(self) -> ArrowType:
        """Columns of the file in plain types, followed by the columns in its folder names."""
        fields = [each.with_type(plain_type(each.type)) for each in self.contents.schema]
        names = self.contents.schema.names
        return pa.schema([*fields, *(pa.field(*item) for item in self.partition.items() if item[0] not in names)])

    def type_of(self, name: str) -> ArrowType:
        """Return the plain type of a column, or of a field of a column.

        Raises:
            ValueError: No column has that name, or several have.
        """
        indices = self.schema.get_all_field_indices(name)
        if len(indices) > 1:
            raise ValueError(
                f"columnio: {self.file} has {len(indices)} columns named {name!r}; give each a unique name"
            )
        if (place := resolve(self.schema, name)) is None:
            near = [each for each in self.schema.names if each.lower() == name.lower()]
            near += [each for each in nested_names(self.schema) if each.startswith(name.partition(".")[0] + ".")]
            suggestion = f" (did you mean {a_few(near)}?)" if near else ""
            raise ValueError(
                f"columnio: {self.file} has no column {name!r}{suggestion}; it has {a_few(self.schema.names)}: use "
                f"one of these, or rewrite the file with it"
            )
        return field_type(self.schema.field(place[0]).type, place[1])

    def type_for(self, name: str, spec: Column | None) -> ArrowType:
        """Return the plain type that a spec reads; a struct for a spec of two columns.

        Raises:
            ValueError: No column has that name, or several have.
        """
        first, *second = (self.type_of(source) for source in sources_of(name, spec))
        return pa.struct([("id", first), ("weight", second[0])]) if second else first

    def read(self, piece: int, columns: Sequence[str], rows: int, threads: bool) -> Iterator[Array]:
        """Yield the rows of a piece, with columns of the file, fields of these, and columns in folder names.

        Raises:
            BadFileError: The file changed since it was opened; rows read after the change are not yielded.
            ValueError: A column contradicts its folder name.
        """
        places = {name: resolve(self.schema, name) or (name, ()) for name in columns}
        in_file = [top for top, _ in places.values() if top in self.contents.schema.names]
        # At least one column, to know the number of rows.
        requested = list(dict.fromkeys(in_file)) or self.contents.schema.names[:1]
        done = 0
        for batch in self._unchanged(self.format.read(self.file, self.contents, piece, requested, rows, threads)):
            arrays = []
            for top, path in places.values():
                if top not in requested:
                    value = pa.scalar(self.file.partition[top], self.partition[top])
                    arrays.append(pa.repeat(value, batch.num_rows))
                    continue
                try:
                    array = field_of(plain(batch.column(top)), path)
                except pa.ArrowNotImplementedError as error:
                    # A type that pyarrow cannot decode is not damage.
                    raise TypeError(
                        f"columnio: column {top!r} of {self.file} is {batch.column(top).type}, which this version of "
                        f"pyarrow does not decode ({error}); write it as numbers, strings or lists of these"
                    ) from error
                if top in self.partition:
                    self._check_partition(top, array, f"{self.format.PIECE} {piece}", done)
                arrays.append(array)
            done += batch.num_rows
            yield pa.RecordBatch.from_arrays(arrays, names=list(columns)) if columns else batch

    def partition_value(self, name: str) -> Any:
        """Return the value of a column in a folder name, as a scalar of the column's type.

        Raises:
            ValueError: The file has a column of that name, and the value does not fit its type.
        """
        value, arrow_type = self.file.partition[name], self.schema.field(name).type
        if value is None:
            return pa.scalar(None, arrow_type)
        try:
            return pa.scalar(str(value)).cast(arrow_type)
        except pa.ArrowException as error:
            raise self._contradiction(name, f"is {arrow_type}") from error

    def _check_partition(self, name: str, array: Array, piece: str, first: int) -> None:
        value = self.partition_value(name)
        same = pc.is_null(array) if value.as_py() is None else pc.fill_null(pc.equal(array, value), False)
        if pc.all(same).as_py() is False:
            row = pc.index(same, False).as_py()
            raise self._contradiction(name, f"is {array[row].as_py()!r} in row {first + row} of {piece}")

    def _contradiction(self, name: str, problem: str) -> ValueError:
        return ValueError(
            f"columnio: column {name!r} of {self.file} {problem}, but its folder name has "
            f"{self.file.partition[name]!r}; rewrite the file without that column, move it to the right folder, or "
            f"ignore folder names (partitions=False)"
        )

    def _unchanged(self, decoded: Iterator[Array]) -> Iterator[Array]:
        """Yield decoded batches as long as the file has not changed since it was opened.

        The bytes of a rewritten file, read with the old offsets and types, may decode to plausible numbers.
        """
        checked = False
        try:
            for batch in decoded:
                # Check after the bytes were read. Remote files are checked only once, because each check is a request
                # and objects are replaced as a whole.
                if self.file.is_local or not checked:
                    self._check()
                checked = True
                yield batch
        except BadFileError:
            raise
        except (*DAMAGE, ValueError):
            # If the file changed, the error does not mean damage.
            self._check()
            raise

    def _check(self) -> None:
        # A removed file keeps its contents while it is open.
        if (now := self.file.stamp()) is not None and now != self.stamp:
            raise changed_file(str(self.file))


@dataclass(frozen=True)
class Piece:
    """The unit of reading: a row group, stripe or record batch, or a whole text file."""

    opened: OpenedFile = field(repr=False)
    """The file."""
    number: int
    """Number of the piece in the file."""
    rows: int
    """Number of its rows after the filter."""

    def __str__(self) -> str:
        return f"{self.opened.format.PIECE} {self.number}"


@dataclass(frozen=True)
class FileSet:
    """Files with the same columns: their pieces in order, and the conversion of their columns."""

    pieces: Sequence[Piece]
    """All pieces that have rows, file by file."""
    converters: Mapping[str, Converter]
    """Converters by column, in the order of a batch."""
    cleaners: Mapping[tuple[str, ArrowType], Converter]
    """Converters by column and type in the files; all produce the layout of ``converters``."""
    row_filter: RowFilter | None
    """Filter of the rows; None for all."""
    read_columns: Sequence[str]
    """Columns to read, including those of the filter alone."""
    filter_columns: Sequence[str]
    """Columns of the filter."""
    skip: bool
    """Skip damaged files and pieces instead of raising."""
    skipped: list[Skipped] = field(default_factory=list)
    """Files and pieces skipped so far."""

    def read(self, piece: Piece, rows: int, threads: bool = False) -> Iterator[Rows]:
        """Yield the rows of a piece after the filter, in order, about ``rows`` at a time.

        Args:
            piece: The piece.
            rows: Rows to decode at a time.
            threads: Allow Arrow to decode in its threads.

        Raises:
            BadFileError: The file is damaged or changed; with ``skip``, the remaining rows are skipped instead.
            FileNotFoundError: The file is missing; with ``skip``, its rows are skipped instead.
            ValueError: A column has a value that its spec does not allow.
        """
        done = 0
        try:
            for batch in self._filtered(piece, self.read_columns, rows, threads):
                place = f"{piece}, rows {done} to {done + batch.num_rows - 1} of it"
                arrays = self._clean(batch, str(piece.opened.file), place)
                done += batch.num_rows
                if done > piece.rows:
                    break
                yield self._rows(arrays)
            if done != piece.rows:
                raise BadFileError(
                    f"columnio: {piece} of {piece.opened.file} has {done} rows, but had {piece.rows} when it was "
                    f"opened; the file changed or is damaged: rewrite it, then reopen the dataset"
                )
        except (BadFileError, FileNotFoundError) as error:
            if not self.skip:
                raise
            report_skipped(
                self.skipped, Skipped(str(piece.opened.file), str(piece), max(piece.rows - done, 0), str(error))
            )

    def no_rows(self) -> Rows:
        """Return an empty set of rows."""
        opened = self.pieces[0].opened
        none = pa.RecordBatch.from_arrays(
            [pa.array([], opened.type_of(name)) for name in self.read_columns], names=list(self.read_columns)
        )
        return self._rows(self._clean(none, str(opened.file), ""))

    def _clean(self, batch: Array, file: str, rows: str) -> list[Array]:
        arrays = []
        for name, each in self.converters.items():
            array = _source(batch, name, each.spec)
            arrays.append(self.cleaners.get((name, array.type), each).clean(array, Place(name, file, rows)))
        return arrays

    def _rows(self, arrays: list[Array]) -> Rows:
        return Rows.of(pa.RecordBatch.from_arrays(arrays, names=list(self.converters)), self.converters)

    def _filtered(self, piece: Piece, columns: Sequence[str], rows: int, threads: bool = False) -> Iterator[Array]:
        decoded = piece.opened.read(piece.number, columns, rows, threads)
        try:
            for batch in decoded:
                condition = piece.opened.condition
                filtered = batch if condition is None else condition(batch, str(piece.opened.file))
                if filtered.num_rows:
                    yield filtered
        except PermissionError:
            raise
        except FileNotFoundError as error:
            raise missing_file(str(piece.opened.file), error) from error
        except DAMAGE as error:
            raise unreadable_piece(str(piece), str(piece.opened.file), error) from error

    def count(self, piece: Piece) -> int:
        """Return the number of rows of a piece after the filter; reads only the columns needed to count them.

        Raises:
            BadFileError: The file is damaged.
        """
        columns = self.filter_columns or self.read_columns[:1]
        return sum(batch.num_rows for batch in self._filtered(piece, columns, _COUNTED_ROWS))


def joint_types(
    opened: Sequence[OpenedFile], specs: Mapping[str, Column | None]
) -> tuple[dict[str, ArrowType], dict[str, dict[ArrowType, Source]]]:
    """Return the joint type of each column, and its types in the files, each with the first file that has it.

    Raises:
        ValueError: Files disagree on the type of a column, or none has it.
    """
    joint: dict[str, ArrowType] = {}
    types_of: dict[str, dict[ArrowType, Source]] = {}
    for name, spec in specs.items():
        # An explicit spec reads all types that it can convert.
        parses = isinstance(spec, Dense | Ragged) and (spec.unit or spec.format or spec.scale is not None)
        explicit = bool(parses) or (isinstance(spec, Dense | Ragged | Weighted) and spec.dtype is not None)
        types = types_of[name] = {}
        for each in opened:
            file_type = each.type_for(name, spec)
            if file_type in types:
                continue
            types[file_type] = each.file
            unified = unified_type(joint[name], file_type, explicit=explicit) if name in joint else file_type
            if unified is None:
                first_type, first_file = next(iter(types.items()))
                raise ValueError(
                    f"columnio: files must agree on the type of a column, but {name!r} is {first_type} in {first_file} "
                    f"and {file_type} in {each.file}; use a spec that reads both (Dense(torch.float64) for any "
                    f"numbers, Text() for any text files), read the files separately, or rewrite one of them"
                )
            joint[name] = unified
    return joint, types_of


def sources_of(name: str, spec: Column | None) -> list[str]:
    """Return the columns of a file that form a column of a batch."""
    return [name, spec.weights] if isinstance(spec, Weighted) and spec.weights is not None else [name]


def _source(batch: Array, name: str, spec: Column) -> Array:
    first, *second = (batch.column(source) for source in sources_of(name, spec))
    return pa.StructArray.from_arrays([first, second[0]], names=["id", "weight"]) if second else first


def report_skipped(skipped: list[Skipped], entry: Skipped) -> None:
    """Record a skipped piece, and warn."""
    skipped.append(entry)
    warnings.warn(f"columnio: skipped {entry.piece} of {entry.file}: {entry.reason}", RuntimeWarning, stacklevel=3)
