"""Parquet files: their columns and row groups, and the rows of one, clean. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .columns import Column
from .convert import Converter, converter
from .numbers import Array, Place, a_few


@dataclass(frozen=True)
class Piece:
    """What is read at once: one row group of one file."""

    path: Path
    """The file."""
    row_group: int
    """Which of the file's row groups."""
    rows: int
    """How many rows it has."""
    footer: Any = field(repr=False, compare=False)
    """The file's metadata, so that they are read once and not for each row group."""


@dataclass(frozen=True)
class ParquetFiles:
    """Files with the same columns, as row groups in order, and how to read the columns.

    Args:
        pieces: All row groups, file by file.
        converters: How each column is read, by name, in the order in which a batch has them.
    """

    pieces: Sequence[Piece]
    converters: Mapping[str, Converter]

    @classmethod
    def open(cls, paths: Sequence[Path], columns: Mapping[str, Column | None]) -> ParquetFiles:
        """Reads the footers of all files, and nothing of their rows.

        Args:
            paths: The files.
            columns: The wanted columns; None instead of a spec takes what suits the column's type.

        Raises:
            TypeError: A column cannot be read by its spec.
            ValueError: A file is damaged, a column is missing, or files disagree about a column's type.
        """
        pieces: list[Piece] = []
        first: dict[str, Any] = {}
        converters: dict[str, Converter] = {}
        for path in paths:
            with _open(path) as file:
                footer, schema = file.metadata, file.schema_arrow
                for name, spec in columns.items():
                    arrow_type = _type_of(name, schema, path)
                    if name not in first:
                        first[name] = arrow_type
                        converters[name] = converter(spec, arrow_type, Place(name, str(path)))
                    elif arrow_type != first[name]:
                        raise ValueError(
                            f"columnio: files must agree about their columns, and {name!r} is {first[name]} in "
                            f"{paths[0]} but {arrow_type} in {path}; read them apart, or write one of them anew"
                        )
                groups = range(footer.num_row_groups)
                pieces += [Piece(path, group, footer.row_group(group).num_rows, footer) for group in groups]
        return cls(tuple(piece for piece in pieces if piece.rows), converters)

    def read(self, piece: Piece, rows: int) -> Iterator[Array]:
        """Yields the rows of a piece in order as clean RecordBatches of at most `rows` rows.

        Args:
            piece: Which row group.
            rows: How many rows to decode at a time.

        Raises:
            ValueError: The file is damaged or was changed, or a column holds what its spec does not allow.
        """
        done = 0
        with _open(piece.path, piece.footer) as file:
            decoded = file.iter_batches(batch_size=rows, row_groups=[piece.row_group], columns=list(self.converters))
            while (batch := _next(decoded, piece)) is not None:
                place = f"row group {piece.row_group}, rows {done} to {done + batch.num_rows - 1} of it"
                arrays = [
                    each.clean(batch.column(name), Place(name, str(piece.path), place))
                    for name, each in self.converters.items()
                ]
                done += batch.num_rows
                yield pa.RecordBatch.from_arrays(arrays, names=list(self.converters))
        if done != piece.rows:
            raise ValueError(
                f"columnio: row group {piece.row_group} of {piece.path} has {done} rows where its footer said "
                f"{piece.rows}; the file was changed or is damaged: write it anew, then open the dataset again"
            )


def _open(path: Path, footer: Any = None) -> Any:
    try:
        # Where a writer left checksums a changed byte is refused; without this it would come out as another number.
        return pq.ParquetFile(path, metadata=footer, page_checksum_verification=True)
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"columnio: {path} ({path.stat().st_size} bytes) is no whole Parquet file ({error}); it was cut off while "
            f"written or copied, or is of another format: write it anew, or leave it out"
        ) from error


def _next(decoded: Iterator[Array], piece: Piece) -> Array | None:
    try:
        return next(decoded, None)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"columnio: row group {piece.row_group} of {piece.path} cannot be read ({error}); the file is damaged: "
            f"write it anew, or leave it out"
        ) from error


def _type_of(name: str, schema: Any, path: Path) -> Any:
    found = schema.get_all_field_indices(name)
    if len(found) == 1:
        return schema.field(found[0]).type
    if found:
        raise ValueError(f"columnio: {path} has {len(found)} columns named {name!r}; give each a name of its own")
    raise ValueError(
        f"columnio: {path} has no column {name!r}, it has {a_few(schema.names)}; name one of these, or write "
        f"the file anew with it"
    )
