"""A reader of exported tables that needs only NumPy, neither torch nor the native library.

Files are memory-mapped, so a lookup touches only the pages of the rows that it returns.

Letters: n ids of a call, m rows of a file, D dim.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.errors import ServingError
from recis_hybrid.serving.files import Array, map_tensors, read_manifest, step_folder, verify_file, widened
from recis_hybrid.serving.tables import Table


class Reader:
    """Embeddings and dense tensors of one checkpoint written by ``recis-hybrid export``.

    Full training checkpoints can be read too; incremental ones are rejected.

    Args:
        path: A ``step_…`` folder, or a folder of several, of which the one with the highest step is read.
        verify: Whether to verify the checksums of all files, which reads them completely.

    Raises:
        ServingError: The checkpoint is missing, damaged, incremental, or of another format version.

    Example:
        >>> Reader("no/such/place")
        Traceback (most recent call last):
        ...
        recis_hybrid.serving.errors.ServingError: no/such/place is not a directory. Pass the output of ...
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.path = step_folder(os.fspath(path))
        document = read_manifest(self.path / "manifest.json")
        self.step: int = document["step"]
        """Training step of the checkpoint."""
        self.parts: dict[str, Any] = document["parts"]
        """Entries of the manifest by part, specified in ``docs/format.md``."""
        self._tables: dict[str, Table] = {}
        for part, entry in self.parts.items():
            for name, table in entry["tables"].items():
                key = name if name not in self._tables else f"{part}/{name}"
                self._tables[key] = Table(self.path, name, table)
        if verify:
            for file in self._files():
                verify_file(self.path, file)

    @property
    def tables(self) -> list[str]:
        """Names of the tables. If two parts share a table name, the second table is ``part/name``."""
        return list(self._tables)

    def dim(self, table: str) -> int:
        """Return the width of a table's embeddings.

        Args:
            table: Name of the table.

        Returns:
            D.

        Raises:
            ServingError: The table does not exist.
        """
        return self.table(table).dim

    def lookup(self, table: str, ids: npt.ArrayLike, default: npt.ArrayLike = 0.0) -> npt.NDArray[np.float32]:
        """Return the embeddings of ids.

        Args:
            table: Name of the table.
            ids: int64 ``[n]``, any values, in any order.
            default: Embedding of ids without a row: a number, or float32 ``[D]``.

        Returns:
            float32 ``[n, D]``; bfloat16 and float16 are widened, and codes of int8 and int4 are converted back.

        Raises:
            ServingError: The table does not exist, or the ids are not int64 ``[n]``.
        """
        wanted = np.asarray(ids)
        if wanted.size == 0:
            wanted = wanted.astype(np.int64)
        if wanted.dtype != np.int64 or wanted.ndim != 1:
            raise ServingError(
                f"lookup: table {table!r}: ids must be int64 [n], got {wanted.dtype} {list(wanted.shape)}. Convert "
                "them with .astype(numpy.int64)."
            )
        return self.table(table).lookup(wanted, default)

    def dense(self, part: str) -> dict[str, Array]:
        """Return the dense tensors of a part, such as a tower's weights.

        Args:
            part: Name of the part.

        Returns:
            Read-only views of the mapped file by name; bfloat16 is copied into float32.

        Raises:
            ServingError: The part does not exist.
        """
        if part not in self.parts:
            raise ServingError(f"{self.path}: there is no part {part!r}, there are {sorted(self.parts)}.")
        file = self.parts[part]["file"]
        if file is None:
            return {}
        return {name: widened(*tensor) for name, tensor in map_tensors(self.path, file).items()}

    def table(self, name: str) -> Table:
        """Return a table, whose files open on first use; raises ServingError if it does not exist."""
        if name not in self._tables:
            raise ServingError(f"{self.path}: there is no table {name!r}, there are {self.tables}.")
        return self._tables[name]

    def _files(self) -> Iterator[dict[str, Any]]:
        for part in self.parts.values():
            if part["file"] is not None:
                yield part["file"]
            for table in part["tables"].values():
                yield from (item["file"] for item in table["ranges"])
