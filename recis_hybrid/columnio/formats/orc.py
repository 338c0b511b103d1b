"""ORC files, by stripe. Imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.orc as po

from recis_hybrid.columnio.formats.protocol import Contents

NAME, PIECE = "ORC", "stripe"


def inspect(file: Any, types: Mapping[str, Any]) -> Contents:
    """See ``Format``."""
    with file.open() as source:
        orc = po.ORCFile(source)
        # pyarrow reports the number of rows of the file only, not of each stripe.
        sizes = [orc.nrows] if orc.nstripes == 1 else [None] * orc.nstripes
        return Contents(orc.schema, sizes)


def read(file: Any, contents: Contents, piece: int, columns: list[str], rows: int, threads: bool) -> Iterator[Any]:
    """See ``Format``."""
    with file.open() as source:
        stripe = po.ORCFile(source).read_stripe(piece, columns=columns)
    for first in range(0, stripe.num_rows, rows):
        yield stripe.slice(first, rows)
