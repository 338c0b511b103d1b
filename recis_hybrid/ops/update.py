"""Operators on row gradients: ordered reduction, clipping, optimizer updates, and catching up on missed ones.

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

nothing_returned("reduce_rows", "clip_rows", "update_rows", "catch_up_rows", "record_steps")


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


STEP_BYTES = 80
"""Bytes of a recorded step, ``kStepBytes`` in ``csrc/core/catch_up.h``."""

FACTORS = 3
"""Factors of a step at rest: of the embedding and of the first two state fields."""


class Replay(NamedTuple):
    """The way in which rows catch up on recorded steps."""

    kind: int
    """A value of ``RULES``."""
    first: int
    """The table's step that was recorded first."""
    replays: int
    """Greatest number of steps that a row needs to replay before it is at rest."""
    rests: bool
    """True if rows are at rest after these steps, or where their first state field is 0."""
    scaled: list[int]
    """Byte offsets of the state fields, at most 2, that are multiplied in steps at rest."""


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


def record_steps(
    rule: Rule, t: int, seed: int, increment: int, logs: list[float], rates: list[float], out: Tensor
) -> None:
    """Write the records of steps of one rule.

    Args:
        rule: The rule.
        t: Number of the first of the steps, from 1.
        seed: 64 bits, as a signed integer, of which the high 32 are the seed of the first step's rounding.
        increment: Added to ``seed`` for each further step, modulo 2^64.
        logs: Sums, over all earlier steps, of the logarithms of the ``FACTORS`` of a step at rest.
        rates: These logarithms for each of the steps.
        out: uint8, ``STEP_BYTES`` for each step that is to be written; on the CPU.
    """
    torch.ops.recis.record_steps(*rule, t, seed, increment, logs, rates, out)


def catch_up_rows(
    blocks: Blocks,
    element: int,
    state_element: int,
    dim: int,
    step: int,
    count: Tensor,
    rows: Tensor,
    steps: Tensor,
    replay: Replay,
) -> None:
    """Let rows catch up on the steps, up to ``step``, that they have missed since their ``updated_step``.

    Args:
        blocks: Written; also the ``updated_step`` of the rows.
        element: Element type of the embedding, a value of ``blocks.ELEMENTS``.
        state_element: Element type of the optimizer state.
        dim: D.
        step: Number of steps done on the table.
        count: int64 ``[1]``: number of valid rows.
        rows: int64 ``[n]``; the valid ones are distinct.
        steps: uint8: the steps ``replay.first`` to ``step``, or more, as :func:`record_steps` writes them.
        replay: How to catch up.
    """
    torch.ops.recis.catch_up_rows(*blocks, element, state_element, dim, step, count, rows, steps, *_order(replay))


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


def _order(replay: Replay) -> tuple[object, ...]:
    return replay.first, replay.kind, replay.replays, replay.rests, replay.scaled
