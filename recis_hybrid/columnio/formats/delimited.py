"""CSV files, whole: their rows cannot be found without reading all before them. Imports pyarrow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.csv as pc

from .protocol import Contents
from .text import TOO_LARGE, needs_uint64, other_type, remedy

NAME, PIECE = "CSV", "block"

_NO_VALUE = re.compile(r"In CSV column #(\d+): .*CSV conversion error to (.+?): invalid value '(.*)'", re.DOTALL)


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See `Format`."""
    types = dict(types)
    while True:
        try:
            with file.stream() as source, pc.open_csv(source, **_options(file, types)) as reader:
                schema, rows = reader.schema, sum(batch.num_rows for batch in islice(reader, 1))
            # Without a line after the header nothing says of what types the columns are.
            return Contents(_exact(file, schema, types), [None]) if rows else Contents(None, [])
        except pa.ArrowInvalid as error:
            if "Empty CSV file" in str(error):
                return Contents(None, [])
            if (found := _value(error)) is None:
                raise
            with file.stream() as source, pc.open_csv(source, **_options(file, {})) as reader:
                names = reader.schema.names
            column, wanted, value = names[found[0]], *found[1:]
            if wanted != "int64" or not needs_uint64(value):
                raise _refused(file, names, *found) from error
            # An id is its bits.
            types[column] = pa.uint64()


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See `Format`."""
    # The types of the first block hold for all; otherwise a later one could come out as another type.
    types = {name: contents.schema.field(name).type for name in columns}
    try:
        with file.stream() as source, pc.open_csv(source, **_options(file, types, columns, threads)) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        if (found := _value(error)) is None:
            raise
        raise _refused(file, contents.schema.names, *found) from error


def _exact(file: Any, schema: Any, types: Mapping[str, Any]) -> Any:
    """Returns the schema with other types for integers that were taken for floats, being too large for int64."""
    floats = [
        name
        for name in schema.names
        if name not in types and schema.names.count(name) == 1 and pa.types.is_float64(schema.field(name).type)
    ]
    if not floats:
        return schema
    options = _options(file, dict.fromkeys(floats, pa.string()), floats)
    with file.stream() as source, pc.open_csv(source, **options) as reader:
        first = next(iter(reader))
    for name in floats:
        values = first.column(name).drop_null()
        if len(values) and compute.all(compute.match_substring_regex(values, r"^\s*-?[0-9]+\s*$")).as_py():
            try:
                values.cast(pa.uint64())
                exact = pa.uint64()
            except pa.ArrowInvalid:
                exact = TOO_LARGE
            schema = schema.set(schema.get_field_index(name), pa.field(name, exact))
    return schema


def _value(error: Exception) -> tuple[int, str, str] | None:
    """Returns the column's number, its type and the value which is not of it; None where a file is damaged."""
    found = _NO_VALUE.search(str(error))
    # Bytes that are no text were not written so.
    if found is None or not found[3].isprintable() or "\ufffd" in found[3]:
        return None
    return int(found[1]), found[2], found[3]


def _refused(file: Any, names: Sequence[str], number: int, wanted: str, value: str) -> ValueError:
    return other_type(file, names[number], f"has the value {value!r}, which is no {wanted}", remedy(wanted, value))


def _options(
    file: Any, types: Mapping[str, Any], columns: list[str] | None = None, threads: bool = False
) -> dict[str, Any]:
    tabs = file.path.endswith((".tsv", ".tsv.gz"))
    return {
        "read_options": pc.ReadOptions(use_threads=threads),
        "parse_options": pc.ParseOptions(delimiter="\t" if tabs else ","),
        # An empty field is a null of numbers, and of strings an empty one unless it says NULL.
        "convert_options": pc.ConvertOptions(column_types=dict(types), include_columns=columns or []),
    }
