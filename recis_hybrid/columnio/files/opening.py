"""Opening of files: their columns and pieces, before any row is read. Imports pyarrow."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa

from recis_hybrid.columnio.columns import Column
from recis_hybrid.columnio.convert.convert import converter
from recis_hybrid.columnio.convert.numbers import ArrowType, Place, a_few
from recis_hybrid.columnio.convert.spec_types import type_hints
from recis_hybrid.columnio.errors import BadFileError, Skipped, incomplete_file
from recis_hybrid.columnio.files.file_set import (
    DAMAGE,
    FileSet,
    OpenedFile,
    Piece,
    joint_types,
    report_skipped,
    sources_of,
)
from recis_hybrid.columnio.files.filters import Filters, RowFilter
from recis_hybrid.columnio.files.memory_file import MemoryFile
from recis_hybrid.columnio.files.paths import Paths, Source, find_files
from recis_hybrid.columnio.options import ReadOptions

T = TypeVar("T")
R = TypeVar("R")

# Number of threads that read footers, which may be remote.
_OPENERS = 8


def open_files(
    paths: Paths | MemoryFile,
    columns: Sequence[str] | Mapping[str, Column | None],
    filters: Filters = None,
    options: ReadOptions | None = None,
) -> FileSet:
    """Find the columns and pieces of all files.

    Of Parquet files, only the footers are read. Counting rows may take more: the filter columns of each piece that
    footers and folder names cannot rule out, and one column of Arrow, CSV and JSON files, and of ORC files with several
    stripes.

    Args:
        paths: Files, or data in memory.
        columns: Names, or specs by name; None means the default spec of the column's type.
        filters: Rows to read; None for all.
        options: How to read.

    Raises:
        BadFileError: A file is damaged.
        FileNotFoundError: A file does not exist.
        TypeError: A spec cannot read its column.
        ValueError: A column is missing, or files disagree on the type of a column.
    """
    options = options or ReadOptions()
    specs = _specs(columns)
    files = [paths] if isinstance(paths, MemoryFile) else find_files(paths, options)
    row_filter = None if filters is None else RowFilter.of(filters)
    skip, skipped = options.on_bad_file == "skip", list[Skipped]()
    opened = _inspect(files, type_hints(specs), skip, skipped)
    if not opened:
        return FileSet((), {}, {}, row_filter, (), (), skip, skipped)
    if row_filter is not None:
        opened = [replace(each, condition=row_filter.bound(each)) for each in opened]
    filter_columns = list(dict.fromkeys(name for each in opened if each.condition for name in each.condition.columns))
    sources = [source for name, spec in specs.items() for source in sources_of(name, spec)]
    read_columns = list(dict.fromkeys([*sources, *filter_columns]))
    _check_present(opened, read_columns)
    joint, types_of = joint_types(opened, specs)
    converters = {name: converter(spec, joint[name], Place(name, str(opened[0].file))) for name, spec in specs.items()}
    cleaners = {
        (name, file_type): converters[name]
        if file_type == joint[name]
        else converter(converters[name].spec, file_type, Place(name, str(file)), joint[name])
        for name, types in types_of.items()
        for file_type, file in types.items()
    }
    file_set = FileSet((), converters, cleaners, row_filter, read_columns, filter_columns, skip, skipped)
    return replace(file_set, pieces=[piece for piece in _pieces(opened, file_set) if piece.rows])


def _specs(columns: Sequence[str] | Mapping[str, Column | None]) -> dict[str, Column | None]:
    """Return the spec of each column; None for a spec that is inferred from the file."""
    if isinstance(columns, str):
        raise TypeError(f"ColumnDataset: columns must be names, or specs by name, got a str; write [{columns!r}]")
    names = list(columns) if isinstance(columns, Iterable) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"ColumnDataset: columns must be names, or specs by name, got {reprlib.repr(columns)}; name the columns to "
            f"read"
        )
    specs = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(names)
    if not specs:
        raise ValueError("ColumnDataset: columns must name at least one column, got none")
    if len(specs) != len(names):
        raise ValueError(f"ColumnDataset: columns must be unique, got {names}")
    return specs


def _inspect(
    files: Sequence[Source], hints: Mapping[str, ArrowType], skip: bool, skipped: list[Skipped]
) -> list[OpenedFile]:
    partition: dict[str, ArrowType] = {}
    for file in files:
        for name, value in file.partition.items():
            if value is not None or name not in partition:
                partition[name] = pa.int64() if isinstance(value, int) else pa.string()

    def inspect(file: Source) -> OpenedFile:
        file_format = file.format
        stamp = file.stamp()
        try:
            contents = file_format.inspect(file, hints)
        except (FileNotFoundError, PermissionError):
            raise
        except DAMAGE as error:
            raise incomplete_file(file, file_format.NAME, error) from error
        return OpenedFile(file, contents, {name: partition[name] for name in file.partition}, stamp)

    def on_bad(file: Source, error: Exception) -> None:
        report_skipped(skipped, Skipped(str(file), "all", 0, str(error)))

    # A text file without rows has no columns, and is not required to have those of the others.
    opened = _map_in_threads(inspect, files, on_bad if skip else None)
    return [each for each in opened if each.contents.schema is not None]


def _check_present(opened: Sequence[OpenedFile], columns: Sequence[str]) -> None:
    """Raise if the sampled rows of all files lack one of the columns."""
    for name in columns:
        if all(name in each.contents.absent for each in opened):
            names = [each for each in opened[0].contents.schema.names if each not in opened[0].contents.absent]
            raise ValueError(
                f"columnio: no row at the beginning of {opened[0].file} or of the other files has a column {name!r}; "
                f"use one of {a_few(names)}"
            )


def _pieces(opened: Sequence[OpenedFile], files: FileSet) -> list[Piece]:
    candidates: list[tuple[Piece, bool]] = []
    for each in opened:
        sizes = each.contents.sizes
        numbers = range(len(sizes)) if files.row_filter is None else files.row_filter.possible_pieces(each, len(sizes))
        for number in numbers:
            size = None if files.row_filter is not None else sizes[number]
            candidates.append((Piece(each, number, size or 0), size is None))

    def count(candidate: tuple[Piece, bool]) -> Piece:
        piece, unknown = candidate
        return replace(piece, rows=files.count(piece)) if unknown else piece

    def on_bad(candidate: tuple[Piece, bool], error: Exception) -> None:
        piece = candidate[0]
        report_skipped(files.skipped, Skipped(str(piece.opened.file), str(piece), 0, str(error)))

    return _map_in_threads(count, candidates, on_bad if files.skip else None)


def _map_in_threads(
    function: Callable[[T], R], items: Sequence[T], on_bad: Callable[[T, Exception], None] | None
) -> list[R]:
    """Return the results of a function in order, without damaged files, which go to ``on_bad``; None raises instead."""
    results = []
    with ThreadPoolExecutor(_OPENERS, thread_name_prefix="recis-columnio-open") as pool:
        for item, future in [(item, pool.submit(function, item)) for item in items]:
            try:
                results.append(future.result())
            except (BadFileError, FileNotFoundError) as error:
                if on_bad is None:
                    raise
                on_bad(item, error)
    return results
