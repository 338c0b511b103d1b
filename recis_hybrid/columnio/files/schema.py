"""The columns of files and their default specs, from a footer or the first lines. Imports pyarrow."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from recis_hybrid.columnio.columns import Column
from recis_hybrid.columnio.convert.convert import converter
from recis_hybrid.columnio.convert.numbers import Place
from recis_hybrid.columnio.errors import incomplete_file
from recis_hybrid.columnio.files.file_set import DAMAGE
from recis_hybrid.columnio.files.paths import Paths, find_files
from recis_hybrid.columnio.options import ReadOptions


def column_types(paths: Paths, options: ReadOptions | None = None) -> dict[str, Any]:
    """Return the columns of the first file that has any, with their Arrow types.

    Only a footer or the first lines of the file are read.

    Args:
        paths: See ``ColumnDataset``.
        options: How to read.

    Returns:
        A ``pyarrow.DataType`` by name; ``key=value`` folders are columns too.

    Raises:
        BadFileError: The file is damaged.
        FileNotFoundError: A file does not exist.
    """
    for file in find_files(paths, options):
        try:
            schema = file.format.inspect(file, {}).schema
        except (FileNotFoundError, PermissionError):
            raise
        except DAMAGE as error:
            raise incomplete_file(file, file.format.NAME, error) from error
        if schema is not None:
            folders = {k: pa.int64() if isinstance(v, int) else pa.string() for k, v in file.partition.items()}
            return {**folders, **{field.name: field.type for field in schema}}
    return {}


def default_spec(name: str, arrow_type: Any) -> Column | None:
    """Return the default spec of a column type; None if it cannot become a tensor.

    Args:
        name: Name of the column.
        arrow_type: A ``pyarrow.DataType``.
    """
    try:
        return converter(None, arrow_type, Place(name, "")).spec
    except TypeError:
        return None
