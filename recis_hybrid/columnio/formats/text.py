"""Values of text files that are of another type than their column, and integers that int64 does not hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa

_WHOLE = re.compile(r"\s*-?[0-9]+\s*")


def is_whole(value: str) -> bool:
    """Return whether a value is written as an integer."""
    return _WHOLE.fullmatch(value) is not None


def needs_uint64(value: str) -> bool:
    """Return whether a value is an integer that uint64 holds and int64 does not."""
    return is_whole(value) and 2**63 <= int(value) < 2**64


def replaced(arrow_type: Any, old: Any, choose: Callable[[Any, tuple[str, ...]], Any]) -> Any:
    """Return a type with other types for those values, at any depth, that are of one type.

    Args:
        arrow_type: A type, perhaps of lists and structs.
        old: The type to look for.
        choose: Gives the type for one of them, called with the whole type if that were uint64 and with the way to the
            values: names of fields, and `"[]"` for what is in a list.
    """
    return _replaced(arrow_type, old, choose, lambda made: made, ())


def _replaced(
    arrow_type: Any,
    old: Any,
    choose: Callable[[Any, tuple[str, ...]], Any],
    whole: Callable[[Any], Any],
    way: tuple[str, ...],
) -> Any:
    if arrow_type == old:
        return choose(whole(pa.uint64()), way)
    if pa.types.is_list(arrow_type):
        return pa.list_(_replaced(arrow_type.value_type, old, choose, lambda made: whole(pa.list_(made)), (*way, "[]")))
    if not pa.types.is_struct(arrow_type):
        return arrow_type
    fields = list(arrow_type)
    for number, field in enumerate(fields):

        def with_field(made: Any, number: int = number, field: Any = field) -> Any:
            return whole(pa.struct([*fields[:number], field.with_type(made), *fields[number + 1 :]]))

        made = _replaced(field.type, old, choose, with_field, (*way, field.name))
        fields[number] = field.with_type(made)
    return pa.struct(fields)


def other_type(file: Any, column: str, said: str, remedy: str) -> ValueError:
    """Return the error for a column with values of several types: the file is whole, and is not to be left out.

    Args:
        file: For its path.
        column: The column.
        said: Which value or type it has.
        remedy: What to do.
    """
    return ValueError(
        f"columnio: column {column!r} of {file} {said}; a column of text has the type that its spec says, or else that "
        f"of its first rows: {remedy}"
    )


def remedy(wanted: str, value: str, *, lists: bool = False, quoted: bool = True) -> str:
    """Return what to do about a value that is not of a column's type.

    Args:
        wanted: The type, as Arrow writes it.
        value: The value.
        lists: Whether the column is one of lists.
        quoted: Whether numbers can be read as strings, too.
    """
    number = "Ragged" if lists else "Dense"
    integers = wanted.startswith(("int", "uint"))
    if integers and is_whole(value):
        if -(2**63) <= int(value) < 2**63 and wanted != "uint64":
            return f"read it as {number}(torch.int64)"
        return "write integers of 64 bits as Parquet, or as strings, which Text() reads"
    if integers and _is_number(value):
        return f"read it as {number}(torch.float32)"
    if wanted == "null":
        return f"nothing but nulls came before it, so that its spec must say a type: {number}(torch.int64), or Text()"
    if not quoted:
        return "write the file anew with one type"
    return f'read it as Text(), or by {number}(unit="s") if it is a date or time, or write the file anew with one type'


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
