"""Files of any format with the same columns, as pieces in order, and the rows of a piece, clean. Imports pyarrow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from .columns import Column, Weighted
from .convert import Converter
from .errors import BadFileError, Skipped, cannot_be_read, changed, vanished
from .filters import RowFilter
from .formats import Contents, Format, format_of
from .numbers import Array, ArrowType, Place, a_few
from .paths import File
from .rows import Rows

DAMAGE = (OSError, pa.ArrowException)
"""What pyarrow raises for files that it cannot read."""

_COUNTED_ROWS = 65_536


@dataclass(frozen=True)
class OpenedFile:
    """A file whose columns are known."""

    file: File
    contents: Contents
    partition: Mapping[str, ArrowType]
    """The columns that its folders' names hold, and their types."""
    stamp: tuple[int | None, int | None] | None = None
    """What `File.stamp` returned before its contents were looked at."""

    @property
    def format(self) -> Format:
        """How it is read; looked up, since a module cannot go to another process."""
        return format_of(self.file.name)

    @property
    def schema(self) -> ArrowType:
        """The columns of the file, and of its folders' names where the file has none of that name."""
        schema = self.contents.schema
        return pa.schema(
            [*schema, *(pa.field(*item) for item in self.partition.items() if item[0] not in schema.names)]
        )

    def type_of(self, name: str) -> ArrowType:
        """Returns the type of a column.

        Raises:
            ValueError: There is none of that name, or more than one.
        """
        found = self.schema.get_all_field_indices(name)
        if len(found) == 1:
            return self.schema.field(found[0]).type
        if found:
            raise ValueError(
                f"columnio: {self.file} has {len(found)} columns named {name!r}; give each a name of its own"
            )
        raise ValueError(
            f"columnio: {self.file} has no column {name!r}, it has {a_few(self.schema.names)}; name one of these, or "
            f"write the file anew with it"
        )

    def read(self, piece: int, columns: Sequence[str], rows: int, threads: bool) -> Iterator[Array]:
        """Yields the rows of a piece with the columns of the file and of its folders' names.

        Raises:
            BadFileError: The file was written anew since it was opened; no row that was read later is yielded.
        """
        own = [name for name in columns if name in self.contents.schema.names]
        # With no column at all there would be no number of rows.
        asked = own or self.contents.schema.names[:1]
        for batch in self._unchanged(self.format.read(self.file, self.contents, piece, asked, rows, threads)):
            if own and batch.schema.names == list(columns):
                yield batch
                continue
            arrays = [
                batch.column(name)
                if name in own
                else pa.repeat(pa.scalar(self.file.partition[name], self.partition[name]), batch.num_rows)
                for name in columns
            ]
            yield pa.RecordBatch.from_arrays(arrays, names=list(columns)) if columns else batch

    def _unchanged(self, decoded: Iterator[Array]) -> Iterator[Array]:
        """Yields what is decoded while the file is the one that was opened.

        Another file's bytes, read by the places and types of this one, may come out as numbers like any others.
        """
        looked = False
        try:
            for batch in decoded:
                # After the bytes were read. Far away each look is a request, and objects are replaced as a whole.
                if self.file.is_local or not looked:
                    self._check()
                looked = True
                yield batch
        except BadFileError:
            raise
        except (*DAMAGE, ValueError):
            # What cannot be read is no damage where another file was read.
            self._check()
            raise

    def _check(self) -> None:
        # One that was removed is what it was as long as it is open.
        if (now := self.file.stamp()) is not None and now != self.stamp:
            raise changed(str(self.file))


@dataclass(frozen=True)
class Piece:
    """What is read at once: a row group, stripe or record batch of a file, or all of one that has none of these."""

    opened: OpenedFile = field(repr=False)
    """The file."""
    number: int
    """Which of the file's pieces."""
    rows: int
    """How many rows of it are wanted."""

    def __str__(self) -> str:
        return f"{self.opened.format.PIECE} {self.number}"


@dataclass(frozen=True)
class Files:
    """Files with the same columns, as pieces in order, and how to read the columns."""

    pieces: Sequence[Piece]
    """All pieces that have rows, file by file."""
    converters: Mapping[str, Converter]
    """How each column is read, by name, in the order in which a batch has them."""
    row_filter: RowFilter | None
    """Which rows are wanted; None for all."""
    needed: Sequence[str]
    """The columns to read, those that only the filter looks at included."""
    looked_at: Sequence[str]
    """The columns that the filter looks at."""
    skip: bool
    """Whether to go on past what is damaged."""
    skipped: list[Skipped] = field(default_factory=list)
    """What was damaged and left out."""

    def read(self, piece: Piece, rows: int, threads: bool = False) -> Iterator[Rows]:
        """Yields the wanted rows of a piece in order, about `rows` of them at a time.

        Args:
            piece: Which.
            rows: How many rows to decode at a time.
            threads: Whether Arrow may decode in its threads.

        Raises:
            BadFileError: The file is damaged or was changed. Where damage is skipped, the rest is left out.
            FileNotFoundError: The file has vanished; where damage is skipped, its rows are left out.
            ValueError: A column holds what its spec does not allow.
        """
        done = 0
        try:
            for batch in self._wanted(piece, self.needed, rows, threads):
                place = f"{piece}, rows {done} to {done + batch.num_rows - 1} of it"
                arrays = [
                    each.clean(_source(batch, name, each.spec), Place(name, str(piece.opened.file), place))
                    for name, each in self.converters.items()
                ]
                done += batch.num_rows
                if done > piece.rows:
                    break
                yield self._rows(arrays)
            if done != piece.rows:
                raise BadFileError(
                    f"columnio: {piece} of {piece.opened.file} has {done} rows where it had {piece.rows} when it was "
                    f"opened; the file was changed or is damaged: write it anew, then open the dataset again"
                )
        except (BadFileError, FileNotFoundError) as error:
            if not self.skip:
                raise
            leave_out(self.skipped, Skipped(str(piece.opened.file), str(piece), max(piece.rows - done, 0), str(error)))

    def empty(self) -> Rows:
        """Returns no rows."""
        schema = self.pieces[0].opened.schema
        none = pa.RecordBatch.from_arrays(
            [pa.array([], schema.field(name).type) for name in self.needed], names=list(self.needed)
        )
        arrays = [each.clean(_source(none, name, each.spec), Place(name, "")) for name, each in self.converters.items()]
        return self._rows(arrays)

    def _rows(self, arrays: list[Array]) -> Rows:
        return Rows.of(pa.RecordBatch.from_arrays(arrays, names=list(self.converters)), self.converters)

    def _wanted(self, piece: Piece, columns: Sequence[str], rows: int, threads: bool = False) -> Iterator[Array]:
        decoded = piece.opened.read(piece.number, columns, rows, threads)
        try:
            for batch in decoded:
                wanted = batch if self.row_filter is None else self.row_filter(batch)
                if wanted.num_rows:
                    yield wanted
        except PermissionError:
            raise
        except FileNotFoundError as error:
            raise vanished(str(piece.opened.file), error) from error
        except DAMAGE as error:
            raise cannot_be_read(str(piece), str(piece.opened.file), error) from error

    def count(self, piece: Piece) -> int:
        """Reads a piece for the number of its wanted rows, and no more of it than that takes.

        Raises:
            BadFileError: The file is damaged.
        """
        columns = self.looked_at or self.needed[:1]
        return sum(batch.num_rows for batch in self._wanted(piece, columns, _COUNTED_ROWS))


def sources_of(name: str, spec: Column | None) -> list[str]:
    """Returns the columns of a file that a column of a batch is made of."""
    return [name, spec.weights] if isinstance(spec, Weighted) and spec.weights is not None else [name]


def _source(batch: Array, name: str, spec: Column) -> Array:
    own, *other = (batch.column(source) for source in sources_of(name, spec))
    return pa.StructArray.from_arrays([own, other[0]], names=["id", "weight"]) if other else own


def leave_out(skipped: list[Skipped], what: Skipped) -> None:
    """Notes and reports what is left out."""
    skipped.append(what)
    warnings.warn(f"columnio: left out {what.piece} of {what.file}: {what.reason}", RuntimeWarning, stacklevel=3)
