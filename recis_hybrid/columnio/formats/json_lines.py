"""Files of one JSON object a line, whole. Imports pyarrow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from recis_hybrid.columnio.convert.numbers import TOO_LARGE
from recis_hybrid.columnio.formats.protocol import Contents
from recis_hybrid.columnio.formats.text import is_whole, needs_uint64, other_type, remedy, replaced

NAME, PIECE = "JSON lines", "block"

_NO_VALUE = re.compile(r"Failed to convert JSON to (.+?), couldn't parse:(.*)", re.DOTALL)
_OTHER_KIND = re.compile(r"Column\(/([^/)]*).*\) changed from (\w+) to (\w+)")
# How much pyarrow reads at a time, in the first of which it finds the types; more where a line is longer than that.
_BLOCK = 1 << 20
_BLOCKS = (_BLOCK, 1 << 24, 1 << 28)
# Holds every integer of 64 bits, also where it is written as 1.0.
_NUMBER = pa.decimal128(38, 15)


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See `Format`."""
    types, loose, block = dict(types), dict[str, Any](), 0
    while True:
        try:
            with file.stream() as source:
                first = next(iter(pj.open_json(source, _read(block), _parse({**types, **loose}, "infer"))))
            schema = first.schema
            for name in loose:
                schema = schema.set(schema.get_field_index(name), pa.field(name, types[name]))
            # A type that is asked for makes a column, also where no row has one of that name.
            absent = {name for name in types if name in schema.names and first.column(name).null_count == len(first)}
            if absent:
                there = {key for row in _first_rows(file, _BLOCKS[block]) for key in row}
                absent -= there
                # A field of an object is found there.
                nested = {name for name in absent if name.partition(".")[0] in there}
                schema, absent = pa.schema([each for each in schema if each.name not in nested]), absent - nested
            return Contents(_exact(file, schema, types), [None], absent=frozenset(absent))
        except pa.ArrowInvalid as error:
            if "Empty JSON" in str(error):
                return Contents(None, [])
            if _is_too_long(error) and block + 1 < len(_BLOCKS):
                block += 1
                continue
            found = _NO_VALUE.search(str(error))
            column = None if found is None else _column(file, {**types, **loose}, str(error))
            if found is not None and column is not None and found[1] == "int64" and needs_uint64(found[2]):
                # An id is its bits.
                types[column] = replaced(types[column], pa.int64(), lambda *_: pa.uint64())
            elif (found_loose := _loose(file, types, loose, error)) is not None:
                loose |= found_loose
            elif (deeper := _OTHER_KIND.search(str(error))) is not None and deeper[3] == "array" and deeper[1] in types:
                # A spec does not say how deep lists lie in lists.
                types[deeper[1]] = pa.list_(types[deeper[1]])
            else:
                raise _refused(file, types, loose, error) or error from error


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See `Format`."""
    # The types of the first block hold for all, and what is not asked for is skipped.
    types = {name: contents.schema.field(name).type for name in columns}
    loose, block, done = dict[str, Any](), 0, 0
    while True:
        try:
            skip = done
            for batch in _batches(file, {**types, **loose}, threads, block):
                # Begun again for what the first way does not read, it goes on where that ended.
                if skip >= batch.num_rows:
                    skip -= batch.num_rows
                    continue
                batch, skip = batch.slice(skip), 0
                for name in loose:
                    array = _strict(file, name, batch.column(name), types[name])
                    batch = batch.set_column(batch.schema.get_field_index(name), name, array)
                done += batch.num_rows
                yield batch
            return
        except pa.ArrowInvalid as error:
            if _is_too_long(error) and block + 1 < len(_BLOCKS):
                block += 1
            elif (found_loose := _loose(file, types, loose, error)) is not None:
                loose |= found_loose
            else:
                raise _refused(file, types, loose, error) or error from error


def _batches(file: Any, types: Mapping[str, Any], threads: bool = False, block: int = 0) -> Iterator[Any]:
    with file.stream() as source:
        yield from pj.open_json(source, _read(block, threads), _parse(types, "ignore"))


def _loose(file: Any, types: Mapping[str, Any], loose: Mapping[str, Any], error: Exception) -> dict[str, Any] | None:
    """Return a looser type for a column of numbers, for integers written as 1.0 or for true and false."""
    if (kinds := _OTHER_KIND.search(str(error))) is not None:
        name, made = kinds[1], pa.bool_()
        if {kinds[2], kinds[3]} != {"number", "boolean"}:
            return None
    else:
        found = _NO_VALUE.search(str(error))
        if found is None or not found[1].startswith(("int", "uint")) or is_whole(found[2]):
            return None
        column = _column(file, {**types, **loose}, str(error))
        if column is None:
            return None
        name, made = column, _NUMBER
    if name not in types or name in loose:
        return None
    wanted = _with_numbers(types[name], made)
    return None if wanted == types[name] else {name: wanted}


def _with_numbers(arrow_type: Any, made: Any) -> Any:
    if pa.types.is_list(arrow_type):
        return pa.list_(_with_numbers(arrow_type.value_type, made))
    numbers = pa.types.is_integer(arrow_type) or (pa.types.is_boolean(made) and pa.types.is_floating(arrow_type))
    return made if numbers else arrow_type


def _strict(file: Any, name: str, array: Any, arrow_type: Any) -> Any:
    """Casts numbers from the type of `_loose` to their own.

    Raises:
        ValueError: One is no such number.
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
            raise other_type(file, name, f"has the value {text!r}, which is no {arrow_type}", advice) from None
    raise AssertionError(f"no value of {name} is to blame")


def _is_too_long(error: Exception) -> bool:
    return "straddling object straddles two block boundaries" in str(error)


def _exact(file: Any, schema: Any, types: Mapping[str, Any]) -> Any:
    """Return the schema with other types for integers that were taken for floats, being too large for int64."""
    block = b""

    def exact(name: str, made: Any, way: tuple[str, ...]) -> Any:
        nonlocal block
        block = block or _first_lines(file, _BLOCK)
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


def _first_lines(file: Any, size: int) -> bytes:
    with file.stream() as source:
        block: bytes = source.read(size)
    # The last line is cut off.
    return block if len(block) < size else block[: block.rfind(b"\n") + 1]


def _first_rows(file: Any, size: int) -> list[Any]:
    return [json.loads(line) for line in _first_lines(file, size).splitlines() if line.strip()]


def _has_floats(block: bytes, way: tuple[str, ...]) -> bool:
    """Return whether one of the values at that place is no integer."""
    values = [json.loads(line) for line in block.splitlines() if line.strip()]
    for step in way:
        there = (value for value in values if value is not None)
        values = [item for value in there for item in (value if step == "[]" else [value.get(step)])]
    return any(isinstance(value, float) for value in values)


def _column(file: Any, types: Mapping[str, Any], message: str) -> str | None:
    """Return the column that an error is of, which does not name it."""
    for name, arrow_type in types.items():
        try:
            for _ in _batches(file, {name: arrow_type}):
                pass
        except pa.ArrowInvalid as error:
            if str(error) == message:
                return name
    return None


def _refused(file: Any, types: Mapping[str, Any], loose: Mapping[str, Any], error: Exception) -> ValueError | None:
    """Return the error for a value of another type than its column; None where the file is damaged."""
    if (kinds := _OTHER_KIND.search(str(error))) is not None:
        said = f"has values of JSON that are a {kinds[2]} and a {kinds[3]}"
        text = "read it as Text() if all are strings, or " if kinds[3] == "string" else ""
        return other_type(file, kinds[1], said, f"{text}write the file anew with one")
    if (found := _NO_VALUE.search(str(error))) is None:
        return None
    name = _column(file, {**types, **loose}, str(error))
    if name is None:
        return None
    wanted, value = found[1], found[2]
    lists = pa.types.is_list(types[name])
    advice = remedy(wanted, value, lists=lists, quoted=False)
    return other_type(file, name, f"has the value {value!r}, which is no {wanted}", advice)


def _read(block: int, threads: bool = False) -> Any:
    return pj.ReadOptions(use_threads=threads, block_size=_BLOCKS[block])


def _parse(types: Mapping[str, Any], others: str) -> Any:
    schema = pa.schema(list(types.items())) if types else None
    return pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
