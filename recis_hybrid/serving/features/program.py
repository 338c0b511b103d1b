"""The features' program: operators in order, each on columns or on results of earlier operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from recis_hybrid.serving.columns import Column
from recis_hybrid.serving.errors import InputError, ServingError
from recis_hybrid.serving.features import lists, values
from recis_hybrid.serving.features.values import Kernel

OPERATORS: dict[str, Callable[..., Kernel]] = {
    "age": values.age,
    "bucketize": values.bucketize,
    "cast": values.cast,
    "clip": values.clip,
    "concat": lists.concat,
    "count_ones": lists.count_ones,
    "cross": lists.cross,
    "date_part": values.date_part,
    "decimal_string": values.decimal_string,
    "distinct": lists.distinct,
    "fill_empty": lists.fill_empty,
    "fill_nan": values.fill_nan,
    "hash": values.hash_,
    "list_lengths": lists.list_lengths,
    "log": values.log,
    "mask": values.mask,
    "mod": values.mod,
    "multi_hash": values.multi_hash,
    "multi_hot": lists.multi_hot,
    "normalize": values.normalize,
    "pad": lists.pad,
    "tile": lists.tile,
    "to_dense": lists.to_dense,
    "top_k": lists.top_k,
    "truncate": lists.truncate,
    "vocabulary": values.vocabulary,
}
"""The operators by their names in a program."""


class _Step(NamedTuple):
    kernel: Kernel
    inputs: tuple[int, ...]
    label: str


class Program:
    """A program, ready to run; its registers are the columns and then the results of the steps.

    Args:
        where: The bundle, for messages.
        document: ``columns``, ``steps`` and ``outputs``, see ``docs/bundles.md``.

    Raises:
        ServingError: The program is not valid, or has an operator that this version does not know.
    """

    def __init__(self, where: str, document: Mapping[str, Any]) -> None:
        self.columns: list[str] = list(document["columns"])
        """Names of the columns that the program reads."""
        self.outputs: dict[str, int] = dict(document["outputs"])
        """Registers of the features."""
        self._steps = [_step(where, document, number, step) for number, step in enumerate(document["steps"])]
        count = len(self.columns) + len(self._steps)
        if not all(isinstance(register, int) and 0 <= register < count for register in self.outputs.values()):
            raise ServingError(f"{where}: outputs must be registers from 0 to {count - 1}. Export it again.")

    def run(self, columns: Mapping[str, Column]) -> dict[str, Column]:
        """Return the features of a request.

        Args:
            columns: The columns by name.

        Raises:
            InputError: An operator refuses a value.
        """
        registers = [columns[name] for name in self.columns]
        with np.errstate(all="ignore"):
            for kernel, inputs, label in self._steps:
                try:
                    registers.append(kernel(*[registers[register] for register in inputs]))
                except ValueError as error:
                    raise InputError(f"{label}: {error}") from error
        return {name: registers[register] for name, register in self.outputs.items()}


def _step(where: str, document: Mapping[str, Any], number: int, step: Mapping[str, Any]) -> _Step:
    parameters = {key: value for key, value in step.items() if key not in ("op", "inputs", "feature")}
    name, inputs = step["op"], tuple(step["inputs"])
    if name not in OPERATORS:
        raise ServingError(
            f"{where}: feature {step['feature']!r}: unknown operator {name!r}. The bundle was written by a newer "
            f"version; update recis_hybrid."
        )
    first = len(document["columns"]) + number
    if not inputs or not all(isinstance(register, int) and 0 <= register < first for register in inputs):
        raise ServingError(f"{where}: step {number}: inputs must be registers from 0 to {first - 1}. Export it again.")
    try:
        kernel = OPERATORS[name](**parameters)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ServingError(f"{where}: step {number}, {name}: {error}. Export it again.") from error
    read = ", ".join(repr(document["columns"][register]) for register in inputs if register < len(document["columns"]))
    return _Step(kernel, inputs, f"feature {step['feature']!r}{f', column {read}' if read else ''}, {name}")
