"""Columns of a bundle as tensors of the Open Inference Protocol.

A column with one value a row is a tensor ``[B]``, one with k values a row ``[B, k]``. A column of lists is two tensors:
``name`` with the values of all rows one after another, and ``name.lengths`` ``[B]`` with the number of values of each
row. For lists of lists, ``name.lengths`` has the number of lists of each row, and ``name.lengths.2`` the number of
values of each list. ``name.weights`` has a weight for each value.

Letters: B rows, n values of all rows, k values a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recis_hybrid.serving.columns import InputColumn, Ragged
from recis_hybrid.serving.errors import InputError

DATATYPES = {
    **{"BOOL": "|b1", "INT8": "|i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8"},
    **{"UINT8": "|u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"},
}
"""Numpy type of each datatype of the protocol; BYTES, strings, have none."""
_DATATYPE = {
    **{"int64": "INT64", "int32": "INT32", "float32": "FP32", "float64": "FP64", "bool": "BOOL", "string": "BYTES"},
}


class Layout:
    """A bundle and the tensors of its columns.

    Args:
        bundle: A ``Bundle``.
    """

    def __init__(self, bundle: Any) -> None:
        self.bundle = bundle
        self.version = str(bundle.step)
        """Version in URLs and answers: the training step."""
        names = {column.name for column in bundle.inputs}
        self._lists: dict[str, tuple[InputColumn, tuple[str, ...], str]] = {}
        # Tensors with lengths or weights, and the column of each. A column of such a name is a column.
        self._companions: dict[str, str] = {}
        for column in bundle.inputs:
            if column.levels == 0:
                continue
            levels = tuple(_lengths_name(column.name, level) for level in range(1, column.levels + 1))
            weights = f"{column.name}.weights"
            self._lists[column.name] = (column, levels, weights)
            for companion in (*levels, weights):
                if companion not in names:
                    self._companions[companion] = column.name

    def columns(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return columns from tensors.

        Args:
            tensors: Arrays or lists by name.

        Returns:
            Columns for ``Bundle.check``; lists are ``Ragged``.

        Raises:
            InputError: The values of a column of lists, or their lengths, are missing.
        """
        if not self._lists:
            return tensors
        columns = {name: values for name, values in tensors.items() if name not in self._companions}
        for companion, name in self._companions.items():
            if companion in tensors and name not in tensors:
                raise InputError(f"input {companion!r}: there is no input {name!r} with the values. Send both.")
        for name, (column, levels, weights) in self._lists.items():
            if name in tensors:
                columns[name] = _ragged(column, tensors, levels, weights)
        return columns

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the model metadata of the protocol.

        Args:
            name: Name of the model.

        Returns:
            A JSON object.
        """
        inputs = [tensor for column in self.bundle.inputs for tensor in _tensors_of(column)]
        return {
            "name": name,
            "versions": [self.version],
            "platform": "recis_hybrid",
            "inputs": inputs,
            "outputs": [
                {"name": output, "datatype": "FP32", "shape": [-1, *shape]}
                for output, shape in self.bundle.output_shapes.items()
            ],
        }


def _ragged(column: InputColumn, tensors: Mapping[str, Any], levels: tuple[str, ...], weights: str) -> Any:
    values = tensors[column.name]
    given = [level for level in levels if level in tensors]
    # An array [B, k] has k values for each row.
    if not given and weights not in tensors and isinstance(values, np.ndarray) and values.ndim == column.levels + 1:
        return values
    missing = [level for level in levels if level not in tensors]
    if missing:
        raise InputError(
            f"input {column.name!r} has lists of values: there must be an input {missing[0]!r}, int64, with the number "
            "of values of each row."
        )
    lengths = [np.asarray(tensors[level]) for level in levels]
    return Ragged(values, lengths[0] if len(lengths) == 1 else tuple(lengths), tensors.get(weights))


def _lengths_name(name: str, level: int) -> str:
    return f"{name}.lengths" if level == 1 else f"{name}.lengths.{level}"


def _tensors_of(column: InputColumn) -> list[dict[str, Any]]:
    shape = [-1] if column.length is None else [-1, column.length]
    tensors: list[dict[str, Any]] = [{"name": column.name, "datatype": _DATATYPE[column.dtype], "shape": shape}]
    for level in range(1, column.levels + 1):
        tensors.append({"name": _lengths_name(column.name, level), "datatype": "INT64", "shape": [-1]})
    if column.weighted:
        tensors.append({"name": f"{column.name}.weights", "datatype": "FP32", "shape": shape})
    if column.optional:
        for tensor in tensors:
            tensor["parameters"] = {"optional": True}
    return tensors
