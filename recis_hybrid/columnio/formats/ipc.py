"""Arrow IPC files (also known as Feather 2), by record batch, and IPC streams as a whole. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from recis_hybrid.columnio.formats.protocol import Contents

NAME, PIECE = "Arrow", "record batch"

# Beginning of a stream; a file begins with "ARROW1".
_CONTINUATION = b"\xff\xff\xff\xff"
# End of a stream: a message of length 0.
_END = b"\xff\xff\xff\xff\0\0\0\0"


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See ``Format``."""
    with file.open() as source:
        if _is_stream(source):
            # A stream truncated between two batches would otherwise pass for a shorter one.
            source.seek(source.size() - len(_END))
            if source.read(len(_END)) != _END:
                raise pa.ArrowInvalid("the end of the stream is missing")
            source.seek(0)
            # The position of a batch is known only after reading all batches before it.
            return Contents(pa.ipc.open_stream(source).schema, [None], "stream")
        reader = pa.ipc.open_file(source)
        return Contents(reader.schema, [None] * reader.num_record_batches)


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See ``Format``."""
    indices = [contents.schema.get_field_index(name) for name in columns]
    options = pa.ipc.IpcReadOptions(included_fields=indices, use_threads=threads)
    # Not memory-mapped: tensors would be read-only, and truncating the file would kill the process.
    with file.open() as source:
        if contents.footer == "stream":
            for batch in pa.ipc.open_stream(source, options=options):
                yield from _slices(batch, rows)
            return
        batch = pa.ipc.open_file(source, options=options).get_batch(piece)
    yield from _slices(batch, rows)


def _slices(batch: Any, rows: int) -> Iterator[Any]:
    batch.validate(full=True)
    for first in range(0, batch.num_rows, rows):
        yield batch.slice(first, rows)


def _is_stream(source: Any) -> bool:
    is_stream: bool = source.read(len(_CONTINUATION)) == _CONTINUATION
    source.seek(0)
    return is_stream
