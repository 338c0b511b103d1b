"""Programs: the element-wise operations of many columns as instructions, operands and tables.

A part of a program consists of the operations that are connected through their inputs, on columns of one length.
Intermediate results live in scratch tiles (``csrc/core/program.h``); results are written to tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.features.op import Form, Lowered, Step
from recis_hybrid.ops.program import DTYPES, SCRATCH_TILES, STEPS, refusal

_WIDENINGS = {
    torch.int8: Step("widen_8"),
    torch.int16: Step("widen_16"),
    torch.int32: Step("widen_32"),
    torch.uint8: Step("widen_u8"),
    torch.bool: Step("widen_u8"),
}
_COPY = Step("clip_i64", (-(2**63), 2**63 - 1))


class Node(NamedTuple):
    """An element-wise operation of a program."""

    register: int
    sources: tuple[int, ...]
    lowered: Lowered
    label: str


class Place(NamedTuple):
    """The place of an operand: ``"in"`` and ``"out"`` are bound tensors by index, ``"tile"`` is a scratch tile."""

    kind: str
    number: int


class _PlacedStep(NamedTuple):
    step: Step
    out: Place
    a: Place
    b: Place | None
    label: str

    def tiles(self) -> set[int]:
        return {place.number for place in (self.out, self.a, self.b) if place is not None and place.kind == "tile"}


class _Value(NamedTuple):
    """A register inside a program."""

    place: Place
    like: int
    """The input with the same shape, or -1 - input for a shape of one element less than the offsets in that input."""
    root: int
    """The register with the same rows."""
    strings: bool
    """True if it has one value for each string of the root."""


class Output(NamedTuple):
    """A tensor that a program writes."""

    register: int
    """-1 for scratch space."""
    like: int
    dtype: torch.dtype
    root: int
    strings: bool


@dataclass
class Program:
    """A program before it is encoded."""

    inputs: dict[tuple[int, str], int] = field(default_factory=dict)
    """Indices of the bound tensors: the ``"values"`` or ``"offsets"`` of a register, or its ``"lists"``, the offsets of
    the lists that hold its values (or strings)."""
    outputs: list[Output] = field(default_factory=list)
    steps: list[_PlacedStep] = field(default_factory=list)
    parts: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """For each part: its first instruction and one past its last, the input with its length, 1 if that input holds
    offsets, and the input of its lists or -1."""
    same_length: list[tuple[int, int, str]] = field(default_factory=list)
    """Pairs of registers that must have the same number of rows, and the label of the operation that joins them."""

    def input(self, register: int, plane: str) -> int:
        """Return the index of a bound tensor."""
        return self.inputs.setdefault((register, plane), len(self.inputs))

    def encode(self) -> tuple[Tensor, Tensor, str]:
        """Return the instructions, the tables, and for each instruction a line: its error for a refused element."""
        tables: dict[int, int] = {}
        words: list[Tensor] = []
        size = 0
        rows: list[list[int]] = []
        for one in self.steps:
            numbers = one.step.numbers
            if one.step.table is not None:
                if id(one.step.table) not in tables:
                    tables[id(one.step.table)] = size
                    words.append(one.step.table)
                    size += one.step.table.numel()
                numbers = (tables[id(one.step.table)], *numbers)
            operands = [self._operand(place) for place in (one.out, one.a, one.b or one.a)]
            rows.append([STEPS.index(one.step.name), *operands, *numbers, *[0] * (4 - len(numbers))])
        code = torch.tensor(rows, dtype=torch.int64).view(-1, 8)
        params = torch.cat(words) if words else torch.zeros(1, dtype=torch.int64)
        return code, params, "\n".join(refusal(one.label, one.step.name) for one in self.steps)

    def _operand(self, place: Place) -> int:
        if place.kind == "tile":
            return place.number
        return -1 - place.number - (len(self.inputs) if place.kind == "out" else 0)


def build_program(nodes: Sequence[Node], forms: dict[int, Form], results: set[int]) -> Program:
    """Return a program for nodes.

    Args:
        nodes: The nodes, each after its sources.
        forms: The forms of the registers that they read.
        results: The registers that are read outside the program.
    """
    program = Program()
    for part in _parts(nodes):
        _Part(program, forms, results).build(part)
    return program


def _parts(nodes: Sequence[Node]) -> list[list[Node]]:
    """Group the nodes that are connected by registers."""
    parent: dict[int, int] = {}

    def find(register: int) -> int:
        parent.setdefault(register, register)
        while parent[register] != register:
            register = parent[register]
        return register

    for node in nodes:
        for source in node.sources:
            parent[find(source)] = find(node.register)
    parts: dict[int, list[Node]] = {}
    for node in nodes:
        parts.setdefault(find(node.register), []).append(node)
    return list(parts.values())


class _Part:
    """Emits the instructions of one part."""

    def __init__(self, program: Program, forms: dict[int, Form], results: set[int]) -> None:
        self.program, self.forms, self.results = program, forms, results
        self.values: dict[int, _Value] = {}
        self.steps: list[_PlacedStep] = []
        self.tiles: list[torch.dtype] = []
        self.length: tuple[int, int, int] | None = None
        self.first_root = -1

    def build(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.node(node)
        tile_places = self.scratch()
        begin = len(self.program.steps)
        for one in self.steps:
            operands = one.out, one.a, one.b
            places = [tile_places[p.number] if p is not None and p.kind == "tile" else p for p in operands]
            assert places[0] is not None
            assert places[1] is not None
            self.program.steps.append(one._replace(out=places[0], a=places[1], b=places[2]))
        assert self.length is not None
        self.program.parts.append((begin, len(self.program.steps), *self.length))

    def node(self, node: Node) -> None:
        first, *others = [self.operand(source, node.label) for source in node.sources]
        place, second, value = first.place, others[0].place if others else None, first
        strings = node.sources[0] not in self.values
        if strings:
            second = Place("in", -1 - first.like)
        narrow, is_result = node.lowered.form.dtype == torch.int32, node.register in self.results
        for number, step in enumerate(node.lowered.steps, 1):
            direct = is_result and not narrow and number == len(node.lowered.steps)
            out = self.output(node.register, value, step) if direct else self.tile(step)
            self.steps.append(_PlacedStep(step, out, place, second, node.label))
            place, second = out, None
        if is_result and (narrow or not node.lowered.steps):
            step = Step("i64_to_i32") if narrow else _COPY
            out = self.output(node.register, value, step)
            self.steps.append(_PlacedStep(step, out, place, None, node.label))
        self.values[node.register] = value._replace(place=place)

    def operand(self, register: int, label: str) -> _Value:
        """Return the value of a register, with narrow integers widened to 64 bits."""
        if register in self.values:
            return self.values[register]
        form = self.forms[register]
        number = self.program.input(register, "values")
        value = _Value(Place("in", number), number, register, False)
        if form.strings:
            offsets = self.program.input(register, "offsets")
            value = value._replace(like=-1 - offsets, strings=True)
        if self.length is None:
            lists = self.program.input(register, "lists") if form.levels > int(form.strings) else -1
            self.length = (-1 - value.like, 1, lists) if form.strings else (number, 0, lists)
            self.first_root = register
        elif register != self.first_root:
            self.program.same_length.append((self.first_root, register, label))
        if form.strings:
            return value
        if form.dtype in _WIDENINGS:
            step = _WIDENINGS[form.dtype]
            tile = self.tile(step)
            self.steps.append(_PlacedStep(step, tile, value.place, None, label))
            value = value._replace(place=tile)
        self.values[register] = value
        return value

    def tile(self, step: Step) -> Place:
        self.tiles.append(_result_dtype(step.name))
        return Place("tile", len(self.tiles) - 1)

    def output(self, register: int, value: _Value, step: Step) -> Place:
        outputs = self.program.outputs
        outputs.append(Output(register, value.like, _result_dtype(step.name), value.root, value.strings))
        return Place("out", len(outputs) - 1)

    def scratch(self) -> dict[int, Place]:
        """Assign scratch tiles to intermediate results for as long as they are read, and tensors if none is free."""
        last = {tile: at for at, one in enumerate(self.steps) for tile in one.tiles()}
        free = list(range(SCRATCH_TILES))
        tile_places: dict[int, Place] = {}
        assert self.length is not None
        like = -1 - self.length[0] if self.length[1] else self.length[0]
        for at, one in enumerate(self.steps):
            if one.out.kind == "tile":
                if free:
                    tile_places[one.out.number] = Place("tile", free.pop(0))
                else:
                    spill = Output(-1, like, self.tiles[one.out.number], -1, False)
                    self.program.outputs.append(spill)
                    tile_places[one.out.number] = Place("out", len(self.program.outputs) - 1)
            for tile in one.tiles():
                if last[tile] == at and tile_places[tile].kind == "tile":
                    free.insert(0, tile_places[tile].number)
        return tile_places


def _result_dtype(name: str) -> torch.dtype:
    if name == "i64_to_i32":
        return torch.int32
    if name.startswith("bucket"):
        return torch.int64
    return {"f32": torch.float32, "f64": torch.float64}.get(name[-3:], torch.int64)


def numbers_of(dtypes: Sequence[torch.dtype]) -> list[int]:
    """Return the codes of dtypes in native code."""
    return [DTYPES[dtype] for dtype in dtypes]
