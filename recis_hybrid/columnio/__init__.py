"""From files to batches: Parquet read by pyarrow, columns handed on as tensors without a copy where they can be."""

from .columns import Column as Column, Dense as Dense, Ragged as Ragged, Text as Text
from .dataset import ColumnDataset as ColumnDataset
