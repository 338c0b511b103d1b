"""The features' program: operators in order, each on columns or on results of earlier operators."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recis_hybrid.serving.columns import Column, joined_offsets
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


# Operators of one column that map each value or string to one value; columns with equal ones are joined.
_ELEMENTWISE = frozenset(
    ("bucketize", "cast", "clip", "date_part", "fill_nan", "hash", "log", "mask", "mod", "multi_hash", "normalize")
) | {"vocabulary"}


class _Step(NamedTuple):
    kernel: Kernel
    inputs: tuple[int, ...]
    output: int
    label: str


class Program:
    """A program, ready to run; its registers are the columns and then the results of the steps.

    A call of an array operation costs as much as hashing hundreds of ids, so equal operators of several columns run as
    one, over their joined values.

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
        first = len(self.columns)
        groups: dict[tuple[int, str], list[_Step]] = {}
        depth = [0] * first
        for number, item in enumerate(document["steps"]):
            step = _step(where, document, number, item)
            depth.append(1 + max(depth[register] for register in step.inputs))
            same = {key: value for key, value in item.items() if key not in ("inputs", "feature")}
            alone = item["op"] not in _ELEMENTWISE
            key = json.dumps([same, number if alone else None], sort_keys=True)
            groups.setdefault((depth[-1], key), []).append(step)
        # By depth, so that the inputs of a step come before it.
        self._groups = [groups[key] for key in sorted(groups, key=lambda key: key[0])]
        self._count = first + len(document["steps"])
        if not all(isinstance(register, int) and 0 <= register < self._count for register in self.outputs.values()):
            raise ServingError(f"{where}: outputs must be registers from 0 to {self._count - 1}. Export it again.")

    def run(self, columns: Mapping[str, Column]) -> dict[str, Column]:
        """Return the features of a request.

        Args:
            columns: The columns by name.

        Raises:
            InputError: An operation refuses a value.
        """
        registers: dict[int, Column] = {number: columns[name] for number, name in enumerate(self.columns)}
        with np.errstate(all="ignore"):
            for group in self._groups:
                if len(group) == 1 or not _run_joined(group, registers):
                    for step in group:
                        registers[step.output] = _run(step, registers)
        return {name: registers[register] for name, register in self.outputs.items()}


def _run(step: _Step, registers: Mapping[int, Column]) -> Column:
    try:
        return step.kernel(*[registers[register] for register in step.inputs])
    except ValueError as error:
        raise InputError(f"{step.label}: {error}") from error


def _run_joined(group: Sequence[_Step], registers: dict[int, Column]) -> bool:
    """Run equal elementwise operators over the joined values of their columns; return False if that fails."""
    kinds: dict[tuple[np.dtype[Any], bool], list[_Step]] = {}
    for step in group:
        column = registers[step.inputs[0]]
        kinds.setdefault((column.values.dtype, column.strings), []).append(step)
    for (_, strings), steps in kinds.items():
        columns = [registers[step.inputs[0]] for step in steps]
        try:
            if strings:
                joined = Column(np.concatenate([column.values for column in columns]), joined_offsets(columns))
                counts = [len(column.offsets) - 1 for column in columns if column.offsets is not None]
            else:
                joined = Column(np.concatenate([column.values.reshape(-1) for column in columns]))
                counts = [column.values.size for column in columns]
            results = steps[0].kernel(joined).values
        except ValueError:
            # Each runs again alone, so that the message names the feature.
            return False
        begin = 0
        for step, column, count in zip(steps, columns, counts, strict=True):
            part = results[begin : begin + count]
            begin += count
            if strings:
                registers[step.output] = values.of_strings(column, part)
            else:
                registers[step.output] = column._replace(values=part.reshape(column.values.shape))
    return True


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
    read = [repr(document["columns"][register]) for register in inputs if register < len(document["columns"])]
    columns = f", column {', '.join(read)}" if read else ""
    return _Step(kernel, inputs, first, f"feature {step['feature']!r}{columns}, {name}")
