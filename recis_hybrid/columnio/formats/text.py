"""Values of text files that do not fit the type of their column, and integers that do not fit into int64."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

_WHOLE = re.compile(r"\s*-?[0-9]+\s*")


BLOCK_SIZES = (1 << 20, 1 << 24, 1 << 28)
"""Bytes that pyarrow parses at a time; the next size is tried if a row is longer."""


def is_row_too_long(error: Exception) -> bool:
    """Return whether an error of pyarrow means that a row is longer than a block."""
    return "straddling object straddles two block boundaries" in str(error)


def skip_rows(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield batches without their first ``count`` rows, to continue a scan that was restarted with other types."""
    for batch in batches:
        if count >= batch.num_rows:
            count -= batch.num_rows
            continue
        yield batch.slice(count)
        count = 0


def is_whole(value: str) -> bool:
    """Return whether a text is an integer."""
    return _WHOLE.fullmatch(value) is not None


def needs_uint64(value: str) -> bool:
    """Return whether a text is an integer that fits into uint64 but not into int64."""
    return is_whole(value) and 2**63 <= int(value) < 2**64


def replace_type(arrow_type: Any, old: Any, choose: Callable[[Any, tuple[str, ...]], Any]) -> Any:
    """Return a type in which a value type is replaced at any depth.

    Args:
        arrow_type: A type, possibly nested in lists and structs.
        old: The value type to replace.
        choose: Returns the new value type at one place. It is called with the whole type as it would be with uint64
            there, and with the path to the place: names of fields, and ``"[]"`` for the values of a list.
    """
    return _replace_type(arrow_type, old, choose, lambda new: new, ())


def _replace_type(
    arrow_type: Any,
    old: Any,
    choose: Callable[[Any, tuple[str, ...]], Any],
    whole: Callable[[Any], Any],
    path: tuple[str, ...],
) -> Any:
    if arrow_type == old:
        return choose(whole(pa.uint64()), path)
    if pa.types.is_list(arrow_type):
        return pa.list_(
            _replace_type(arrow_type.value_type, old, choose, lambda new: whole(pa.list_(new)), (*path, "[]"))
        )
    if not pa.types.is_struct(arrow_type):
        return arrow_type
    fields = list(arrow_type)
    for number, field in enumerate(fields):

        def with_field(new: Any, number: int = number, field: Any = field) -> Any:
            return whole(pa.struct([*fields[:number], field.with_type(new), *fields[number + 1 :]]))

        new = _replace_type(field.type, old, choose, with_field, (*path, field.name))
        fields[number] = field.with_type(new)
    return pa.struct(fields)


def mixed_types_error(file: Any, column: str, problem: str, remedy: str) -> ValueError:
    """Return the error for a column with values of several types; the file is not damaged, so it is never skipped.

    Args:
        file: The file.
        column: Name of the column.
        problem: The value or type that does not fit.
        remedy: Advice to the user.
    """
    return ValueError(
        f"columnio: column {column!r} of {file} {problem}; a column of a text file has the type of its spec, or "
        f"otherwise that of its first rows: {remedy}"
    )


def remedy(type_name: str, value: str, *, lists: bool = False, quoted: bool = True) -> str:
    """Return advice for a value that does not fit the type of its column.

    Args:
        type_name: Name of the Arrow type.
        value: The value.
        lists: Whether the column has lists.
        quoted: Whether numbers can be read as strings too.
    """
    number = "Ragged" if lists else "Dense"
    integers = type_name.startswith(("int", "uint"))
    if integers and is_whole(value):
        if -(2**63) <= int(value) < 2**63 and type_name != "uint64":
            return f"read it as {number}(torch.int64)"
        return "write 64-bit integers as Parquet, or as strings and read them as Text()"
    if integers and _is_number(value):
        return f"read it as {number}(torch.float32)"
    if type_name == "null":
        return f"all values before it are nulls, so the spec must give a type: {number}(torch.int64), or Text()"
    if not quoted:
        return "rewrite the file with one type"
    return f'read it as Text(), or as {number}(unit="s") if it is a date or time, or rewrite the file with one type'


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
