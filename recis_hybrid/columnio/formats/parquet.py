"""Parquet files, by row group. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from recis_hybrid.columnio.formats.protocol import Contents

NAME, PIECE = "Parquet", "row group"


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See ``Format``."""
    with file.open() as source, pq.ParquetFile(source) as parquet:
        footer = parquet.metadata
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return Contents(parquet.schema_arrow, sizes, footer)


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See ``Format``."""
    # Checksums reject a changed byte, which would otherwise be read as a different number. Pre-buffering requests a
    # remote file at once; for a local file, an Arrow thread would read while this one is idle.
    options = {"page_checksum_verification": True, "pre_buffer": not file.is_local}
    with file.open() as source, pq.ParquetFile(source, metadata=contents.footer, **options) as parquet:
        yield from parquet.iter_batches(rows, row_groups=[piece], columns=columns, use_threads=threads)
