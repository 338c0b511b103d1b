"""Files of one JSON object a line, whole. Imports pyarrow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from .protocol import Contents
from .text import TOO_LARGE, is_whole, needs_uint64, other_type, remedy, replaced

NAME, PIECE = "JSON lines", "block"

_NO_VALUE = re.compile(r"Failed to convert JSON to (.+?), couldn't parse:(.*)", re.DOTALL)
_OTHER_KIND = re.compile(r"Column\(/([^/)]*).*\) changed from (\w+) to (\w+)")
# How much pyarrow reads at a time, in the first of which it finds the types.
_BLOCK = 1 << 20


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See `Format`."""
    types = dict(types)
    while True:
        try:
            with file.stream() as source:
                schema = pj.open_json(source, parse_options=_parse(types, "infer")).schema
            return Contents(_exact(file, schema, types), [None])
        except pa.ArrowInvalid as error:
            if "Empty JSON" in str(error):
                return Contents(None, [])
            found = _NO_VALUE.search(str(error))
            column = None if found is None else _column(file, types, str(error))
            if found is None or column is None or found[1] != "int64" or not needs_uint64(found[2]):
                raise _refused(file, types, error) or error from error
            # An id is its bits.
            types[column] = replaced(types[column], pa.int64(), lambda *_: pa.uint64())


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See `Format`."""
    # The types of the first block hold for all, and what is not asked for is skipped.
    types = {name: contents.schema.field(name).type for name in columns}
    try:
        yield from _batches(file, types, threads)
    except pa.ArrowInvalid as error:
        raise _refused(file, types, error) or error from error


def _batches(file: Any, types: Mapping[str, Any], threads: bool = False) -> Iterator[Any]:
    with file.stream() as source:
        yield from pj.open_json(
            source,
            read_options=pj.ReadOptions(use_threads=threads),
            parse_options=_parse(types, "ignore"),
        )


def _exact(file: Any, schema: Any, types: Mapping[str, Any]) -> Any:
    """Returns the schema with other types for integers that were taken for floats, being too large for int64."""
    block = b""

    def exact(name: str, made: Any, way: tuple[str, ...]) -> Any:
        nonlocal block
        if not block:
            with file.stream() as source:
                block = source.read(_BLOCK)
            if len(block) == _BLOCK:
                # The last line is cut off.
                block = block[: block.rfind(b"\n") + 1]
        try:
            pj.open_json(pa.BufferReader(block), parse_options=_parse({name: made}, "ignore"))
        except pa.ArrowInvalid as error:
            found = _NO_VALUE.search(str(error))
            whole = found is not None and is_whole(found[2]) and not _has_floats(block, (name, *way))
            return TOO_LARGE if whole else pa.float64()
        return pa.uint64()

    def field(each: Any) -> Any:
        if each.name in types:
            return each
        return each.with_type(replaced(each.type, pa.float64(), lambda *found: exact(each.name, *found)))

    return pa.schema([field(each) for each in schema])


def _has_floats(block: bytes, way: tuple[str, ...]) -> bool:
    """Returns whether one of the values at that place is no integer."""
    values = [json.loads(line) for line in block.splitlines() if line.strip()]
    for step in way:
        there = (value for value in values if value is not None)
        values = [item for value in there for item in (value if step == "[]" else [value.get(step)])]
    return any(isinstance(value, float) for value in values)


def _column(file: Any, types: Mapping[str, Any], message: str) -> str | None:
    """Returns the column that an error is of, which does not name it."""
    for name, arrow_type in types.items():
        try:
            for _ in _batches(file, {name: arrow_type}):
                pass
        except pa.ArrowInvalid as error:
            if str(error) == message:
                return name
    return None


def _refused(file: Any, types: Mapping[str, Any], error: Exception) -> ValueError | None:
    """Returns the error for a value of another type than its column; None where the file is damaged."""
    if (kinds := _OTHER_KIND.search(str(error))) is not None:
        return other_type(
            file, kinds[1], f"has values of JSON that are a {kinds[2]} and a {kinds[3]}", "write the file anew with one"
        )
    if (found := _NO_VALUE.search(str(error))) is None or (name := _column(file, types, str(error))) is None:
        return None
    wanted, value = found[1], found[2]
    lists = pa.types.is_list(types[name])
    advice = remedy(wanted, value, lists=lists, quoted=False)
    return other_type(file, name, f"has the value {value!r}, which is no {wanted}", advice)


def _parse(types: Mapping[str, Any], others: str) -> Any:
    schema = pa.schema(list(types.items())) if types else None
    return pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
