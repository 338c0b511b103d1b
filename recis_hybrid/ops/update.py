"""Operators on row gradients: ordered reduction, and the optimizers' updates.

Shapes: F features, V vectors of a feature, U distinct rows, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.gather import RowGroups

nothing_returned(
    "reduce_rows", "sgd_update", "momentum_update", "adagrad_update", "rowwise_adagrad_update", "adam_update"
)


class Table(NamedTuple):
    """A table's records as an update sees them."""

    blocks: Blocks
    """Written."""
    element: int
    """Of the embedding, a value of ``blocks.ELEMENTS``."""
    state_element: int
    """Of the optimizer state: float32's, or the embedding's."""
    dim: int
    """D."""
    step: int
    """Goes into the rows' metadata."""
    marks_seen: bool
    """Whether the update also writes ``seen_step`` and ``frequency``, for a lookup of the same rows."""
    seed: int
    """Of stochastic rounding, 32 bits; one for each step."""


class Gradients(NamedTuple):
    """The gradients of a lookup's vectors, and how they belong to rows."""

    values: Sequence[Tensor]
    """For each feature, float32 ``[V, D]`` with contiguous rows (a stride of 0 between rows is fine)."""
    groups: RowGroups
    """Which rows take which of them."""
    factor: Tensor | None = None
    """float32 ``[1]`` that summed gradients are multiplied by, on the device of the rows; None for 1."""


def reduce_rows(gradients: Gradients, out: Tensor) -> None:
    """Sum the gradients of each row, in input order, in chunks of 256 whose sums are added in order.

    Args:
        gradients: What to sum.
        out: float32 ``[N, D]``; the first U rows are written, in the order of ``groups.unique``.
    """
    torch.ops.recis.reduce_rows(*_parts(gradients), out)


def sgd_update(table: Table, gradients: Gradients, *, lr: float) -> None:
    """Reduces row gradients and does w -= lr g, in one pass."""
    torch.ops.recis.sgd_update(*_records(table), *_parts(gradients), lr)


def momentum_update(table: Table, gradients: Gradients, *, buffer_offset: int, lr: float, momentum: float) -> None:
    """Reduces row gradients and does b = momentum b + g, w -= lr b; ``buffer_offset`` is the byte offset of b."""
    torch.ops.recis.momentum_update(*_records(table), *_parts(gradients), buffer_offset, lr, momentum)


def adagrad_update(table: Table, gradients: Gradients, *, sum_offset: int, lr: float, eps: float) -> None:
    """Reduces row gradients and applies Adagrad, in one pass; ``sum_offset`` is the byte offset of ``sum``."""
    torch.ops.recis.adagrad_update(*_records(table), *_parts(gradients), sum_offset, lr, eps)


def rowwise_adagrad_update(table: Table, gradients: Gradients, *, sum_offset: int, lr: float, eps: float) -> None:
    """As :func:`adagrad_update` with one float32 ``sum`` a row, of the mean of the squared gradient."""
    torch.ops.recis.rowwise_adagrad_update(*_records(table), *_parts(gradients), sum_offset, lr, eps)


def adam_update(
    table: Table,
    gradients: Gradients,
    *,
    exp_avg_offset: int,
    exp_avg_sq_offset: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    t: int,
) -> None:
    """Reduces row gradients and applies Adam to rows that have one; weights are first multiplied by ``decay``.

    ``t`` counts from 1; ``eps`` is added to the root of the second moment before its bias is corrected.
    """
    torch.ops.recis.adam_update(
        *_records(table), *_parts(gradients), exp_avg_offset, exp_avg_sq_offset, lr, *betas, eps, decay, t
    )


def _records(table: Table) -> tuple[object, ...]:
    return (*table.blocks, *table[1:])


def _parts(gradients: Gradients) -> tuple[object, ...]:
    groups = gradients.groups
    return (
        gradients.values,
        groups.count,
        groups.unique,
        groups.offsets,
        groups.sources,
        groups.scales,
        gradients.factor,
    )
