"""From features to a program: columns, then operations in order, each on the result of an earlier line.

The plan says what is computed, not how: the engine runs line after line, and one that runs several lines in one native
call would read the same plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from recis_hybrid.features.feature import Feature
from recis_hybrid.features.op import Kernel, Op


@dataclass(frozen=True)
class Instruction:
    """One operation; its result is the register after those of all lines before it."""

    op: Op
    kernel: Kernel
    source: int
    """The register that it reads."""
    features: tuple[str, ...]
    """The features that need it, as they were declared."""


@dataclass(frozen=True)
class Plan:
    """A straight-line program. Registers count the columns first, then the instructions."""

    columns: dict[str, tuple[str, ...]]
    """The columns that are read, and the features made of each."""
    instructions: tuple[Instruction, ...]
    outputs: dict[str, int]
    """For each feature, as declared, the register that holds it."""
    asked: int
    """Operations over all features before equal ones were made one."""

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
            lines.append(_line(register, f"{instruction.op} %{instruction.source}", names))
        lines.append("  all columns that are not read pass through")
        return "\n".join(lines)


def _line(register: int, what: str, names: dict[int, list[str]]) -> str:
    given = ", ".join(repr(name) for name in names.get(register, []))
    return f"  %{register} = {what:<36} -> {given}" if given else f"  %{register} = {what}"


def compile_plan(features: Sequence[Feature]) -> Plan:
    """Makes one program of all features, in which equal operations on equal inputs occur once.

    Args:
        features: With names that differ.

    Returns:
        The plan.

    Raises:
        TypeError: If one of them is no Feature.
        ValueError: If two have the same name.
    """
    for feature in features:
        if not isinstance(feature, Feature):
            raise TypeError(f"FeatureEngine: it takes a list of Features, got {feature!r} in it")
    names = Counter(feature.name for feature in features)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"FeatureEngine: features need different names, {twice} occur twice; use source= to read one "
                         f"column for several features")  # fmt: skip

    columns: dict[str, list[str]] = {}
    for feature in features:
        columns.setdefault(feature.column, []).append(feature.name)
    first = {column: register for register, column in enumerate(columns)}
    known: dict[tuple[int, Op], int] = {}
    needed_by: list[list[str]] = []
    outputs: dict[str, int] = {}
    for feature in features:
        register = first[feature.column]
        for op in feature.ops:
            following = known.setdefault((register, op), len(columns) + len(known))
            if following == len(columns) + len(needed_by):
                needed_by.append([])
            needed_by[following - len(columns)].append(feature.name)
            register = following
        outputs[feature.name] = register
    instructions = tuple(
        Instruction(op, op.kernel(), source, tuple(users)) for (source, op), users in zip(known, needed_by, strict=True)
    )
    asked = sum(len(feature.ops) for feature in features)
    return Plan({name: tuple(users) for name, users in columns.items()}, instructions, outputs, asked)
