"""From files to batches: read by pyarrow, columns handed on as tensors without a copy where they can be."""

from .columns import (
    Column as Column,
    Dense as Dense,
    Ragged as Ragged,
    Text as Text,
    Weighted as Weighted,
)
from .csv_options import CsvOptions as CsvOptions
from .dataset import ColumnDataset as ColumnDataset
from .errors import BadFileError as BadFileError, Skipped as Skipped
from .negatives import NegativeSampler as NegativeSampler
from .windows import Window as Window, Windows as Windows
