"""Which rows of files are wanted, as a pyarrow expression. Imports pyarrow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq

Filters: TypeAlias = Any
"""A `pyarrow.compute.Expression`, or a list of (column, operator, value) of which all must hold, or a list of such
lists of which one must."""


@dataclass(frozen=True)
class RowFilter:
    """A condition on the columns of a row."""

    expression: Any
    """A `pyarrow.compute.Expression`."""

    @classmethod
    def of(cls, filters: Filters) -> RowFilter | None:
        """Reads what a user wrote.

        Args:
            filters: See `Filters`; None for all rows.

        Raises:
            TypeError: It is neither an expression nor such a list.
        """
        if filters is None:
            return None
        if isinstance(filters, pc.Expression):
            return cls(filters)
        try:
            return cls(pq.filters_to_expression(filters))
        except (ValueError, TypeError) as error:
            raise TypeError(
                f"ColumnDataset: filters must be a pyarrow expression or a list of (column, operator, value), got "
                f"{filters!r} ({error})"
            ) from error

    def fields(self, schema: Any) -> list[str]:
        """Returns the columns that the condition looks at.

        Raises:
            ValueError: The condition does not suit the schema.
        """
        empty = schema.empty_table()
        try:
            empty.filter(self.expression)
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(
                f"ColumnDataset: filters {self.expression} do not suit the columns {schema.names} ({error})"
            ) from error
        # An expression does not tell which columns it names, but fails where one of them is missing.
        return [name for name in dict.fromkeys(schema.names) if not self._works(empty.drop_columns([name]))]

    def __call__(self, batch: Any) -> Any:
        """Returns the rows of a RecordBatch for which the condition holds."""
        return batch.filter(self.expression)

    def possible(self, file: Any, schema: Any, footer: Any, pieces: int) -> list[int]:
        """Returns the pieces which may hold such rows, by what the names of folders and a Parquet footer say of them.

        Args:
            file: Its path, file system and partition.
            schema: Of the file and its partition.
            footer: `pyarrow.parquet.FileMetaData`, or None.
            pieces: How many the file has.
        """
        formats = ds.ParquetFileFormat()
        known = pc.scalar(True)
        for name, value in file.partition.items():
            if name in schema.names:
                known &= pc.field(name).is_null() if value is None else pc.field(name) == value
        fragment = formats.make_fragment(file.path, file.filesystem, partition_expression=known)
        # Only asked for what it can rule out; it opens no file for that.
        folder = ds.FileSystemDataset([fragment], schema, formats, pafs.LocalFileSystem())
        if not list(folder.get_fragments(filter=self.expression)):
            return []
        if not isinstance(footer, pq.FileMetaData):
            return list(range(pieces))
        return [group.id for group in fragment.subset(filter=self.expression, schema=schema).row_groups]

    def _works(self, table: Any) -> bool:
        try:
            table.filter(self.expression)
        except (pa.ArrowException, ValueError):
            return False
        return True
