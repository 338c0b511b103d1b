"""Files of one JSON object a line, whole. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from .protocol import Contents

NAME, PIECE = "JSON lines", "block"


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See `Format`."""
    try:
        with file.stream() as source:
            reader = pj.open_json(source, parse_options=_parse(types, "infer"))
            return Contents(reader.schema, [None])
    except pa.ArrowInvalid as error:
        if "Empty JSON" not in str(error):
            raise
        return Contents(None, [])


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See `Format`."""
    # The types of the first block hold for all, and what is not asked for is skipped.
    types = {name: contents.schema.field(name).type for name in columns}
    with file.stream() as source:
        yield from pj.open_json(
            source, read_options=pj.ReadOptions(use_threads=threads), parse_options=_parse(types, "ignore")
        )


def _parse(types: Mapping[str, Any], others: str) -> Any:
    schema = pa.schema(list(types.items())) if types else None
    return pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=others)
