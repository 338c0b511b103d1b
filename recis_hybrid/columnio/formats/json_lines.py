"""Files with one JSON object per line, as one piece. Imports pyarrow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from recis_hybrid.columnio.convert.numbers import TOO_LARGE
from recis_hybrid.columnio.formats.protocol import Contents
from recis_hybrid.columnio.formats.text import (
    BLOCK_SIZES,
    is_row_too_long,
    is_whole,
    mixed_types_error,
    needs_uint64,
    remedy,
    replace_type,
    skip_rows,
)

NAME, PIECE = "JSON lines", "block"

_NO_VALUE = re.compile(r"Failed to convert JSON to (.+?), couldn't parse:(.*)", re.DOTALL)
_OTHER_KIND = re.compile(r"Column\(/([^/)]*).*\) changed from (\w+) to (\w+)")
# Holds every 64-bit integer, even if written as 1.0.
_NUMBER = pa.decimal128(38, 15)


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See ``Format``."""
    types, loose, block = dict(types), dict[str, Any](), 0
    while True:
        try:
            with file.stream() as source:
                first = next(iter(pj.open_json(source, _read(block), _parse({**types, **loose}, "infer"))))
            schema = first.schema
            for name in loose:
                schema = schema.set(schema.get_field_index(name), pa.field(name, types[name]))
            # pyarrow creates a column for each given type, even if no row has one of that name.
            absent = {name for name in types if name in schema.names and first.column(name).null_count == len(first)}
            if absent:
                present = {key for row in _first_rows(file, BLOCK_SIZES[block]) for key in row}
                absent -= present
                # A dotted name may be a field of an object, which is itself a column.
                nested = {name for name in absent if name.partition(".")[0] in present}
                schema, absent = pa.schema([each for each in schema if each.name not in nested]), absent - nested
            return Contents(_with_large_integers(file, schema, types), [None], absent=frozenset(absent))
        except pa.ArrowInvalid as error:
            if "Empty JSON" in str(error):
                return Contents(None, [])
            if is_row_too_long(error) and block + 1 < len(BLOCK_SIZES):
                block += 1
                continue
            match = _NO_VALUE.search(str(error))
            column = None if match is None else _column(file, {**types, **loose}, str(error))
            if match is not None and column is not None and match[1] == "int64" and needs_uint64(match[2]):
                # Ids keep their 64 bits, signed or not.
                types[column] = replace_type(types[column], pa.int64(), lambda *_: pa.uint64())
            elif (looser := _loose(file, types, loose, error)) is not None:
                loose |= looser
            elif (deeper := _OTHER_KIND.search(str(error))) is not None and deeper[3] == "array" and deeper[1] in types:
                # A spec does not state the depth of nested lists.
                types[deeper[1]] = pa.list_(types[deeper[1]])
            else:
                raise _value_error(file, types, loose, error) or error from error


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See ``Format``."""
    # The types of the first block are used for all blocks; other columns are ignored.
    types = {name: contents.schema.field(name).type for name in columns}
    loose, block, done = dict[str, Any](), 0, 0
    while True:
        try:
            # After a failure, restart the scan with other types, and skip the rows that were already yielded.
            for batch in skip_rows(_batches(file, {**types, **loose}, threads, block), done):
                for name in loose:
                    array = _strict(file, name, batch.column(name), types[name])
                    batch = batch.set_column(batch.schema.get_field_index(name), name, array)
                done += batch.num_rows
                yield batch
            return
        except pa.ArrowInvalid as error:
            if is_row_too_long(error) and block + 1 < len(BLOCK_SIZES):
                block += 1
            elif (looser := _loose(file, types, loose, error)) is not None:
                loose |= looser
            else:
                raise _value_error(file, types, loose, error) or error from error


def _batches(file: Any, types: Mapping[str, Any], threads: bool = False, block: int = 0) -> Iterator[Any]:
    with file.stream() as source:
        yield from pj.open_json(source, _read(block, threads), _parse(types, "ignore"))


def _loose(file: Any, types: Mapping[str, Any], loose: Mapping[str, Any], error: Exception) -> dict[str, Any] | None:
    """Return a looser type for a numeric column with integers written as 1.0, or with true and false."""
    if (kinds := _OTHER_KIND.search(str(error))) is not None:
        name, value_type = kinds[1], pa.bool_()
        if {kinds[2], kinds[3]} != {"number", "boolean"}:
            return None
    else:
        match = _NO_VALUE.search(str(error))
        if match is None or not match[1].startswith(("int", "uint")) or is_whole(match[2]):
            return None
        column = _column(file, {**types, **loose}, str(error))
        if column is None:
            return None
        name, value_type = column, _NUMBER
    if name not in types or name in loose:
        return None
    looser = _with_numbers(types[name], value_type)
    return None if looser == types[name] else {name: looser}


def _with_numbers(arrow_type: Any, value_type: Any) -> Any:
    if pa.types.is_list(arrow_type):
        return pa.list_(_with_numbers(arrow_type.value_type, value_type))
    numbers = pa.types.is_integer(arrow_type) or (pa.types.is_boolean(value_type) and pa.types.is_floating(arrow_type))
    return value_type if numbers else arrow_type


def _strict(file: Any, name: str, array: Any, arrow_type: Any) -> Any:
    """Cast numbers from the type of ``_loose`` to the type of the column.

    Raises:
        ValueError: A number does not fit.
    """
    try:
        return array.cast(arrow_type)
    except pa.ArrowInvalid:
        pass
    lists = pa.types.is_list(array.type)
    while pa.types.is_list(array.type):
        array, arrow_type = array.flatten(), arrow_type.value_type
    for value in array.drop_null().to_pylist():
        try:
            pa.array([value], array.type).cast(arrow_type)
        except pa.ArrowInvalid:
            text = f"{value.normalize():f}"
            advice = remedy(str(arrow_type), text, lists=lists, quoted=False)
            raise mixed_types_error(file, name, f"has the value {text!r}, which is not {arrow_type}", advice) from None
    raise AssertionError(f"every value of {name} fits")


def _with_large_integers(file: Any, schema: Any, types: Mapping[str, Any]) -> Any:
    """Return the schema with integer types for columns read as floats only because int64 is too narrow."""
    block = b""

    def exact(name: str, candidate: Any, path: tuple[str, ...]) -> Any:
        nonlocal block
        block = block or _first_lines(file, BLOCK_SIZES[0])
        try:
            pj.open_json(pa.BufferReader(block), parse_options=_parse({name: candidate}, "ignore"))
        except pa.ArrowInvalid as error:
            match = _NO_VALUE.search(str(error))
            whole = match is not None and is_whole(match[2]) and not _has_floats(block, (name, *path))
            return TOO_LARGE if whole else pa.float64()
        return pa.uint64()

    def field(each: Any) -> Any:
        if each.name in types:
            return each
        return each.with_type(replace_type(each.type, pa.float64(), lambda *found: exact(each.name, *found)))

    return pa.schema([field(each) for each in schema])


def _first_lines(file: Any, size: int) -> bytes:
    with file.stream() as source:
        block: bytes = source.read(size)
    # The last line is incomplete.
    return block if len(block) < size else block[: block.rfind(b"\n") + 1]


def _first_rows(file: Any, size: int) -> list[Any]:
    return [json.loads(line) for line in _first_lines(file, size).splitlines() if line.strip()]


def _has_floats(block: bytes, path: tuple[str, ...]) -> bool:
    """Return whether one of the values at that path is not an integer."""
    values = [json.loads(line) for line in block.splitlines() if line.strip()]
    for step in path:
        present = (value for value in values if value is not None)
        values = [item for value in present for item in (value if step == "[]" else [value.get(step)])]
    return any(isinstance(value, float) for value in values)


def _column(file: Any, types: Mapping[str, Any], message: str) -> str | None:
    """Return the column of an error that does not name it."""
    for name, arrow_type in types.items():
        try:
            for _ in _batches(file, {name: arrow_type}):
                pass
        except pa.ArrowInvalid as error:
            if str(error) == message:
                return name
    return None


def _value_error(file: Any, types: Mapping[str, Any], loose: Mapping[str, Any], error: Exception) -> ValueError | None:
    """Return the error for a value that does not fit its column; None if the file is damaged."""
    if (kinds := _OTHER_KIND.search(str(error))) is not None:
        problem = f"has both a JSON {kinds[2]} and a JSON {kinds[3]}"
        text = "read it as Text() if all are strings, or " if kinds[3] == "string" else ""
        return mixed_types_error(file, kinds[1], problem, f"{text}rewrite the file with one type")
    if (match := _NO_VALUE.search(str(error))) is None:
        return None
    name = _column(file, {**types, **loose}, str(error))
    if name is None:
        return None
    type_name, value = match[1], match[2]
    lists = pa.types.is_list(types[name])
    advice = remedy(type_name, value, lists=lists, quoted=False)
    return mixed_types_error(file, name, f"has the value {value!r}, which is not {type_name}", advice)


def _read(block: int, threads: bool = False) -> Any:
    return pj.ReadOptions(use_threads=threads, block_size=BLOCK_SIZES[block])


def _parse(types: Mapping[str, Any], others: str) -> Any:
    schema = pa.schema(list(types.items())) if types else None
    return pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
