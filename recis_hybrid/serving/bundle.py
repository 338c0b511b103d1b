"""Bundle: a trained model that scores columns without torch: features, tables and tower. Letters: B rows."""

from __future__ import annotations

import copy
import difflib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.columns import (
    DTYPES,
    Array,
    Column,
    InputColumn,
    Rows,
    read_column,
    read_integers,
    read_nulls,
)
from recis_hybrid.serving.errors import InputError, ServingError
from recis_hybrid.serving.features.program import Program
from recis_hybrid.serving.files import Tensor, map_tensors
from recis_hybrid.serving.lookups import AnyTable, Lookups
from recis_hybrid.serving.reader import Reader
from recis_hybrid.serving.tables import IndexedTable
from recis_hybrid.serving.towers import Tower, load_tower

VERSION = 1
"""Version of the part ``bundle``, see ``docs/bundles.md``."""
_REMEDY = "Export the run again with `recis-hybrid export RUN --bundle DIR`."


class _TowerInput(NamedTuple):
    feature: str
    embedded: bool
    dtype: str
    shape: tuple[int, ...]
    """Without the batch dimension."""


class Bundle:
    """A trained model that scores columns, written by ``recis-hybrid export RUN --bundle DIR``.

    It needs NumPy and the runtime of its tower alone: onnxruntime for a torch tower, JAX for a JAX tower. A bundle is
    immutable and threads may share it.

    Args:
        path: A ``step_…`` folder, or a folder of several, of which the one with the highest step is read.
        verify: Whether to verify the checksums of all files, which reads them completely.
        threads: Threads of one run of an ONNX tower.

    Raises:
        ServingError: The bundle is missing, damaged, or of a newer version, or the runtime of its tower is not
            installed.

    Example:
        >>> bundle = Bundle("first/bundle")  # doctest: +SKIP
        >>> bundle.predict({"user": [7, 8], "item": [3, 5]})  # doctest: +SKIP
        {'score': array([0.21, 0.74], dtype=float32)}
    """

    inputs: tuple[InputColumn, ...]
    """The columns of a request."""
    outputs: tuple[str, ...]
    """Names of the outputs."""
    step: int
    """Training step of the model."""
    digest: str
    """SHA-256 of the manifest, in hexadecimal."""
    path: Path
    """The bundle's folder."""
    source: Mapping[str, Any]
    """The checkpoint that was exported: its ``step``, and ``sha256`` of its manifest."""

    errors: Mapping[str, float | None]
    """By table, the greatest error of an element by quantization to int8 or int4; None for other dtypes."""

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True, threads: int = 1) -> None:
        reader = Reader(path, verify=verify)
        self.path, self.step = reader.path, reader.step
        self.digest = hashlib.sha256((self.path / "manifest.json").read_bytes()).hexdigest()
        where = str(self.path)
        document = _document(where, reader)
        try:
            self.inputs = tuple(InputColumn(**entry) for entry in document["inputs"])
            unknown = [entry.dtype for entry in self.inputs if entry.dtype not in DTYPES]
            if unknown:
                raise ServingError(f"{where}: unknown dtype {unknown[0]!r} of an input. Update recis_hybrid.")
            self.source = document["source"]
            self.errors = {name: table["error"] for name, table in document["tables"].items()}
            self._program = Program(where, document["program"])
            names = [item["table"] for item in document["lookups"]]
            self._tables: dict[str, AnyTable] = {name: _table(reader, name) for name in dict.fromkeys(names)}
            dims = {name: table.dim for name, table in self._tables.items()}
            self._lookups = Lookups(where, document, dims)
            self._tower_inputs = [
                _TowerInput(item["feature"], item["embedded"], item["dtype"], tuple(item["shape"]))
                for item in document["tower"]["inputs"]
            ]
            self._outputs: dict[str, tuple[int, ...]] = {
                item["name"]: tuple(item["shape"]) for item in document["tower"]["outputs"]
            }
            self.outputs = tuple(self._outputs)
            self._tower_kind: str = document["tower"]["kind"]
            self._logits: bool = document["tower"]["logits"]
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ServingError(f"{where}: its part 'bundle' is not valid: {error!r}. {_REMEDY}") from error
        self._by_name = {column.name: column for column in self.inputs}
        self._integers = [
            column.name
            for column in self.inputs
            if column.dtype == "int64" and column.levels == 0 and column.length is None
        ]
        self._threads = threads
        self._tower: Tower = load_tower(where, self._tower_kind, tower_tensors(reader), threads)

    @property
    def output_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the outputs by name, without the number of rows."""
        return dict(self._outputs)

    def check(self, columns: Mapping[str, Any]) -> Rows:
        """Return the rows of a request, validated and in the form that :meth:`run` takes.

        Args:
            columns: Columns by name: arrays ``[B]`` or ``[B, k]``, lists of values or of lists, or
                :class:`Ragged`.

        Raises:
            InputError: A column is missing or unknown, or its values do not fit; the message names the remedy.
        """
        if not isinstance(columns, Mapping):
            raise InputError(f"columns must be a mapping by name, got {type(columns).__name__}")
        unknown = [name for name in columns if name not in self._by_name]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), self._by_name, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            raise InputError(f"column {unknown[0]!r} is unknown{hint} the columns are {list(self._by_name)}")
        names = [name for name in self._integers if name in columns]
        integers = read_integers([columns[name] for name in names]) or []
        read: dict[str, Column] = dict(zip(names, integers, strict=False))
        if integers and len(read) == len(self.inputs):
            return Rows(read, integers[0].rows)
        rows, first = (integers[0].rows, names[0]) if integers else (-1, "")
        for column in self.inputs:
            if column.name in read:
                continue
            if column.name not in columns:
                if not column.optional:
                    raise InputError(
                        f"column {column.name!r} is missing; the columns are {list(self._by_name)}, got {list(columns)}"
                    )
                continue
            values = read_column(column, columns[column.name])
            if rows < 0:
                rows, first = values.rows, column.name
            elif values.rows != rows:
                raise InputError(
                    f"column {column.name!r} has {values.rows} rows, and column {first!r} has {rows}; send an element "
                    f"for each row in every column"
                )
            read[column.name] = values
        rows = max(rows, 0)
        for column in self.inputs:
            if column.name not in read:
                read[column.name] = read_nulls(column, rows)
        return Rows(read, rows)

    def run(self, rows: Rows) -> dict[str, npt.NDArray[np.float32]]:
        """Return the outputs for validated rows.

        Args:
            rows: Rows of :meth:`check`, or several of them by :meth:`Rows.concat`.

        Returns:
            By output, float32 ``[B]`` or ``[B, k]``.

        Raises:
            InputError: An operator of a feature refuses a value, or a number for the tower is NaN.
        """
        if rows.rows == 0:
            return {name: np.empty((0, *shape), np.float32) for name, shape in self._outputs.items()}
        features = self._program.run(rows.columns)
        vectors = self._lookups.run(self._tables, features)
        inputs = [
            vectors[each.feature] if each.embedded else _number(each, features[each.feature])
            for each in self._tower_inputs
        ]
        results = zip(self._outputs.items(), self._tower(inputs), strict=True)
        found = {name: np.asarray(values, np.float32).reshape(rows.rows, *shape) for (name, shape), values in results}
        return {name: _sigmoid(values) for name, values in found.items()} if self._logits else found

    def predict(self, columns: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
        """Return the outputs for columns; see :meth:`check` and :meth:`run`."""
        return self.run(self.check(columns))

    @property
    def tables(self) -> Mapping[str, AnyTable]:
        """The tables by name."""
        return dict(self._tables)

    def updated(
        self,
        path: Path,
        step: int,
        digest: str,
        tables: Mapping[str, AnyTable],
        tower: Mapping[str, Tensor] | None = None,
        document: Mapping[str, Any] | None = None,
    ) -> Bundle:
        """Return a bundle with newer tables and, optionally, a newer tower, which shares everything else.

        Args:
            path: Folder of the update.
            step: Step of the update.
            digest: SHA-256 of its manifest.
            tables: The tables that changed, by name.
            tower: The tensors of the part ``tower`` if it changed, see :func:`tower_tensors`; None keeps it.
            document: The part ``bundle`` of the update, whose source and errors of tables are new.

        Raises:
            ServingError: The runtime refuses the tower.
        """
        newer = copy.copy(self)
        newer.path, newer.step, newer.digest = path, step, digest
        newer._tables = {**self._tables, **tables}
        if tower is not None:
            newer._tower = load_tower(str(path), self._tower_kind, tower, self._threads)
        if document is not None:
            newer.source = document["source"]
            newer.errors = {
                name: _greater(self.errors[name], document["tables"][name]["error"]) for name in self.errors
            }
        return newer


def tower_tensors(reader: Reader) -> dict[str, Tensor]:
    """Return the tensors of the tower in an export, empty if it has none.

    Args:
        reader: The export.

    Raises:
        ServingError: The file is damaged.
    """
    entry = reader.parts.get("tower")
    return {} if entry is None or entry["file"] is None else map_tensors(reader.path, entry["file"])


def _document(where: str, reader: Reader) -> dict[str, Any]:
    try:
        document = reader.parts["bundle"]["meta"]["value"]
        version = document["version"]
    except (KeyError, TypeError) as error:
        raise ServingError(f"{where}: is an export of tables, not a bundle. {_REMEDY}") from error
    if version != VERSION:
        raise ServingError(
            f"{where}: is a bundle of version {version}, this package reads version {VERSION}; update recis_hybrid, or "
            f"export the run with this version."
        )
    result: dict[str, Any] = document
    return result


def _greater(a: float | None, b: float | None) -> float | None:
    return max((each for each in (a, b) if each is not None), default=None)


def _sigmoid(logits: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.float32(1) / (np.float32(1) + np.exp(-logits))


def _table(reader: Reader, name: str) -> AnyTable:
    return IndexedTable(reader.table(name))


def _number(each: _TowerInput, column: Column) -> Array:
    """Return a feature that the tower takes as numbers."""
    values = column.values.astype(each.dtype, copy=False)
    if values.shape[1:] != each.shape:
        if values.size != len(values) * int(np.prod(each.shape)):
            raise InputError(
                f"feature {each.feature!r} has {list(values.shape[1:])} numbers in each row, the tower takes "
                f"{list(each.shape)}; send as many"
            )
        values = values.reshape(len(values), *each.shape)
    if values.dtype.kind == "f" and np.isnan(values).any():
        row = int(np.argmax(np.isnan(values).reshape(len(values), -1).any(axis=1)))
        raise InputError(f"feature {each.feature!r}: row {row} is NaN, and the tower takes numbers; send a number")
    return values
