"""Exact mode: rows catch up on the steps that they have missed, as if every step had changed every row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.embedding import HashTable, RecordLayout
from recis_hybrid.ops import update
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.update import RULES, STEP_BYTES, Rule

RULE_NAMES = {number: name for name, number in RULES.items()}
"""Names of rules by number."""
_NEVER = 1 << 62
"""Replays of a rule whose rows are never at rest."""
_NEGLIGIBLE = 2.0**-40
_LEAST = 1e-300
"""In place of a factor of 0, which has no logarithm."""


class Idle(NamedTuple):
    """The effect of a step of a rule on a row without a gradient."""

    embedding: float
    """Factor of the embedding of a row at rest."""
    state: tuple[float, ...] = ()
    """Factors of its first state fields."""
    replays: int = 0
    """Steps after which a row is at rest, because its moments no longer change the embedding."""
    rests: bool = True
    """True if a row is at rest where its first state field is 0."""


class Run(NamedTuple):
    """Consecutive steps with equal hyperparameters."""

    step: int
    """Step of the table of the first."""
    steps: int
    t: int
    """Step of the optimizer of the first."""
    kind: int
    """A value of ``RULES``."""
    values: tuple[float, ...]
    """Hyperparameters."""

    @staticmethod
    def of(kind: int, numbers: Sequence[float]) -> Run:
        """Return the run that :meth:`numbers` describes."""
        step, steps, t, *values = numbers
        return Run(int(step), int(steps), int(t), kind, tuple(values))

    def numbers(self) -> list[float]:
        """Return all but ``kind``."""
        return [self.step, self.steps, self.t, *self.values]


def idle(kind: int, values: Sequence[float]) -> Idle | None:
    """Return what a step does to rows without a gradient.

    Args:
        kind: A value of ``RULES``.
        values: Hyperparameters, in the order of the rule.

    Returns:
        The effect; None if rows cannot catch up on steps of this rule.
    """
    match RULE_NAMES[kind]:
        case "sgd":
            lr, decay = values
            return Idle(_single(1.0 - lr * decay))
        case "momentum":
            _, momentum, decay, _ = values
            return _unless(decay, Idle(1.0, (_single(momentum),), _replays(momentum)))
        case "adagrad":
            return _unless(values[2], Idle(1.0))
        case "rmsprop":
            return _unless(values[3], Idle(1.0, (_rest(values[1]),)))
        case "lion":
            lr, _, beta, decay = values
            return Idle(_single(1.0 - lr * decay), (_rest(beta),), _NEVER)
        case "adam" | "adamw" | "adamw_tf" | "adam_l2" | "amsgrad" as name:
            lr, first, second, _, decay = (*values, 0.0)[:5]
            keep = {"adamw": 1.0 - lr * decay, "adamw_tf": 1.0 - decay}.get(name, 1.0)
            ratio = first / math.sqrt(second) if second > 0 else 1.0
            moving = Idle(_single(keep), (_rest(first), _rest(second)), _replays(ratio))
            return _unless(decay if name in ("adam_l2", "amsgrad") else 0.0, moving)
        case _:
            return None


def _unless(decay: float, still: Idle) -> Idle:
    """Return what happens without coupled weight decay; with it, rows are never at rest."""
    return Idle(1.0, (), _NEVER, rests=False) if decay else still


def _replays(ratio: float) -> int:
    """Return the steps until an effect that shrinks by a ratio a step is negligible."""
    if ratio <= 0.0:
        return 1
    return _NEVER if ratio >= 1.0 else math.ceil(math.log(_NEGLIGIBLE) / math.log(ratio))


def _single(x: float) -> float:
    """Return a number rounded to float32, as kernels have it."""
    return torch.tensor(x, dtype=torch.float32).item()


def _rest(beta: float) -> float:
    """Return the factor of a moment in kernels, which have 1 - beta."""
    return _single(1.0 - _single(1.0 - beta))


def history_of(table: HashTable) -> History | None:
    """Return the history of a table's steps, if its optimizer keeps one."""
    return table.before_read if isinstance(table.before_read, History) else None


def keep_history(table: HashTable, exact: bool) -> None:
    """Keep a history of a table's steps; or let all rows catch up, and keep none."""
    if exact and history_of(table) is None and not table.read_only:
        table.before_read = History(table)
    if not exact and history_of(table) is not None:
        table.catch_up()
        table.before_read = None


class History:
    """The steps done on a table, and how its rows catch up on those that they have missed: a ``BeforeRead``.

    A step takes 80 bytes of memory, on the device of the rows, and in checkpoints up to 64 bytes if its hyperparameters
    differ from those of the step before.

    Args:
        table: The table.
    """

    def __init__(self, table: HashTable) -> None:
        self._layout: RecordLayout = table.layout
        self._device = table.device
        self._restart(table.step)

    def _restart(self, done: int) -> None:
        """Forget all steps; rows count as caught up on the ``done`` steps so far."""
        self.runs: list[Run] = []
        self.done = done
        """The table's step that was recorded last."""
        self._first = done + 1
        self._steps = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._logs = [0.0] * update.FACTORS
        self._rests, self._replays, self._scaled = True, 0, 0

    def __call__(self, blocks: Blocks, count: Tensor, rows: Tensor, step: int) -> None:
        """Let rows catch up; see ``BeforeRead``."""
        if step != self.done:  # the table was loaded without its optimizer
            self._restart(step)
        if not self.runs:
            return
        last, layout = self.runs[-1], self._layout
        offsets = [layout.offset(field.name) for field in layout.state][: self._scaled]
        replay = update.Replay(last.kind, self._first, self._replays, self._rests, offsets)
        update.catch_up_rows(
            blocks, layout.element, layout.state_element, layout.dim, step, count, rows, self._steps, replay
        )

    def record(self, table: HashTable, rule: Rule, t: int) -> None:
        """Record a step that is about to be counted.

        Args:
            table: The table, before the step is counted.
            rule: The rule of the step.
            t: Step of the optimizer, from 1.
        """
        if table.step != self.done:
            self._restart(table.step)
        self._append(table, rule, Run(table.step + 1, 1, t, rule.kind, tuple(rule.values)))

    def load(self, table: HashTable, rule: Rule, runs: Sequence[Run]) -> None:
        """Replace the history by saved runs of one rule.

        Args:
            table: The table.
            rule: The optimizer's present rule, for the offsets of the state.
            runs: The runs, at least one.
        """
        self._restart(runs[0].step - 1)
        for run in runs:
            self._append(table, Rule(run.kind, rule.offsets, list(run.values)), run)

    def _append(self, table: HashTable, rule: Rule, run: Run) -> None:
        if self.runs and self.runs[-1].kind != run.kind:
            raise ValueError(
                f"table {table.name}: with exact=True, the rule cannot change from {RULE_NAMES[self.runs[-1].kind]} to "
                f"{RULE_NAMES[run.kind]} in the course of training"
            )
        still = idle(run.kind, run.values)
        assert still is not None, "SparseOptimizer has refused optimizers without one"
        start = self.done + 1 - self._first
        end = start + run.steps
        if end * STEP_BYTES > self._steps.numel():
            steps = torch.empty(max(2 * start, end, 64) * STEP_BYTES, dtype=torch.uint8, device=self._device)
            steps[: start * STEP_BYTES] = self._steps[: start * STEP_BYTES]
            self._steps = steps
        factors = (still.embedding, *still.state, 1.0, 1.0)[: update.FACTORS]
        rates = [math.log(max(factor, _LEAST)) for factor in factors]
        recorded = torch.empty(run.steps * STEP_BYTES, dtype=torch.uint8)
        seed, increment = table.rounding_sequence(run.step)
        update.record_steps(rule, run.t, seed, increment, self._logs, rates, recorded)
        self._steps[start * STEP_BYTES : end * STEP_BYTES].copy_(recorded, non_blocking=True)
        self._logs = [log + run.steps * rate for log, rate in zip(self._logs, rates, strict=True)]
        rests = still.rests and still.embedding >= 0.0
        self._rests = self._rests and rests
        self._replays = max(self._replays, still.replays if rests else _NEVER)
        self._scaled = max(self._scaled, len(still.state))
        self.done += run.steps
        before = self.runs[-1] if self.runs else None
        if before is not None and (before.values, before.t + before.steps) == (run.values, run.t):
            self.runs[-1] = before._replace(steps=before.steps + run.steps)
        else:
            self.runs.append(run)
