"""Files of Arrow's own format (IPC, also known as Feather 2), by record batch. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from .protocol import Contents

NAME, PIECE = "Arrow", "record batch"


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See `Format`."""
    with file.open() as source:
        reader = pa.ipc.open_file(source)
        return Contents(reader.schema, [None] * reader.num_record_batches)


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See `Format`."""
    wanted = [contents.schema.get_field_index(name) for name in columns]
    options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=threads)
    # Not mapped into memory, where tensors could not be written to and a file cut short would end the process.
    with file.open() as source:
        batch = pa.ipc.open_file(source, options=options).get_batch(piece)
    batch.validate(full=True)
    for first in range(0, batch.num_rows, rows):
        yield batch.slice(first, rows)
