"""From a plan and the forms of columns to native calls.

Stages follow one another: in each, all element-wise operations that can run are one program, and then all operations
that change rows are one call for each kind. What they make is there for the next stage. An operation of the user's own
may make any form, so that what needs it is linked once it has run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.features.common import without_strings
from recis_hybrid.features.op import Column, Elementwise, Form, Job, Shaping
from recis_hybrid.features.program.plan import Instruction, Plan
from recis_hybrid.features.program.program import Node, Program, build_program, numbers_of
from recis_hybrid.ragged import checks


def said_by_native(error: RuntimeError) -> str:
    """Return what a native operator says, without the place in its source that torch puts before it."""
    return re.sub(r"^\w+, csrc/\S+:\d+, ", "", str(error).split("\n")[0])


def run_alone(instruction: Instruction, columns: Sequence[Column]) -> Column:
    """Return what an operation's own kernel makes of columns.

    Raises:
        TypeError: If it raises one, or returns what is no column; the message names the feature.
        ValueError: Likewise.
    """
    native = isinstance(instruction.op, Elementwise | Shaping)
    try:
        made = instruction.kernel(*columns)
        if not native:
            _check_own(made)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{instruction.label}: {error}") from error
    except RuntimeError as error:
        if native:
            raise ValueError(f"{instruction.label}: {said_by_native(error).lstrip(': ')}") from error
        error.add_note(f"in {instruction.label}")
        raise
    return made


def _check_own(made: Any) -> None:
    """Raise for what native code cannot follow: it reads columns without looking at their form again."""
    if not isinstance(made, Column):
        raise TypeError(f"its kernel must return a Column, got {type(made).__name__}")
    values, offsets, weights, outer = made
    if offsets is None:
        if not isinstance(values, Tensor) or values.dim() == 0:
            what = checks.describe(values) if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"its kernel must return a Column of values [B, ...], got {what}")
        if weights is not None or outer:
            raise ValueError("its kernel returned a Column of weights or outer offsets without offsets; drop them too")
        return
    try:
        checks.check_form(values, offsets, weights, outer)
        if offsets.is_cpu and type(offsets) is Tensor and not torch.compiler.is_compiling():
            checks.check_content(values.shape[0], offsets, outer)
    except (TypeError, ValueError) as error:
        raise type(error)(f"its kernel returned a Column that is none: {error}") from error


class ProgramCall:
    """A program on its device, with its tables; runs in one native call."""

    def __init__(
        self,
        nodes: Sequence[Node],
        program: Program,
        dtypes: Sequence[torch.dtype],
        device: torch.device,
        parallel: bool,
    ) -> None:
        self.nodes = tuple(nodes)
        self._inputs = [(*source, dtype) for source, dtype in zip(program.inputs, dtypes, strict=True)]
        self._outputs = [(one.register, one.root, one.strings) for one in program.outputs]
        self._same_length = program.same_length
        code, params, self._labels = program.encode()
        self._code, self._params = code.to(device), params.to(device)
        self._device = device
        self._faults: Tensor | None = None
        self._parts = [number for part in program.parts for number in part]
        self._like = [one.like for one in program.outputs]
        self._dtypes = numbers_of([one.dtype for one in program.outputs])
        self._parallel = parallel

    def run(self, registers: dict[int, Column]) -> None:
        """Make the registers of the nodes that others need."""
        for one, other, label in self._same_length:
            rows, more = registers[one], registers[other]
            if _strings_or_values(rows) != _strings_or_values(more):
                raise ValueError(
                    f"{label}: the columns have {_strings_or_values(rows)} and {_strings_or_values(more)} rows; a "
                    f"batch has one number of them"
                )
        inputs: list[Tensor] = []
        for register, plane, dtype in self._inputs:
            tensor = _plane(registers[register], plane)
            # Native code takes the memory for what the program was made for.
            if tensor.dtype != dtype:
                raise TypeError(f"{self.nodes[0].label}: its program reads {plane} of {dtype}, got {tensor.dtype}")
            inputs.append(tensor if tensor.is_contiguous() else tensor.contiguous())
        made = ops.program.run(
            inputs,
            self._code,
            self._params,
            self._parts,
            self._like,
            self._dtypes,
            self._labels,
            self._parallel,
        )
        if self._device.type != "cpu":
            self._faults = made[-1]
        for values, (register, root, strings) in zip(made, self._outputs, strict=False):
            if register < 0:
                continue
            base = registers[root]
            if base.offsets is None:
                registers[register] = Column(values)
            else:
                registers[register] = without_strings(base, values) if strings else base._replace(values=values)

    def check(self) -> None:
        """Raise for what a GPU has refused in the last run; waits for it."""
        if self._faults is None:
            return
        labels = self._labels.split("\n")
        for label, element in zip(labels, self._faults.tolist(), strict=True):
            if element:
                self._faults = None
                raise ValueError(
                    f"{label}: element {element - 1} was refused: NaN, a string with wrong offsets, or what is not in "
                    f"a vocabulary; mend the column where it is read, or put FillNull before it"
                )


def _plane(column: Column, plane: str) -> Tensor:
    if plane == "values":
        return column.values
    strings = column.values.dtype == torch.uint8 and column.outer
    offsets = column.outer[-1] if plane == "lists" and strings else column.offsets
    assert offsets is not None
    return offsets


def _strings_or_values(column: Column) -> int:
    strings = column.values.dtype == torch.uint8 and column.offsets is not None
    return column.offsets.shape[0] - 1 if strings and column.offsets is not None else column.values.shape[0]


class ShapesCall:
    """Operations of one kind that change rows; runs in one native call."""

    def __init__(self, jobs: Sequence[tuple[int, tuple[int, ...], Job]], parallel: bool) -> None:
        self.registers = [register for register, _, _ in jobs]
        self.kind = type(jobs[0][2].op).kind
        self._sources = [sources for _, sources, _ in jobs]
        self._call = self.kind([job for _, _, job in jobs], parallel=parallel)

    def run(self, registers: dict[int, Column]) -> None:
        """Make their registers."""
        made = self._call([tuple([registers[source] for source in sources]) for sources in self._sources])
        for register, column in zip(self.registers, made, strict=True):
            registers[register] = column


class OwnCall:
    """An operation of the user's own."""

    def __init__(self, register: int, instruction: Instruction, sources: tuple[int, ...]) -> None:
        self.register, self.instruction, self._sources = register, instruction, sources

    def run(self, registers: dict[int, Column]) -> None:
        """Make its register."""
        registers[self.register] = run_alone(self.instruction, [registers[source] for source in self._sources])


class Segment:
    """Native calls, one after another, up to what cannot be known before they have run."""

    def __init__(self, calls: Sequence[ProgramCall | ShapesCall | OwnCall], aliases: Sequence[tuple[int, int]]) -> None:
        self.calls, self._aliases = list(calls), list(aliases)

    def run(self, registers: dict[int, Column]) -> None:
        """Make the registers of its operations that others need."""
        self._alias(registers)  # where nothing is to be computed, no call follows
        for call in self.calls:
            call.run(registers)
            self._alias(registers)

    def _alias(self, registers: dict[int, Column]) -> None:
        for register, source in self._aliases:
            if register not in registers and source in registers:
                registers[register] = registers[source]


class _Linker:
    def __init__(self, plan: Plan, known: dict[int, Form], grouped: bool) -> None:
        self.plan, self.forms, self.grouped = plan, dict(known), grouped
        self.stage = dict.fromkeys(known, 0)
        self.alias: dict[int, int] = {}
        self.nodes: dict[tuple[int, str], list[Node]] = {}
        self.shapes: dict[tuple[int, Any], list[tuple[int, tuple[int, ...], Job]]] = {}
        self.own: list[tuple[int, OwnCall]] = []
        self.read_from: dict[int, list[int]] = {}
        self.needed = self._needed()

    def _needed(self) -> set[int]:
        """Return the registers that are still to be made; what was needed on the way to those known is not."""
        first = len(self.plan.columns)
        needed: set[int] = set()
        ahead = list(self.plan.outputs.values())
        while ahead:
            register = ahead.pop()
            if register not in self.forms and register not in needed:
                needed.add(register)
                ahead += self.plan.instructions[register - first].sources
        return needed

    def link(self) -> None:
        for register, instruction in enumerate(self.plan.instructions, len(self.plan.columns)):
            sources = tuple(self.alias.get(source, source) for source in instruction.sources)
            if register not in self.needed or not all(source in self.forms for source in sources):
                continue
            stage = max(self.stage[source] for source in sources)
            for source in sources:
                self.read_from.setdefault(source, []).append(register)
            try:
                self.place(register, instruction, sources, stage)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{instruction.label}: {error}") from error

    def place(self, register: int, instruction: Instruction, sources: tuple[int, ...], stage: int) -> None:
        op, forms = instruction.op, tuple(self.forms[source] for source in sources)
        lowered = op.lower(forms) if isinstance(op, Elementwise) else None
        if lowered is not None:
            if not lowered.steps and lowered.form.dtype == forms[0].dtype:
                self.alias[register] = sources[0]
                return
            self.forms[register] = lowered.form
            self.stage[register] = stage + (1 if self.grouped else 0)
            key = stage, type(op).__name__ if self.grouped else ""
            self.nodes.setdefault(key, []).append(Node(register, sources, lowered, instruction.label))
        elif isinstance(op, Shaping):
            form = op.shape(forms)
            if len(forms) == 1 and form is forms[0]:
                self.alias[register] = sources[0]
                return
            self.forms[register], self.stage[register] = form, stage + 1
            job = register, sources, Job(op, forms, instruction.label)
            self.shapes.setdefault((stage, op.kind), []).append(job)
        else:
            self.own.append((stage, OwnCall(register, instruction, sources)))

    def kept(self, nodes: Sequence[Node]) -> set[int]:
        """Return the registers of nodes that something outside of them reads."""
        inside = {node.register for node in nodes}
        given = {self.alias.get(register, register) for register in self.plan.outputs.values()}
        waiting = {
            self.alias.get(source, source)
            for register, instruction in enumerate(self.plan.instructions, len(self.plan.columns))
            if register in self.needed and register not in self.forms
            for source in instruction.sources
        }
        return {
            register
            for register in inside
            if register in given
            or register in waiting
            or any(reader not in inside for reader in self.read_from.get(register, []))
        }


def link(plan: Plan, known: dict[int, Form], *, parallel: bool, grouped: bool = False) -> Segment:
    """Make native calls of all operations of a plan that can be linked.

    Args:
        plan: The plan.
        known: The forms of the registers that are there.
        parallel: Whether native calls use torch's threads.
        grouped: Whether operations of one name share a call each, instead of all that are element-wise sharing one: the
            other way to fuse, which the benchmark measures.

    Raises:
        TypeError: If an operation does not take a column; the message names the feature.
        ValueError: Likewise.
    """
    linker = _Linker(plan, known, grouped)
    linker.link()
    calls: list[ProgramCall | ShapesCall | OwnCall] = []
    stages = {stage for stage, _ in [*linker.nodes, *linker.shapes]}
    for stage in sorted(stages):
        for (at, _), nodes in linker.nodes.items():
            if at == stage:
                calls += _program_calls(linker, nodes, parallel)
        calls += [ShapesCall(jobs, parallel) for (at, _), jobs in linker.shapes.items() if at == stage]
    calls += [call for _, call in linker.own]
    return Segment(calls, list(linker.alias.items()))


def _program_calls(linker: _Linker, nodes: Sequence[Node], parallel: bool) -> list[ProgramCall]:
    """Return a call for each device that the nodes' columns lie on."""
    by_device: dict[torch.device, list[Node]] = {}
    for node in nodes:
        by_device.setdefault(node.lowered.form.device, []).append(node)
    kept = linker.kept(nodes)
    calls = []
    for device, group in by_device.items():
        program = build_program(group, linker.forms, kept)
        dtypes = [linker.forms[one].dtype if plane == "values" else torch.int64 for one, plane in program.inputs]
        calls.append(ProgramCall(group, program, dtypes, device, parallel))
    return calls
