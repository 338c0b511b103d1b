"""Operators on row gradients: ordered reduction, clipping, and optimizer updates.

Shapes: F features, V vectors of a feature, N positions, U distinct rows, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.gather import RowGroups

nothing_returned("reduce_rows", "clip_rows", "update_rows")


@torch.library.register_fake("recis::sum_squares")  # type: ignore[untyped-decorator]
def _sum_squares(values: Tensor, count: Tensor) -> Tensor:
    return values.new_empty(1, dtype=torch.float64)


class Table(NamedTuple):
    """The records of a table in the form of update arguments."""

    blocks: Blocks
    """Written."""
    element: int
    """Element type of the embedding, a value of ``blocks.ELEMENTS``."""
    state_element: int
    """Element type of the optimizer state: float32, or that of the embedding."""
    dim: int
    """D."""
    step: int
    """Step to write into the metadata of rows."""
    marks_seen: bool
    """True if the update also writes ``seen_step`` and ``frequency``, for a lookup of the same rows."""
    seed: int
    """32-bit seed of stochastic rounding, different for each step."""


class Rule(NamedTuple):
    """An optimizer's update as plain data; also for programs that apply it without torch."""

    kind: int
    """A value of ``RULES``."""
    offsets: list[int]
    """Byte offsets of the state in a record."""
    values: list[float]
    """Hyperparameters, in the order that the rule's file in ``csrc/core/rules`` states."""


RULES = {
    "sgd": 0,
    "momentum": 1,
    "adagrad": 2,
    "rowwise_adagrad": 3,
    "adam": 4,
    "adamw": 5,
    "adamw_tf": 6,
    "adam_l2": 7,
    "amsgrad": 8,
    "adagrad_sum": 9,
    "rmsprop": 10,
    "ftrl": 11,
    "lamb": 12,
    "lion": 13,
    "rowwise_adam": 14,
    "assign": 15,
}
"""Numbers of the rules, as in ``csrc/core/rules/rule.h``."""


class Gradients(NamedTuple):
    """The gradients of the vectors of a lookup, grouped by row."""

    values: Sequence[Tensor]
    """For each feature, float32 ``[V, D]`` with contiguous rows; the stride between rows may be 0."""
    groups: RowGroups
    """The sources of the gradient of each row."""
    factor: Tensor | None = None
    """Factor of summed gradients, float32 ``[1]`` on the device of the rows; None for 1."""


def reduce_rows(gradients: Gradients, out: Tensor) -> None:
    """Sum the gradients of each row in input order, in chunks of 256 whose sums are added in order.

    Args:
        gradients: The gradients to sum.
        out: float32 ``[N, D]``; the first U rows are written, in the order of ``groups.unique``.
    """
    torch.ops.recis.reduce_rows(*_parts(gradients), out)


def sum_squares(values: Tensor, count: Tensor) -> Tensor:
    """Return the sum of the squares of the first U rows, float64 ``[1]``; the order of the sum is fixed.

    Args:
        values: float32 ``[N, D]``.
        count: int64 ``[1]``: U.
    """
    return torch.ops.recis.sum_squares(values, count)  # type: ignore[no-any-return]


def clip_rows(values: Tensor, count: Tensor, factor: Tensor | None, max_norm: float) -> None:
    """Multiply the first U rows by a factor, and scale each down to an L2 norm of at most ``max_norm``, in place.

    Args:
        values: float32 ``[N, D]``.
        count: int64 ``[1]``: U.
        factor: float32 ``[1]``; None for 1.
        max_norm: Maximum norm; the scale is ``max_norm / (norm + 1e-6)``, as in torch, but at most 1.
    """
    torch.ops.recis.clip_rows(values, count, factor, max_norm)


def update_rows(table: Table, gradients: Gradients, rule: Rule, t: int) -> None:
    """Reduce row gradients and apply a rule to the rows that have one, in one pass.

    Args:
        table: The records.
        gradients: Their gradients.
        rule: The rule.
        t: Number of the step, from 1.
    """
    torch.ops.recis.update_rows(*_records(table), *_parts(gradients), *rule, t)


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
