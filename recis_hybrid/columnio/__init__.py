"""Batches from files: read with pyarrow and converted to tensors, without copying where possible."""

from __future__ import annotations

from recis_hybrid.columnio.columns import (
    Column as Column,
    Dense as Dense,
    Ragged as Ragged,
    Text as Text,
    Weighted as Weighted,
)
from recis_hybrid.columnio.dataset import ColumnDataset as ColumnDataset
from recis_hybrid.columnio.errors import BadFileError as BadFileError, Skipped as Skipped
from recis_hybrid.columnio.negatives import NegativeSampler as NegativeSampler
from recis_hybrid.columnio.options import (
    CsvOptions as CsvOptions,
    ReadOptions as ReadOptions,
    ShardOptions as ShardOptions,
)
from recis_hybrid.columnio.vectors import read_vectors as read_vectors
from recis_hybrid.columnio.windows import Window as Window, Windows as Windows
