"""CSV files, whole: their rows cannot be found without reading all before them. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc

from .protocol import Contents

NAME, PIECE = "CSV", "block"


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See `Format`."""
    try:
        with file.stream() as source, pc.open_csv(source, **_options(file, types)) as reader:
            rows = sum(batch.num_rows for batch in islice(reader, 1))
            # Without a line after the header nothing says of what types the columns are.
            return Contents(reader.schema, [None]) if rows else Contents(None, [])
    except pa.ArrowInvalid as error:
        if "Empty CSV file" not in str(error):
            raise
        return Contents(None, [])


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See `Format`."""
    # The types of the first block hold for all; otherwise a later one could come out as another type.
    types = {name: contents.schema.field(name).type for name in columns}
    with file.stream() as source, pc.open_csv(source, **_options(file, types, columns, threads)) as reader:
        yield from reader


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
