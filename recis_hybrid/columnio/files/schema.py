"""The columns of files and their default specs. Imports pyarrow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa

from recis_hybrid.columnio.columns import Column
from recis_hybrid.columnio.convert.convert import converter
from recis_hybrid.columnio.convert.numbers import Place
from recis_hybrid.columnio.csv_options import CsvOptions
from recis_hybrid.columnio.errors import not_whole
from recis_hybrid.columnio.files.file_set import DAMAGE
from recis_hybrid.columnio.files.paths import Paths, find_files


def column_types(
    paths: Paths, filesystem: Any = None, csv: CsvOptions | None = None, partitions: bool = True
) -> dict[str, Any]:
    """Return the columns of the first file that has any, with their Arrow types.

    Only a footer or the first lines of the file are read.

    Args:
        paths: As of `ColumnDataset`.
        filesystem: As of `ColumnDataset`.
        csv: As of `ColumnDataset`.
        partitions: As of `ColumnDataset`.

    Returns:
        A `pyarrow.DataType` by name; ``key=value`` folders are columns, too.

    Raises:
        BadFileError: The file is damaged.
        FileNotFoundError: There is no such file.
    """
    for found_file in find_files(paths, filesystem, partitions):
        file = replace(found_file, csv=csv)
        used = file.format
        try:
            schema = used.inspect(file, {}).schema
        except (FileNotFoundError, PermissionError):
            raise
        except DAMAGE as error:
            raise not_whole(file, used.NAME, error) from error
        if schema is not None:
            found = {field.name: field.type for field in schema}
            folders = {k: pa.int64() if isinstance(v, int) else pa.string() for k, v in file.partition.items()}
            return {**folders, **found}
    return {}


def spec_of(name: str, arrow_type: Any) -> Column | None:
    """Return the default spec of a column type; None if no tensor can be made of it.

    Args:
        name: Of the column.
        arrow_type: A `pyarrow.DataType`.
    """
    try:
        return converter(None, arrow_type, Place(name, "")).spec
    except TypeError:
        return None
