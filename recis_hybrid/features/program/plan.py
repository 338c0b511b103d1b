"""From features to a program: columns, then operations in order, each on the results of earlier lines.

The plan says what is computed; how it is, in few native calls, is decided once the forms of the columns are known
(:mod:`recis_hybrid.features.program.lowering`).
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
    """One operation; its result is the register after those of all lines before it."""

    op: Any
    kernel: Callable[..., Column]
    sources: tuple[int, ...]
    """The registers that it reads."""
    features: tuple[str, ...]
    """The features that need it, as they were declared."""

    @property
    def label(self) -> str:
        """How errors name it."""
        return f"feature {self.features[0]!r}, {self.op}"


@dataclass(frozen=True)
class Plan:
    """A straight-line program. Registers count the columns first, then the instructions."""

    columns: dict[str, tuple[str, ...]]
    """The columns that are read, and the features made of each."""
    instructions: tuple[Instruction, ...]
    outputs: dict[str, int]
    """For each column that is given, in the order of the features, the register that holds it."""
    asked: int
    """Operations over all features before equal ones were made one."""

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
            f"shared={self.asked - len(self.instructions)})"
        )

    def __str__(self) -> str:
        done = len(self.instructions)
        lines = [
            f"features: {len(self.outputs)}, columns read: {len(self.columns)}, operations: {done} "
            f"(and {self.asked - done} equal to one of them)"
        ]
        names: dict[int, list[str]] = {}
        for name, register in self.outputs.items():
            names.setdefault(register, []).append(name)
        for register, column in enumerate(self.columns):
            lines.append(_line(register, f"column {column!r}", names))
        for register, instruction in enumerate(self.instructions, len(self.columns)):
            sources = " ".join(f"%{source}" for source in instruction.sources)
            lines.append(_line(register, f"{instruction.op} {sources}", names))
        lines.append("  all columns that are not read pass through")
        return "\n".join(lines)


def _line(register: int, what: str, names: dict[int, list[str]]) -> str:
    given = ", ".join(repr(name) for name in names.get(register, []))
    return f"  %{register} = {what:<36} -> {given}" if given else f"  %{register} = {what}"


def _negative_zeros(op: Any) -> tuple[str, ...]:
    """Return the parameters that are -0.0: operations that have 0.0 there are equal, and give other bits."""
    if not is_dataclass(op):
        return ()
    given = ((field.name, getattr(op, field.name)) for field in fields(op))
    return tuple(name for name, value in given if isinstance(value, float) and value == 0 > math.copysign(1, value))


class _Compiler:
    """Gives registers to operations, equal ones on equal inputs the same."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.first = {column: register for register, column in enumerate(columns)}
        self.known: dict[tuple[tuple[int, ...], Any, tuple[str, ...]], int] = {}
        self.needed_by: list[list[str]] = []
        self.asked = 0

    def emit(self, sources: tuple[int, ...], op: Any, feature: str) -> int:
        self.asked += 1
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
                        f"feature {feature!r}: {op} joins two or more columns, and there is one; name them by "
                        f"source=[...]"
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
    """Make one program of all features, in which equal operations on equal inputs occur once.

    Args:
        features: With names that differ.

    Returns:
        The plan.

    Raises:
        TypeError: If one of them is no Feature.
        ValueError: If two have the same name, or an operation that joins columns has only one.
    """
    for feature in features:
        if not isinstance(feature, Feature):
            raise TypeError(f"FeatureEngine: it takes a list of Features, got {feature!r} in it")
    _differ(feature.name for feature in features)
    columns: dict[str, list[str]] = {}
    for feature in features:
        for column in feature.columns:
            columns.setdefault(column, []).append(feature.name)
    compiler = _Compiler(list(columns))
    outputs: list[tuple[str, int]] = []
    for feature in features:
        registers = compiler.feature(feature, feature.name)
        if len(registers) == 1:
            outputs.append((feature.name, registers[0]))
        else:
            outputs += [(f"{feature.name}_{number}", register) for number, register in enumerate(registers)]
    _differ(name for name, _ in outputs)
    instructions = tuple(
        Instruction(op, op.kernel(), sources, tuple(users))
        for (sources, op, _), users in zip(compiler.known, compiler.needed_by, strict=True)
    )
    read = {name: tuple(users) for name, users in columns.items()}
    return Plan(read, instructions, dict(outputs), compiler.asked)


def _differ(names: Any) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"FeatureEngine: features need different names, {twice} occur twice; use source= to read one "
            f"column for several features"
        )
