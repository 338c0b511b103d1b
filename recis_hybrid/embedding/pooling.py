"""Pooling: computes the outputs of features from a lookup and, in backward, the gradients for the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recis_hybrid import ops
from recis_hybrid.embedding.compilation import outside_graphs
from recis_hybrid.embedding.table.hash_table import Anchor
from recis_hybrid.embedding.table.lookup import Request
from recis_hybrid.embedding.table.record_layout import RecordLayout
from recis_hybrid.ops.gather import MAX

_PART_FLOATS = 16  # 64 bytes: the alignment that JAX needs to share a buffer


class AnyLookup(Protocol):
    """A Lookup, or a ShardedLookup."""

    request: Request
    gathered: Tensor | None


class AnyTable(Protocol):
    """A HashTable or a ShardedTable; it only accepts its own lookups."""

    layout: RecordLayout
    device: torch.device

    @property
    def anchor(self) -> Anchor:
        """The table's place in autograd."""

    def gather(self, lookup: Any, out: Tensor, starts: Sequence[int], winners: Tensor | None = None) -> None:
        """Write each feature's vectors."""

    def add_gradients(self, lookup: Any, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients for the optimizer's step."""


@dataclass
class Outputs:
    """Layout of a lookup's outputs: one buffer, in which each feature's part is 64-byte aligned."""

    shapes: list[tuple[int, ...]]
    """For each feature, the shape of its output."""
    starts: list[int]
    """For each feature, the offset of its part."""
    total: int
    """Elements of the buffer."""
    device: torch.device
    """Device of the outputs."""
    winners: Tensor | None = None
    """int32, shaped like the buffer: position in its bag of the id with the maximum of each element; for backward."""

    @staticmethod
    def of(vectors: list[int], shapes: list[tuple[int, ...]], table: AnyTable, device: torch.device) -> Outputs:
        """Return the layout of features with the given numbers of vectors and output shapes."""
        dim = table.layout.dim
        sizes = [-(-count * dim // _PART_FLOATS) * _PART_FLOATS for count in vectors]
        total = sum(sizes)
        starts = [0, *accumulate(sizes[:-1])]
        return Outputs(shapes, starts, max(total, _PART_FLOATS), device)

    def room(self, table: AnyTable) -> Tensor:
        """Return a float32 buffer of this layout, on the table's device."""
        return ops.memory.empty_bytes(4 * self.total, table.device).view(torch.float32)

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Return each feature's part of a buffer, in its shape.

        They share its memory but are not autograd views, so each may be modified in place under autograd.
        """
        width = self.shapes[0][-1]
        if width % _PART_FLOATS == 0 and all(len(shape) == 2 and shape[1] == width for shape in self.shapes):
            rows = [shape[0] for shape in self.shapes]  # no gaps: one call instead of many
            parts = buffer[: sum(rows) * width].view(-1, width)
            return torch.unsafe_split_with_sizes(parts, rows)
        storage = buffer.untyped_storage()
        places = zip(self.shapes, self.starts, strict=True)
        return tuple(buffer.new_empty(0).set_(storage, start, shape, _strides(shape)) for shape, start in places)


def gather(table: AnyTable, lookup: AnyLookup, outputs: Outputs, *, keep_winners: bool = False) -> tuple[Tensor, ...]:
    """Return each feature's vectors, in one new buffer."""
    buffer, lookup.gathered = lookup.gathered, None
    if buffer is None:
        buffer = outputs.room(table)
        if keep_winners and lookup.request.bags.combiners.count(MAX):
            outputs.winners = torch.empty(outputs.total, dtype=torch.int32, device=table.device)
        table.gather(lookup, buffer, outputs.starts, outputs.winners)
    return outputs.views(buffer if outputs.device == table.device else buffer.to(outputs.device))


def differentiable(table: AnyTable, lookup: AnyLookup, outputs: Outputs) -> tuple[Tensor, ...]:
    """Return each feature's vectors; backward adds their gradients to the table for the optimizer's step."""
    return _Gather.apply(table.anchor, table, lookup, outputs)  # type: ignore[no-any-return,no-untyped-call]


def spread(
    table: AnyTable, lookup: AnyLookup, outputs: Outputs, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return gradients in the table's form: per vector, or per position with the combiner ``max``."""
    dim, request = table.layout.dim, lookup.request
    if not request.bags.combiners.count(MAX) and all(len(shape) == 2 and shape[1] == dim for shape in outputs.shapes):
        return list(gradients)
    results: list[Tensor | None] = []
    for number, gradient in enumerate(gradients):
        if gradient is None:
            results.append(None)
            continue
        vectors = request.bags.vectors[number]
        gradient = gradient.to(table.device)
        if gradient.dim() != 2 or gradient.size(1) != dim:
            gradient = gradient.reshape(vectors, dim)
        if request.bags.combiners[number] == MAX:
            assert outputs.winners is not None
            start = outputs.starts[number]
            out = gradient.new_empty(request.bags.lengths[number], dim)
            winners = outputs.winners[start : start + vectors * dim]
            gradient = gradient if gradient.stride(1) == 1 or dim == 1 else gradient.contiguous()
            ops.gather.spread_max(request.bags.offsets[number], winners, gradient, out)
            gradient = out
        results.append(gradient)
    return results


@outside_graphs("backward")
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: AnyTable, lookup: AnyLookup, outputs: Outputs) -> tuple[Tensor, ...]:
        ctx.table, ctx.lookup, ctx.outputs = table, lookup, outputs
        ctx.set_materialize_grads(False)  # features that the loss does not use get None, not zeros
        return gather(table, lookup, outputs, keep_winners=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None, None]:
        ctx.table.add_gradients(ctx.lookup, spread(ctx.table, ctx.lookup, ctx.outputs, gradients))
        return None, None, None, None


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
