"""Native calls for a plan and the forms of its columns.

The calls form stages. In each stage, the element-wise operations whose inputs are known form one program, and the
operations that change rows form one call for each kind; the next stage uses their results. A custom operation may
return any form, so operations that need its result are linked after it has run.
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


def native_message(error: RuntimeError) -> str:
    """Return the message of a native operator, without the source location that torch puts before it."""
    return re.sub(r"^\w+, csrc/\S+:\d+, ", "", str(error).split("\n")[0])


def run_alone(instruction: Instruction, columns: Sequence[Column]) -> Column:
    """Return the result of the kernel of one operation.

    Raises:
        TypeError: If the kernel raises it, or does not return a valid column; the message names the feature.
        ValueError: Likewise.
    """
    native = isinstance(instruction.op, Elementwise | Shaping)
    try:
        result = instruction.kernel(*columns)
        if not native:
            _check_custom(result)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{instruction.label}: {error}") from error
    except RuntimeError as error:
        if native:
            raise ValueError(f"{instruction.label}: {native_message(error).lstrip(': ')}") from error
        error.add_note(f"in {instruction.label}")
        raise
    return result


def _check_custom(result: Any) -> None:
    """Raise if a custom kernel did not return a valid column, because native code reads columns without checks."""
    if not isinstance(result, Column):
        raise TypeError(f"the kernel must return a Column, got {type(result).__name__}")
    values, offsets, weights, outer = result
    if offsets is None:
        if not isinstance(values, Tensor) or values.dim() == 0:
            found = checks.describe(values) if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"the kernel must return a Column of values [B, ...], got {found}")
        if weights is not None or outer:
            raise ValueError("the kernel returned a Column with weights or outer offsets but no offsets; drop them too")
        return
    try:
        checks.check_form(values, offsets, weights, outer)
        if offsets.is_cpu and type(offsets) is Tensor and not torch.compiler.is_compiling():
            checks.check_content(values.shape[0], offsets, outer)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the kernel returned an invalid Column: {error}") from error


class ProgramCall:
    """A program with its tables on a device; runs in one native call."""

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
        code, params, self._refusals = program.encode()
        self._code, self._params = code.to(device), params.to(device)
        self._device = device
        self._faults: Tensor | None = None
        self._parts = [number for part in program.parts for number in part]
        self._like = [one.like for one in program.outputs]
        self._dtypes = numbers_of([one.dtype for one in program.outputs])
        self._parallel = parallel

    def run(self, registers: dict[int, Column]) -> None:
        """Compute the registers that are needed outside the program."""
        for one, other, label in self._same_length:
            rows, more = registers[one], registers[other]
            if _strings_or_values(rows) != _strings_or_values(more):
                raise ValueError(
                    f"{label}: the columns have {_strings_or_values(rows)} and {_strings_or_values(more)} rows; all "
                    f"columns of a batch must have the same number of rows"
                )
        inputs: list[Tensor] = []
        for register, plane, dtype in self._inputs:
            tensor = _plane(registers[register], plane)
            # Native code does not check the dtypes that the program was built for.
            if tensor.dtype != dtype:
                raise TypeError(f"{self.nodes[0].label}: {plane} must be {dtype}, got {tensor.dtype}")
            inputs.append(tensor if tensor.is_contiguous() else tensor.contiguous())
        results = ops.program.run(
            inputs,
            self._code,
            self._params,
            self._parts,
            self._like,
            self._dtypes,
            self._refusals,
            self._parallel,
        )
        if self._device.type != "cpu":
            self._faults = results[-1]
        for values, (register, root, strings) in zip(results, self._outputs, strict=False):
            if register < 0:
                continue
            base = registers[root]
            if base.offsets is None:
                registers[register] = Column(values)
            else:
                registers[register] = without_strings(base, values) if strings else base._replace(values=values)

    def check(self) -> None:
        """Raise if an element was refused in the last run on a GPU; waits for the GPU."""
        if self._faults is None:
            return
        for line, fault in zip(self._refusals.split("\n"), self._faults.tolist(), strict=True):
            if fault:
                self._faults = None
                before, _, after = line.rpartition("{}")
                raise ValueError(f"{before}{fault - 1}{after}")


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
        """Compute the registers of the operations."""
        results = self._call([tuple([registers[source] for source in sources]) for sources in self._sources])
        for register, column in zip(self.registers, results, strict=True):
            registers[register] = column


class CustomCall:
    """A custom operation."""

    def __init__(self, register: int, instruction: Instruction, sources: tuple[int, ...]) -> None:
        self.register, self.instruction, self._sources = register, instruction, sources

    def run(self, registers: dict[int, Column]) -> None:
        """Compute the register of the operation."""
        registers[self.register] = run_alone(self.instruction, [registers[source] for source in self._sources])


class Segment:
    """Consecutive native calls, up to an operation whose forms are known only after they have run."""

    def __init__(
        self, calls: Sequence[ProgramCall | ShapesCall | CustomCall], aliases: Sequence[tuple[int, int]]
    ) -> None:
        self.calls, self._aliases = list(calls), list(aliases)

    def run(self, registers: dict[int, Column]) -> None:
        """Compute the registers of the calls."""
        self._alias(registers)  # there may be no calls
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
        self.custom: list[tuple[int, CustomCall]] = []
        self.read_from: dict[int, list[int]] = {}
        self.needed = self._needed()

    def _needed(self) -> set[int]:
        """Return the registers still to be computed, without those needed only for known registers."""
        first = len(self.plan.columns)
        needed: set[int] = set()
        pending = list(self.plan.outputs.values())
        while pending:
            register = pending.pop()
            if register not in self.forms and register not in needed:
                needed.add(register)
                pending += self.plan.instructions[register - first].sources
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
            self.custom.append((stage, CustomCall(register, instruction, sources)))

    def results(self, nodes: Sequence[Node]) -> set[int]:
        """Return the registers of nodes that are read outside them."""
        inside = {node.register for node in nodes}
        outputs = {self.alias.get(register, register) for register in self.plan.outputs.values()}
        waiting = {
            self.alias.get(source, source)
            for register, instruction in enumerate(self.plan.instructions, len(self.plan.columns))
            if register in self.needed and register not in self.forms
            for source in instruction.sources
        }
        return {
            register
            for register in inside
            if register in outputs
            or register in waiting
            or any(reader not in inside for reader in self.read_from.get(register, []))
        }


def link(plan: Plan, known: dict[int, Form], *, parallel: bool, grouped: bool = False) -> Segment:
    """Return native calls for all operations of a plan whose inputs have known forms.

    Args:
        plan: The plan.
        known: The forms of the available registers.
        parallel: Whether native calls use torch's threads.
        grouped: Whether to make a call for each kind of element-wise operation, instead of one for all; the benchmark
            compares both.

    Raises:
        TypeError: If an operation does not take a column; the message names the feature.
        ValueError: Likewise.
    """
    linker = _Linker(plan, known, grouped)
    linker.link()
    calls: list[ProgramCall | ShapesCall | CustomCall] = []
    stages = {stage for stage, _ in [*linker.nodes, *linker.shapes]}
    for stage in sorted(stages):
        for (at, _), nodes in linker.nodes.items():
            if at == stage:
                calls += _program_calls(linker, nodes, parallel)
        calls += [ShapesCall(jobs, parallel) for (at, _), jobs in linker.shapes.items() if at == stage]
    calls += [call for _, call in linker.custom]
    return Segment(calls, list(linker.alias.items()))


def _program_calls(linker: _Linker, nodes: Sequence[Node], parallel: bool) -> list[ProgramCall]:
    """Return a call for each device of the columns of nodes."""
    by_device: dict[torch.device, list[Node]] = {}
    for node in nodes:
        by_device.setdefault(node.lowered.form.device, []).append(node)
    results = linker.results(nodes)
    calls = []
    for device, group in by_device.items():
        program = build_program(group, linker.forms, results)
        dtypes = [linker.forms[one].dtype if plane == "values" else torch.int64 for one, plane in program.inputs]
        calls.append(ProgramCall(group, program, dtypes, device, parallel))
    return calls
