"""Finds the columns and pieces of files before their rows are read. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa

from recis_hybrid.columnio.columns import Column, Dense, Ragged, Weighted
from recis_hybrid.columnio.convert.convert import converter
from recis_hybrid.columnio.convert.numbers import ArrowType, Place, a_few
from recis_hybrid.columnio.csv_options import CsvOptions
from recis_hybrid.columnio.errors import BadFileError, Skipped, not_whole
from recis_hybrid.columnio.files.file_set import DAMAGE, Files, OpenedFile, Piece, leave_out, sources_of
from recis_hybrid.columnio.files.filters import RowFilter
from recis_hybrid.columnio.files.hints import type_hints
from recis_hybrid.columnio.files.paths import File
from recis_hybrid.columnio.files.unify import unified

T = TypeVar("T")
R = TypeVar("R")

# Threads that wait for footers, of which many may lie far away.
_OPENERS = 8


def open_files(
    files: Sequence[File],
    columns: Mapping[str, Column | None],
    *,
    row_filter: RowFilter | None = None,
    skip: bool = False,
    csv: CsvOptions | None = None,
) -> Files:
    """Find the columns and pieces of all files.

    Of Parquet only footers are read for that. What has to be read for the number of its rows is: the columns that a
    filter looks at, wherever footers and folders' names do not rule a piece out; and one column of Arrow, CSV, JSON and
    ORC of several stripes.

    Args:
        files: The files.
        columns: The wanted columns; None instead of a spec takes what suits the column's type.
        row_filter: Which rows are wanted; None for all.
        skip: Whether to go on past damaged files.
        csv: Dialect of CSV files; None takes the usual one.

    Raises:
        BadFileError: A file is damaged.
        TypeError: A column cannot be read by its spec.
        ValueError: A column is missing, or files disagree about a column's type.
    """
    skipped: list[Skipped] = []
    opened = _inspect(files, type_hints(columns), skip, skipped, csv)
    if not opened:
        return Files((), {}, {}, row_filter, (), (), skip, skipped)
    if row_filter is not None:
        opened = [replace(each, condition=row_filter.bound(each)) for each in opened]
    looked_at = list(dict.fromkeys(name for each in opened if each.condition for name in each.condition.columns))
    needed = list(dict.fromkeys(source for name, spec in columns.items() for source in sources_of(name, spec)))
    needed += [name for name in looked_at if name not in needed]
    for name in needed:
        if all(name in each.contents.absent for each in opened):
            names = [each for each in opened[0].contents.schema.names if each not in opened[0].contents.absent]
            raise ValueError(
                f"columnio: no row at the beginning of {opened[0].file}, nor of the others, has a column {name!r}; "
                f"name one of {a_few(names)}"
            )
    joint, found = _types(opened, columns)
    converters = {
        name: converter(spec, joint[name], Place(name, str(opened[0].file))) for name, spec in columns.items()
    }
    cleaners = {
        (name, own): converters[name]
        if own == joint[name]
        else converter(converters[name].spec, own, Place(name, str(file)), joint[name])
        for name, types in found.items()
        for own, file in types.items()
    }
    made = Files((), converters, cleaners, row_filter, needed, looked_at, skip, skipped)
    return replace(made, pieces=[piece for piece in _pieces(opened, made) if piece.rows])


def _inspect(
    files: Sequence[File],
    hints: Mapping[str, ArrowType],
    skip: bool,
    skipped: list[Skipped],
    csv: CsvOptions | None,
) -> list[OpenedFile]:
    partition: dict[str, ArrowType] = {}
    for file in files:
        for name, value in file.partition.items():
            if value is not None or name not in partition:
                partition[name] = pa.int64() if isinstance(value, int) else pa.string()

    def opened(file: File) -> OpenedFile:
        file = replace(file, csv=csv) if isinstance(file, File) else file
        used = file.format
        stamp = file.stamp()
        try:
            contents = used.inspect(file, hints)
        except (FileNotFoundError, PermissionError):
            raise
        except DAMAGE as error:
            raise not_whole(file, used.NAME, error) from error
        return OpenedFile(file, contents, {name: partition[name] for name in file.partition}, stamp)

    def bad(file: File, error: Exception) -> None:
        leave_out(skipped, Skipped(str(file), "all", 0, str(error)))

    # A text file without a line of values has no columns, and no rows to miss them.
    return [each for each in _each(opened, files, bad if skip else None) if each.contents.schema is not None]


def _pieces(opened: Sequence[OpenedFile], files: Files) -> list[Piece]:
    possible: list[tuple[Piece, bool]] = []
    for each in opened:
        sizes = each.contents.sizes
        numbers = range(len(sizes)) if files.row_filter is None else files.row_filter.possible(each, len(sizes))
        for number in numbers:
            size = None if files.row_filter is not None else sizes[number]
            possible.append((Piece(each, number, size or 0), size is None))

    def counted(item: tuple[Piece, bool]) -> Piece:
        piece, unknown = item
        return replace(piece, rows=files.count(piece)) if unknown else piece

    def bad(item: tuple[Piece, bool], error: Exception) -> None:
        leave_out(files.skipped, Skipped(str(item[0].opened.file), str(item[0]), 0, str(error)))

    return _each(counted, possible, bad if files.skip else None)


def _each(work: Callable[[T], R], things: Sequence[T], bad: Callable[[T, Exception], None] | None) -> list[R]:
    """Return what work makes of each thing, in order, but of those that are damaged; None for bad lets none be."""
    made = []
    with ThreadPoolExecutor(_OPENERS, thread_name_prefix="recis-columnio-open") as pool:
        for thing, future in [(thing, pool.submit(work, thing)) for thing in things]:
            try:
                made.append(future.result())
            except (BadFileError, FileNotFoundError) as error:
                if bad is None:
                    raise
                bad(thing, error)
    return made


def _types(
    opened: Sequence[OpenedFile], columns: Mapping[str, Column | None]
) -> tuple[dict[str, ArrowType], dict[str, dict[ArrowType, File]]]:
    """Return the joint type of each column, and its types in the files, each with the first such file."""
    joint: dict[str, ArrowType] = {}
    found: dict[str, dict[ArrowType, File]] = {}
    for name, spec in columns.items():
        # A spec that says what it wants takes it from whatever type a file holds it in.
        parses = isinstance(spec, Dense | Ragged) and (spec.unit or spec.format or spec.scale is not None)
        asked = bool(parses) or (isinstance(spec, Dense | Ragged | Weighted) and spec.dtype is not None)
        types = found[name] = {}
        for each in opened:
            own = each.type_for(name, spec)
            if own in types:
                continue
            types[own] = each.file
            before = joint.setdefault(name, own)
            together = unified(before, own, asked=asked)
            if together is None:
                other = next(file for arrow_type, file in types.items() if arrow_type != own)
                raise ValueError(
                    f"columnio: files must agree about their columns, and {name!r} is "
                    f"{next(iter(types))} in {other} but {own} in {each.file}; give it a spec with a dtype that "
                    f"reads both, as Dense(torch.float64) does of all numbers and Text() of whatever text files hold, "
                    f"read them apart, or write one of them anew"
                )
            joint[name] = together
    return joint, found
