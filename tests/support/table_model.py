"""Tables as a dict in plain Python and numpy: rows, admission counts and optimizers, to compare with an engine.

To cover another optimizer, admission rule or eviction rule, add an entry to ``RULES``, ``GATES`` or ``EVICTIONS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import Admission, Eviction, MinFrequency, OptimizerSpec, Rows, Unused
from recis_hybrid.embedding.initializers import table_key
from tests.support import philox
from tests.support.near import OF_ADAM, ROUNDINGS, roundings

META = ("updated_step", "seen_step", "frequency")
Array = NDArray[np.float64]
Parts = dict[str, Array]
"""Embedding and optimizer state of a row, by name: the stored values, in float64."""


# Optimizers


@dataclass(frozen=True)
class Rule:
    """An optimizer and its formula."""

    spec: OptimizerSpec
    update: Callable[[Parts, Array, int], Parts]
    """(row, summed gradient, step from 1) → the parts that change."""
    allowed: float = ROUNDINGS
    """Tolerance, in roundings of float32; 0 where a float32 result is exact."""


def _adam(parts: Parts, g: Array, t: int) -> tuple[Array, Array]:
    return parts["exp_avg"] + 0.1 * (g - parts["exp_avg"]), parts["exp_avg_sq"] + 0.01 * (g * g - parts["exp_avg_sq"])


def _adam_update(parts: Parts, g: Array, t: int) -> Parts:
    m, v = _adam(parts, g, t)
    change = 0.05 * np.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-6)
    return {"embedding": parts["embedding"] - change, "exp_avg": m, "exp_avg_sq": v}


def _adamw_update(parts: Parts, g: Array, t: int) -> Parts:
    m, v = _adam(parts, g, t)
    change = 0.05 / (1 - 0.9**t) * m / (np.sqrt(v / (1 - 0.99**t)) + 1e-6)
    return {"embedding": (1 - 0.05 * 0.1) * parts["embedding"] - change, "exp_avg": m, "exp_avg_sq": v}


def _momentum_update(parts: Parts, g: Array, t: int) -> Parts:
    b = 0.9 * parts["momentum_buffer"] + g
    return {"embedding": parts["embedding"] - 0.1 * b, "momentum_buffer": b}


def _adagrad_update(parts: Parts, g: Array, t: int) -> Parts:
    s = parts["sum"] + g * g
    return {"embedding": parts["embedding"] - 0.1 * g / (np.sqrt(s) + 1e-10), "sum": s}


def _rowwise_update(parts: Parts, g: Array, t: int) -> Parts:
    s = parts["sum"] + np.mean(g * g)
    return {"embedding": parts["embedding"] - 0.1 * g / (np.sqrt(s) + 1e-8), "sum": s}


_ADAM = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6}
RULES: dict[str, Rule] = {
    "SGD": Rule(optim.SGD.spec(lr=0.5), lambda parts, g, t: {"embedding": parts["embedding"] - 0.5 * g}, 0),
    "momentum": Rule(optim.SGD.spec(lr=0.1, momentum=0.9), _momentum_update),
    "Adagrad": Rule(optim.Adagrad.spec(lr=0.1, initial_accumulator_value=0.1), _adagrad_update),
    "RowwiseAdagrad": Rule(optim.RowwiseAdagrad.spec(lr=0.1, initial_accumulator_value=0.1), _rowwise_update),
    "Adam": Rule(optim.Adam.spec(**_ADAM), _adam_update, OF_ADAM),
    "AdamW": Rule(optim.AdamW.spec(**_ADAM, weight_decay=0.1), _adamw_update, OF_ADAM),
}


# Admission


class Gate(Protocol):
    """The state of an admission rule in one member table."""

    def admitted(self, ids: Sequence[int]) -> set[int]:
        """Count the occurrences of ids without a row in a training lookup, and return those that get one."""

    def forget(self, ids: Iterable[int]) -> None:
        """Drop the state of ids that were inserted without admission."""

    def columns(self) -> dict[str, list[int]]:
        """Return the state as a checkpoint has it, by ascending id."""


@dataclass
class Counted:
    """Counts of ``MinFrequency``."""

    least: int
    counts: Counter[int] = field(default_factory=Counter)

    def admitted(self, ids: Sequence[int]) -> set[int]:
        self.counts.update(ids)
        found = {i for i in ids if self.counts[i] >= self.least}
        self.forget(found)
        return found

    def forget(self, ids: Iterable[int]) -> None:
        for i in ids:
            self.counts.pop(i, None)

    def columns(self) -> dict[str, list[int]]:
        ids = sorted(self.counts)
        return {"ids": ids, "count": [self.counts[i] for i in ids]}


GATES: dict[str, tuple[Admission, Callable[[], Gate]]] = {
    "twice": (MinFrequency(2), lambda: Counted(2)),
    "four times": (MinFrequency(4), lambda: Counted(4)),
}
"""Admission rules, with their models."""


# Eviction


@dataclass(frozen=True)
class OddIds:
    """A rule as users write them: odd ids, unless they were updated in the last step."""

    def unwanted(self, rows: Rows) -> Tensor:
        return (rows.ids % 2 == 1) & (rows.updated_step < rows.step)


def _unused(steps: int) -> Callable[[dict[int, Row], int], set[int]]:
    return lambda rows, step: {i for i, row in rows.items() if row.seen <= step - steps}


def _odd(rows: dict[int, Row], step: int) -> set[int]:
    return {i for i, row in rows.items() if i % 2 == 1 and row.updated < step}


EVICTIONS: dict[str, tuple[Eviction, Callable[[dict[int, Row], int], set[int]]]] = {
    **{f"unused for {n}": (Unused(n), _unused(n)) for n in (1, 2, 4)},
    "odd": (OddIds(), _odd),
}
"""Eviction rules, each with a function (rows of a member table, step) → ids to erase."""


# Tables


@dataclass
class Row:
    """A row as it should be."""

    parts: Parts
    updated: int = 0
    seen: int = 0
    frequency: int = 0

    @property
    def meta(self) -> tuple[int, int, int]:
        return self.updated, self.seen, self.frequency


class TableModel:
    """A member table whose initializer is ``Uniform(-1, 1)``.

    Args:
        name: Its name.
        dim: Elements of a vector.
        seed: Seed of the engine.
        dtype: Dtype of embeddings.
        rule: Its optimizer.
        gate: Admission; None: all ids.
        zeros: True if ids without a row have zeros, otherwise their first value.
    """

    def __init__(
        self, name: str, dim: int, seed: int, dtype: torch.dtype, rule: Rule, gate: Gate | None, zeros: bool
    ) -> None:
        self.name, self.dim, self.dtype, self.rule, self.gate, self.zeros = name, dim, dtype, rule, gate, zeros
        self._key = table_key(seed, name)
        self.rows: dict[int, Row] = {}

    def new_row(self, i: int) -> Row:
        """Return a row with first values."""
        embedding = philox.uniform(self._key, np.array([i]), self.dim, -1.0, 1.0)[0]
        parts = {"embedding": torch.from_numpy(embedding).to(self.dtype).double().numpy()}
        for state in self.rule.spec.row_state:
            parts[state.name] = np.full(state.width or self.dim, np.float32(state.first_value), np.float64)
        return Row(parts)

    def vectors(self, ids: Sequence[int]) -> Array:
        """Return what a lookup of ids outputs, ``[n, dim]``."""
        out = np.zeros((len(ids), self.dim))
        for at, i in enumerate(ids):
            if i in self.rows:
                out[at] = self.rows[i].parts["embedding"]
            elif not self.zeros:
                out[at] = self.new_row(i).parts["embedding"]
        return out

    def look_up(self, ids: Sequence[int], step: int) -> Array:
        """Do a training lookup of step ``step``, and return its output."""
        missing = [i for i in ids if i not in self.rows]
        for i in set(missing) if self.gate is None else self.gate.admitted(missing):
            self.rows[i] = self.new_row(i)
        for i in ids:
            if (row := self.rows.get(i)) is not None:
                row.seen, row.frequency = step, row.frequency + 1
        return self.vectors(ids)

    def update(self, gradients: Mapping[int, Array], step: int, found: Mapping[str, Tensor]) -> None:
        """Do an optimizer step, compare it with the rows that the engine has now, and take over their rounding.

        Args:
            gradients: Summed gradients by id; only of ids with a row.
            step: Steps including this one.
            found: The engine's columns, rows by ascending id.
        """
        ids = sorted(gradients)
        if not ids:
            return
        at = np.searchsorted(found["ids"].numpy(), ids)
        expected = [self.rule.update(self.rows[i].parts, gradients[i], step) for i in ids]
        for part in expected[0]:
            got = found[part][at]
            want = torch.from_numpy(np.stack([np.broadcast_to(each[part], got.shape[1:]) for each in expected]))
            error = roundings(got.float(), want.float())
            if got.dtype != torch.float32:
                # Stochastic rounding takes one of the two neighbors.
                spacing = 1.001 * torch.finfo(got.dtype).eps * want.abs() + torch.finfo(got.dtype).smallest_normal
                error = torch.where((got.double() - want).abs() <= spacing, 0.0, error)
            assert bool((error <= self.rule.allowed).all()), (self.name, part, got, want)
            for i, values in zip(ids, got.double().numpy(), strict=True):
                self.rows[i].parts[part] = values
        for i in ids:
            self.rows[i].updated = step

    def insert(self, ids: Iterable[int], parts: Parts, meta: tuple[int, int, int] | None, step: int) -> None:
        """Write parts, and metadata if given, into rows."""
        for i in ids:
            row = self.rows.setdefault(i, self.new_row(i))
            row.parts |= parts
            if meta is None:
                row.seen = max(row.seen, step)
            else:
                row.updated, row.seen, row.frequency = meta
        if self.gate is not None:
            self.gate.forget(ids)

    def erase(self, ids: Iterable[int]) -> int:
        """Erase rows, and return how many there were."""
        return sum(self.rows.pop(i, None) is not None for i in set(ids))

    def evict(self, unwanted: Callable[[dict[int, Row], int], set[int]], step: int) -> int:
        """Erase the rows that a rule selects, and return how many there were."""
        return self.erase(unwanted(self.rows, step))

    def check(
        self, columns: Mapping[str, Tensor], counts: Mapping[str, Any] | None, owns: Callable[[int], bool]
    ) -> None:
        """Assert that an engine has the same rows and admission state, bit for bit.

        Args:
            columns: The engine's columns, rows by ascending id.
            counts: Its admission state, by ascending id.
            owns: Returns whether it should have an id.
        """
        ids = sorted(filter(owns, self.rows))
        assert columns["ids"].tolist() == ids, self.name
        if ids:
            rows = [self.rows[i] for i in ids]
            for part in rows[0].parts:
                want = np.stack([row.parts[part] for row in rows])
                assert np.array_equal(columns[part].double().numpy(), want), (self.name, part)
            assert torch.stack([columns[name] for name in META], 1).tolist() == [list(row.meta) for row in rows]
        assert (counts is None) == (self.gate is None)
        if self.gate is not None and counts is not None:
            state = self.gate.columns()
            chosen = [at for at, i in enumerate(state["ids"]) if owns(i)]
            assert {name: list(values) for name, values in counts.items()} == {
                name: [values[at] for at in chosen] for name, values in state.items()
            }
