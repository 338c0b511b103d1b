"""Finds the columns and pieces of files before their rows are read. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa

from .columns import Column
from .convert import converter
from .errors import BadFileError, Skipped, not_whole
from .files import DAMAGE, Files, OpenedFile, Piece, leave_out, sources_of
from .filters import RowFilter
from .formats import format_of
from .hints import type_hints
from .numbers import ArrowType, Place
from .paths import File

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
) -> Files:
    """Finds the columns and pieces of all files.

    Of Parquet only footers are read for that. What has to be read for the number of its rows is: the columns that a
    filter looks at, wherever footers and folders' names do not rule a piece out; and one column of Arrow, CSV, JSON and
    ORC of several stripes.

    Args:
        files: The files.
        columns: The wanted columns; None instead of a spec takes what suits the column's type.
        row_filter: Which rows are wanted; None for all.
        skip: Whether to go on past damaged files.

    Raises:
        BadFileError: A file is damaged.
        TypeError: A column cannot be read by its spec.
        ValueError: A column is missing, or files disagree about a column's type.
    """
    skipped: list[Skipped] = []
    opened = _inspect(files, type_hints(columns), skip, skipped)
    if not opened:
        return Files((), {}, row_filter, (), (), skip, skipped)
    looked_at = [] if row_filter is None else row_filter.fields(opened[0].schema)
    needed = list(dict.fromkeys(source for name, spec in columns.items() for source in sources_of(name, spec)))
    needed += [name for name in looked_at if name not in needed]
    types = _types(opened, needed)
    converters = {
        name: converter(spec, _joint_type(types, name, spec), Place(name, str(opened[0].file)))
        for name, spec in columns.items()
    }
    made = Files((), converters, row_filter, needed, looked_at, skip, skipped)
    return replace(made, pieces=[piece for piece in _pieces(opened, made) if piece.rows])


def _inspect(
    files: Sequence[File], hints: Mapping[str, ArrowType], skip: bool, skipped: list[Skipped]
) -> list[OpenedFile]:
    partition: dict[str, ArrowType] = {}
    for file in files:
        for name, value in file.partition.items():
            if value is not None or name not in partition:
                partition[name] = pa.int64() if isinstance(value, int) else pa.string()

    def opened(file: File) -> OpenedFile:
        used = format_of(file.name)
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
        numbers = (
            range(len(sizes))
            if files.row_filter is None
            else files.row_filter.possible(each.file, each.schema, each.contents.footer, len(sizes))
        )
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
    """Returns what work makes of each thing, in order, but of those that are damaged; None for bad lets none be."""
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


def _types(opened: Sequence[OpenedFile], names: Sequence[str]) -> dict[str, ArrowType]:
    types: dict[str, ArrowType] = {}
    for each in opened:
        for name in names:
            found = each.type_of(name)
            if _signed(found) != _signed(types.setdefault(name, found)):
                raise ValueError(
                    f"columnio: files must agree about their columns, and {name!r} is {types[name]} in "
                    f"{opened[0].file} but {found} in {each.file}; read them apart, or write one of them anew"
                )
    return types


def _signed(arrow_type: ArrowType) -> ArrowType:
    """Returns a type with int64 in the place of uint64, which comes to the same tensor."""
    if pa.types.is_uint64(arrow_type):
        return pa.int64()
    if pa.types.is_list(arrow_type):
        return pa.list_(_signed(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        return pa.struct([field.with_type(_signed(field.type)) for field in arrow_type])
    return arrow_type


def _joint_type(types: Mapping[str, ArrowType], name: str, spec: Column | None) -> ArrowType:
    own, *other = (types[source] for source in sources_of(name, spec))
    return pa.struct([("id", own), ("weight", other[0])]) if other else own
