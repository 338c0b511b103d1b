"""Plan: the operations of all features in order, each on columns or on results of earlier operations.

The operations become a few native calls once the forms of the columns are known; see
:mod:`recis_hybrid.features.program.lowering`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from typing import Any

from recis_hybrid.features.feature import Feature
from recis_hybrid.features.op import Column, Compound, Joining, Pairwise


@dataclass(frozen=True)
class Instruction:
    """One operation; its result goes into the next register."""

    op: Any
    kernel: Callable[..., Column]
    sources: tuple[int, ...]
    """The registers that the operation reads."""
    features: tuple[str, ...]
    """The features that need the operation, in their order."""

    @property
    def label(self) -> str:
        """The name of the operation in errors."""
        return f"feature {self.features[0]!r}, {self.op}"


@dataclass(frozen=True)
class Plan:
    """A straight-line program. Registers number the columns first, then the instructions."""

    columns: dict[str, tuple[str, ...]]
    """The columns that are read, and the features that read each."""
    instructions: tuple[Instruction, ...]
    """The operations, each after those that it reads from."""
    outputs: dict[str, int]
    """The register of each output column, in the order of the features."""
    requested: int
    """Number of operations of all features, before equal ones were merged."""

    def describe(self, register: int) -> str:
        """Return the operations that lead from columns to a register."""
        if register < len(self.columns):
            return repr(list(self.columns)[register])
        instruction = self.instructions[register - len(self.columns)]
        sources = [self.describe(source) for source in instruction.sources]
        return f"{sources[0] if len(sources) == 1 else '(' + ', '.join(sources) + ')'} -> {instruction.op}"

    def __repr__(self) -> str:
        return (
            f"Plan(features={len(self.outputs)}, columns={len(self.columns)}, operations={len(self.instructions)}, "
            f"shared={self.requested - len(self.instructions)})"
        )

    def __str__(self) -> str:
        count = len(self.instructions)
        lines = [
            f"features: {len(self.outputs)}, columns read: {len(self.columns)}, operations: {count} "
            f"(and {self.requested - count} equal to one of them)"
        ]
        names: dict[int, list[str]] = {}
        for name, register in self.outputs.items():
            names.setdefault(register, []).append(name)
        for register, column in enumerate(self.columns):
            lines.append(_line(register, f"column {column!r}", names))
        for register, instruction in enumerate(self.instructions, len(self.columns)):
            sources = " ".join(f"%{source}" for source in instruction.sources)
            lines.append(_line(register, f"{instruction.op} {sources}", names))
        lines.append("  all other columns pass through")
        return "\n".join(lines)


def _line(register: int, text: str, names: dict[int, list[str]]) -> str:
    outputs = ", ".join(repr(name) for name in names.get(register, []))
    return f"  %{register} = {text:<36} -> {outputs}" if outputs else f"  %{register} = {text}"


def _negative_zeros(op: Any) -> tuple[str, ...]:
    """Return the parameters that are -0.0: it equals 0.0, but the results of the operations differ."""
    if not is_dataclass(op):
        return ()
    values = ((field.name, getattr(op, field.name)) for field in fields(op))
    return tuple(name for name, value in values if isinstance(value, float) and value == 0 > math.copysign(1, value))


class _Compiler:
    """Assigns registers to operations; equal operations on equal inputs share one."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.first = {column: register for register, column in enumerate(columns)}
        self.known: dict[tuple[tuple[int, ...], Any, tuple[str, ...]], int] = {}
        self.needed_by: list[list[str]] = []
        self.requested = 0

    def emit(self, sources: tuple[int, ...], op: Any, feature: str) -> int:
        self.requested += 1
        register = self.known.setdefault((sources, op, _negative_zeros(op)), len(self.first) + len(self.known))
        number = register - len(self.first)
        if number == len(self.needed_by):
            self.needed_by.append([])
        if feature not in self.needed_by[number]:
            self.needed_by[number].append(feature)
        return register

    def chain(self, registers: list[int], ops: Sequence[Any], feature: str) -> list[int]:
        for op in ops:
            if isinstance(op, Compound):
                parts = op.expand()
                registers = [last for one in registers for part in parts for last in self.chain([one], part, feature)]
            elif isinstance(op, Joining) and op.joins:
                if len(registers) < 2:
                    raise ValueError(
                        f"feature {feature!r}: {op} joins two or more columns, got one; name several with source=[...]"
                    )
                if isinstance(op, Pairwise):
                    before, op = op.parts()
                    if before is not None:
                        registers = [self.emit((one,), before, feature) for one in registers]
                    registers = [reduce(lambda x, y, op=op: self.emit((x, y), op, feature), registers)]  # type: ignore[misc]
                else:
                    registers = [self.emit(tuple(registers), op, feature)]
            else:
                registers = [self.emit((one,), op, feature) for one in registers]
        return registers

    def feature(self, feature: Feature, name: str) -> list[int]:
        registers: list[int] = []
        for source in feature.sources:
            registers += self.feature(source, name) if isinstance(source, Feature) else [self.first[source]]
        return self.chain(registers, feature.ops, name)


def compile_plan(features: Sequence[Feature]) -> Plan:
    """Return the plan of all features, in which equal operations on equal inputs occur once.

    Args:
        features: Features with distinct names.

    Raises:
        TypeError: If one of them is not a Feature.
        ValueError: If two have the same name, or an operation that joins columns has only one.
    """
    for feature in features:
        if not isinstance(feature, Feature):
            raise TypeError(f"FeatureEngine: features must be a list of Features, got the element {feature!r}")
    _check_distinct(feature.name for feature in features)
    columns: dict[str, list[str]] = {}
    for feature in features:
        for column in feature.columns:
            columns.setdefault(column, []).append(feature.name)
    compiler = _Compiler(list(columns))
    outputs: list[tuple[str, int]] = []
    for feature in features:
        registers = compiler.feature(feature, feature.name)
        outputs += zip(_output_names(feature, len(registers)), registers, strict=True)
    _check_distinct(name for name, _ in outputs)
    instructions = tuple(
        Instruction(op, op.kernel(), sources, tuple(users))
        for (sources, op, _), users in zip(compiler.known, compiler.needed_by, strict=True)
    )
    read = {name: tuple(users) for name, users in columns.items()}
    return Plan(read, instructions, dict(outputs), compiler.requested)


def _output_names(feature: Feature, count: int) -> list[str]:
    """Return the names of the columns of a feature."""
    if count == 1:
        return [feature.name]
    suffixes = getattr(feature.ops[-1], "suffixes", ()) if feature.ops else ()
    return [f"{feature.name}_{suffix}" for suffix in (suffixes if len(suffixes) == count else range(count))]


def _check_distinct(names: Any) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"FeatureEngine: features must have distinct names, {repeated} occur more than once; use source= to read "
            f"one column for several features"
        )
