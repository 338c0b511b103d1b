"""Rules of optimizers, admission and eviction in plain Python, each beside the rule of the package.

To cover another rule in the tests that compare tables with a dict, add an entry to ``RULES``, ``GATES`` or
``EVICTIONS``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from hypothesis import assume
from numpy.typing import NDArray
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import (
    Admission,
    AdmitIf,
    Capacity,
    EvictionRule,
    MinFrequency,
    NewIds,
    OptimizerSpec,
    Probability,
    Rows,
    SmallNorm,
    StateField,
    Unused,
    UnusedFor,
)
from tests.support.hashes import MASK, bucket_hash, id_with_bucket_hash, xxh64
from tests.support.near import OF_ADAM, ROUNDINGS

Array = NDArray[np.float64]
Parts = dict[str, Array]
"""Embedding and optimizer state of a row, by name: the stored values, in float64."""


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


# Optimizers


@dataclass(frozen=True)
class Rule:
    """An optimizer and its formula."""

    spec: OptimizerSpec
    update: Callable[[Parts, Array, int, int], Parts]
    """(row, summed gradient, step from 1, steps since the row's last update) → the parts that change."""
    allowed: float = ROUNDINGS
    """Tolerance, in roundings of float32; 0 where a float32 result is exact."""


def _sgd(
    lr: float, decay: float, momentum: float = 0.0, nesterov: bool = False
) -> Callable[[Parts, Array, int, int], Parts]:
    def update(row: Parts, g: Array, _: int, __: int) -> Parts:
        u = g + decay * row["embedding"]
        if not momentum:
            return {"embedding": row["embedding"] - lr * u}
        b = momentum * row["momentum_buffer"] + u
        return {"embedding": row["embedding"] - lr * (u + momentum * b if nesterov else b), "momentum_buffer": b}

    return update


def _adagrad(
    lr: float, eps: float, decay: float = 0.0, lr_decay: float = 0.0
) -> Callable[[Parts, Array, int, int], Parts]:
    def update(row: Parts, g: Array, t: int, _: int) -> Parts:
        u = g + decay * row["embedding"]
        s = row["sum"] + u * u
        return {"embedding": row["embedding"] - lr / (1 + (t - 1) * lr_decay) * u / (np.sqrt(s) + eps), "sum": s}

    return update


def _rowwise_adagrad(
    decay: float = 0.0, decoupled: bool = False, halflife: float = 0.0
) -> Callable[[Parts, Array, int, int], Parts]:
    def update(row: Parts, g: Array, _: int, elapsed: int) -> Parts:
        w, changed, factor = row["embedding"], {}, decay
        if halflife:
            changed["row_counter"] = 1 + 0.5 ** (elapsed / halflife) * row["row_counter"]
            factor = decay * halflife / changed["row_counter"]
        u = g if decoupled else g + factor * w
        s = row["sum"] + np.mean(u * u)
        kept = (1 - 0.1 * factor) * w if decoupled else w
        return {"embedding": kept - 0.1 * u / (np.sqrt(s) + 1e-8), "sum": s, **changed}

    return update


_LR, _B1, _B2, _EPS, _DECAY = 0.05, 0.9, 0.99, 1e-6, 0.1
_ADAM: dict[str, Any] = {"lr": _LR, "betas": (_B1, _B2), "eps": _EPS}
_DECAYING = {**_ADAM, "weight_decay": _DECAY}


def _moments(row: Parts, g: Array, squares: Array | None = None) -> Parts:
    """Return the moments after a gradient, the second one of its squares unless those are given."""
    m, v = row["exp_avg"], row["exp_avg_sq"]
    return {
        "exp_avg": _B1 * m + (1 - _B1) * g,
        "exp_avg_sq": _B2 * v + (1 - _B2) * (g * g if squares is None else squares),
    }


def _direction(moments: Parts, t: int) -> Array:
    m, v = moments["exp_avg"], moments["exp_avg_sq"]
    return m / (1 - _B1**t) / (np.sqrt(v / (1 - _B2**t)) + _EPS)


def _direction_tf(moments: Parts, t: int) -> Array:
    """Return Adam's direction with eps added to the square root before its correction."""
    m, v = moments["exp_avg"], moments["exp_avg_sq"]
    return np.sqrt(1 - _B2**t) / (1 - _B1**t) * m / (np.sqrt(v) + _EPS)


def _adam(row: Parts, g: Array, t: int, _: int) -> Parts:
    moments = _moments(row, g)
    return {"embedding": row["embedding"] - _LR * _direction_tf(moments, t), **moments}


def _adamw(row: Parts, g: Array, t: int, _: int) -> Parts:
    moments = _moments(row, g)
    return {"embedding": (1 - _LR * _DECAY) * row["embedding"] - _LR * _direction(moments, t), **moments}


def _adamw_tf(row: Parts, g: Array, t: int, _: int) -> Parts:
    moments = _moments(row, g)
    return {"embedding": (1 - _DECAY) * row["embedding"] - _LR * _direction_tf(moments, t), **moments}


def _adam_l2(row: Parts, g: Array, t: int, _: int) -> Parts:
    moments = _moments(row, g + _DECAY * row["embedding"])
    return {"embedding": row["embedding"] - _LR * _direction(moments, t), **moments}


def _amsgrad(row: Parts, g: Array, t: int, _: int) -> Parts:
    moments = _moments(row, g + _DECAY * row["embedding"])
    highest = np.maximum(row["max_exp_avg_sq"], moments["exp_avg_sq"])
    change = _LR * _direction({**moments, "exp_avg_sq": highest}, t)
    return {"embedding": row["embedding"] - change, **moments, "max_exp_avg_sq": highest}


def _rowwise_adam(row: Parts, g: Array, t: int, _: int) -> Parts:
    moments = _moments(row, g, np.mean(g * g))
    return {"embedding": (1 - _LR * _DECAY) * row["embedding"] - _LR * _direction(moments, t), **moments}


def _lamb(row: Parts, g: Array, t: int, _: int) -> Parts:
    w, moments = row["embedding"], _moments(row, g)
    r = _direction(moments, t) + _DECAY * w
    norms = math.sqrt(np.sum(w * w)), math.sqrt(np.sum(r * r))
    return {"embedding": w - _LR * (norms[0] / norms[1] if all(norms) else 1.0) * r, **moments}


def _lion(row: Parts, g: Array, _: int, __: int) -> Parts:
    m = row["exp_avg"]
    mixed = _B1 * m + (1 - _B1) * g
    _decided_by_more_than_rounding(mixed, np.abs(m) + np.abs(g))
    kept = (1 - _LR * _DECAY) * row["embedding"]
    return {"embedding": kept - _LR * np.sign(mixed), "exp_avg": _B2 * m + (1 - _B2) * g}


def _rmsprop(row: Parts, g: Array, _: int, __: int) -> Parts:
    u = g + _DECAY * row["embedding"]
    v = 0.9 * row["square_avg"] + 0.1 * u * u
    return {"embedding": row["embedding"] - _LR * u / (np.sqrt(v) + _EPS), "square_avg": v}


def _ftrl(row: Parts, g: Array, _: int, __: int) -> Parts:
    n = row["sum"] + g * g
    z = row["linear"] + g - (np.sqrt(n) - np.sqrt(row["sum"])) / 0.1 * row["embedding"]
    shrunk = np.sign(z) * np.maximum(np.abs(z) - 0.3, 0.0)
    return {"embedding": -shrunk / ((1.0 + np.sqrt(n)) / 0.1 + 0.2), "linear": z, "sum": n}


class Averaged(optim.Custom):
    """An optimizer as users write them: descends along a mean of the gradients of a row, with a state of each width."""

    def __init__(self, params: Any, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        return StateField("mean"), StateField("updates", width=1, dtype=torch.float32)

    @staticmethod
    def update(
        rows: Tensor, gradients: Tensor, state: dict[str, Tensor], settings: Mapping[str, Any], step: int
    ) -> None:
        state["updates"] += 1
        state["mean"] += (gradients - state["mean"]) / state["updates"]
        rows -= settings["lr"] / step * state["mean"]


def _averaged(row: Parts, g: Array, t: int, _: int) -> Parts:
    updates = row["updates"] + 1
    mean = row["mean"] + (g - row["mean"]) / updates
    return {"embedding": row["embedding"] - 0.5 / t * mean, "mean": mean, "updates": updates}


def _decided_by_more_than_rounding(differences: Array | float, terms: Array | float = 1.0) -> None:
    """Drop a sequence of operations in which the rounding of float32 decides whether a number is above another."""
    close = np.abs(differences) <= 64 * np.finfo(np.float32).eps * terms
    assume(not np.any(close & (np.asarray(terms) > 0)))


_SUM = {"lr": 0.1, "initial_accumulator_value": 0.1}
RULES: dict[str, Rule] = {
    "SGD": Rule(optim.SGD.spec(lr=0.5), _sgd(0.5, 0.0), 0),
    "SGD with decay": Rule(optim.SGD.spec(lr=0.1, weight_decay=0.2), _sgd(0.1, 0.2)),
    "momentum": Rule(optim.SGD.spec(lr=0.1, momentum=0.9, weight_decay=0.2), _sgd(0.1, 0.2, 0.9)),
    "Nesterov": Rule(
        optim.SGD.spec(lr=0.1, momentum=0.8, weight_decay=0.1, nesterov=True), _sgd(0.1, 0.1, 0.8, nesterov=True)
    ),
    "Adagrad": Rule(optim.Adagrad.spec(**_SUM), _adagrad(0.1, 1e-10)),
    "Adagrad with decays": Rule(
        optim.Adagrad.spec(lr=0.1, weight_decay=0.2, lr_decay=0.1, eps=1e-3), _adagrad(0.1, 1e-3, 0.2, 0.1)
    ),
    "AdagradSum": Rule(optim.AdagradSum.spec(**_SUM, lr_decay=0.1), _adagrad(0.1, 1e-10, lr_decay=0.1)),
    "RowwiseAdagrad": Rule(optim.RowwiseAdagrad.spec(**_SUM), _rowwise_adagrad()),
    **{
        f"RowwiseAdagrad, {mode}, half-life {halflife}": Rule(
            optim.RowwiseAdagrad.spec(**_SUM, weight_decay=0.2, weight_decay_mode=mode, counter_halflife=halflife),
            _rowwise_adagrad(0.2, mode == "decoupled", halflife),
        )
        for mode in ("l2", "decoupled")
        for halflife in (0.0, 2.5)
    },
    "RMSprop": Rule(optim.RMSprop.spec(lr=_LR, alpha=0.9, eps=_EPS, weight_decay=_DECAY), _rmsprop),
    "Adam": Rule(optim.Adam.spec(**_ADAM), _adam, OF_ADAM),
    "AdamW": Rule(optim.AdamW.spec(**_DECAYING), _adamw, OF_ADAM),
    "AdamWTF": Rule(optim.AdamWTF.spec(**_DECAYING), _adamw_tf, OF_ADAM),
    "AdamL2": Rule(optim.AdamL2.spec(**_DECAYING), _adam_l2, OF_ADAM),
    "AMSGrad": Rule(optim.AMSGrad.spec(**_DECAYING), _amsgrad, OF_ADAM),
    "RowwiseAdam": Rule(optim.RowwiseAdam.spec(**_DECAYING), _rowwise_adam, OF_ADAM),
    "LAMB": Rule(optim.LAMB.spec(**_DECAYING), _lamb, OF_ADAM),
    "Lion": Rule(optim.Lion.spec(lr=_LR, betas=(_B1, _B2), weight_decay=_DECAY), _lion),
    "FTRL": Rule(optim.FTRL.spec(lr=0.1, beta=1.0, l1=0.3, l2=0.2), _ftrl, OF_ADAM),
    "custom": Rule(Averaged.spec(), _averaged),
}


# Admission


class Gate(Protocol):
    """The state of an admission rule in one member table."""

    def age(self, step: int) -> None:
        """Age the state to the number of steps done."""

    def admitted(self, ids: Sequence[int]) -> set[int]:
        """Count the occurrences of ids without a row in a training lookup, and return those that get one."""

    def forget(self, ids: Iterable[int]) -> None:
        """Drop the state of ids that were inserted without admission."""

    def clear(self) -> None:
        """Drop all state."""

    def check(self, columns: Mapping[str, Any], owns: Callable[[int], bool]) -> None:
        """Assert that the columns of an engine's gate, by ascending id, are those of the ids that it owns."""


@dataclass
class Decided:
    """A rule that decides about each id by a function of the id, its occurrences in the lookup, and the step."""

    decide: Callable[[int, int, int], bool]
    step: int = 0

    def age(self, step: int) -> None:
        self.step = step

    def admitted(self, ids: Sequence[int]) -> set[int]:
        return {i for i, count in Counter(ids).items() if self.decide(i, count, self.step)}

    def forget(self, ids: Iterable[int]) -> None:
        pass

    def clear(self) -> None:
        pass

    def check(self, columns: Mapping[str, Any], owns: Callable[[int], bool]) -> None:
        assert not columns


class _Ageing:
    """Halves counts at each multiple of a half-life."""

    def __init__(self, half_life: int | None) -> None:
        self.half_life, self.step = half_life, 0

    def due(self, step: int) -> int:
        """Return how often to halve the counts."""
        before, self.step = self.step, step
        return 0 if self.half_life is None else step // self.half_life - before // self.half_life


class Counted:
    """Counts of ``MinFrequency``."""

    def __init__(self, least: int, half_life: int | None = None) -> None:
        self.least, self.ageing = least, _Ageing(half_life)
        self.counts: Counter[int] = Counter()

    def age(self, step: int) -> None:
        times = self.ageing.due(step)
        self.counts = Counter({i: count >> times for i, count in self.counts.items() if count >> times})

    def admitted(self, ids: Sequence[int]) -> set[int]:
        self.counts.update(ids)
        found = {i for i in ids if self.counts[i] >= self.least}
        self.forget(found)
        return found

    def forget(self, ids: Iterable[int]) -> None:
        for i in ids:
            self.counts.pop(i, None)

    def clear(self) -> None:
        self.counts.clear()

    def check(self, columns: Mapping[str, Any], owns: Callable[[int], bool]) -> None:
        ids = sorted(filter(owns, self.counts))
        assert {name: list(values) for name, values in columns.items()} == {
            "ids": ids,
            "count": [self.counts[i] for i in ids],
        }


class Sketched:
    """A sketch of ``MinFrequency``: a dict of cells, by (block, row, number).

    Args:
        rule: The rule.
        bits: Bits of a cell.
    """

    def __init__(self, rule: MinFrequency, bits: int) -> None:
        assert rule.sketch_bytes is not None
        self.least, self.bits, self.ageing = rule.count, bits, _Ageing(rule.half_life)
        self.level = (rule.sketch_bytes // 64).bit_length() - 1
        self.cells: Counter[tuple[int, int, int]] = Counter()

    def places(self, i: int) -> list[tuple[int, int, int]]:
        """Return the cells of an id."""
        hash_ = bucket_hash(i)
        return [(hash_ >> 64 - self.level, row, (hash_ >> 6 * row) % (128 // self.bits)) for row in range(4)]

    def age(self, step: int) -> None:
        times = self.ageing.due(step)
        self.cells = Counter({at: count >> times for at, count in self.cells.items() if count >> times})

    def admitted(self, ids: Sequence[int]) -> set[int]:
        for i in ids:
            for at in self.places(i):
                self.cells[at] = min(self.cells[at] + 1, (1 << self.bits) - 1)
        return {i for i in ids if min(self.cells[at] for at in self.places(i)) >= self.least}

    def forget(self, ids: Iterable[int]) -> None:
        pass

    def clear(self) -> None:
        self.cells.clear()

    def check(self, columns: Mapping[str, Any], owns: Callable[[int], bool]) -> None:
        assert list(columns["ids"]) == sorted(columns["ids"])
        # A block is saved as an id whose hash begins with the block's number and ends with the bits of that number. One
        # of several buckets is saved in each of them.
        level = max(self.level, 16)
        found: dict[int, dict[tuple[int, int, int], int]] = {}
        for i, words in zip(columns["ids"], columns[f"cells{self.bits}"], strict=True):
            block = bucket_hash(i) >> 64 - level
            assert bucket_hash(i) == block << 64 - level | level
            found[block] = {}
            for at, word in enumerate(words):
                for number in range(64 // self.bits):
                    if count := (word & MASK) >> self.bits * number & (1 << self.bits) - 1:
                        place = block >> level - self.level, at // 2, at % 2 * (64 // self.bits) + number
                        found[block][place] = count
        used: dict[int, dict[tuple[int, int, int], int]] = {}
        for at, count in self.cells.items():
            for block in range(at[0] << level - self.level, at[0] + 1 << level - self.level):
                if owns(id_with_bucket_hash(block << 64 - level)):
                    used.setdefault(block, {})[at] = count
        assert found == used


def by_function(new: NewIds) -> Tensor:
    """Select ids that occur several times, and every third of the others, or in some steps all of them."""
    return (new.counts >= 2) | (new.ids % 3 == 0) | torch.full_like(new.ids, new.step % 4 == 3, dtype=torch.bool)


def _below(i: int, _: int, __: int) -> bool:
    """Return what ``Probability(0.4, seed=5)`` decides."""
    salt = 5 * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03 & MASK
    return xxh64(((i & MASK) ^ salt).to_bytes(8, "little")) & MASK < int(0.4 * 2**64)


_SKETCH = MinFrequency(3, half_life=5, sketch_bytes=1 << 18)
GATES: dict[str, tuple[Admission | None, Callable[[], Gate] | None]] = {
    "always": (None, None),
    "twice": (MinFrequency(2), lambda: Counted(2)),
    "four times": (MinFrequency(4), lambda: Counted(4)),
    "four times, half-life 3": (MinFrequency(4, half_life=3), lambda: Counted(4, 3)),
    "sketch": (_SKETCH, lambda: Sketched(_SKETCH, 2)),
    "by chance": (Probability(0.4, seed=5), lambda: Decided(_below)),
    "by a function": (
        AdmitIf(by_function),
        lambda: Decided(lambda i, count, step: count >= 2 or i % 3 == 0 or step % 4 == 3),
    ),
}
"""Admission rules, with their models."""


# Eviction


@dataclass
class Times:
    """Times at which a member table had done its steps, as far as rules by time recorded them."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    """Seconds and steps, both ascending."""

    def step_before(self, step: int, now: float, seconds: float) -> int:
        """Record a step, and return the last one that is known to be so old, or -1."""
        if not self.samples or self.samples[-1][1] < step:
            self.samples.append((now, step))
        at = bisect_right(self.samples, (now - seconds, math.inf))
        return self.samples[at - 1][1] if at else -1


@dataclass(frozen=True)
class Moment:
    """Circumstances of an eviction from one member table."""

    step: int
    now: float
    times: Times
    record_bytes: int


Unwanted = Callable[[int, Row], bool]
"""Returns True for a row to erase, by its id."""


@dataclass(frozen=True)
class EvictionCase:
    """An eviction rule, and its model: a function that returns whether to erase a row."""

    rule: EvictionRule
    select: Callable[[Mapping[int, Row], Moment], Unwanted]
    """Takes the rows of a member table."""
    ranks: bool = False
    """True if it ranks all rows of a table first, and then decides about each by itself."""
    timed: bool = False
    """True if it depends on the time."""


@dataclass(frozen=True)
class OddIds:
    """A rule as users write them: odd ids, unless they were updated in the last step."""

    def unwanted(self, rows: Rows) -> Tensor:
        return (rows.ids % 2 == 1) & (rows.updated_step < rows.step)


def rarely_used(rows: Rows) -> Tensor:
    """Select rows by time: the less often they were used, the sooner."""
    return ((rows.frequency < 4) & rows.seen_before(15.0)) | rows.seen_before(50.0)


def _rarely_used(_: Mapping[int, Row], of: Moment) -> Unwanted:
    soon, late = (of.times.step_before(of.step, of.now, seconds) for seconds in (15.0, 50.0))
    return lambda _, row: row.seen <= (soon if row.frequency < 4 else late)


def small_and_known(rows: Rows) -> Tensor:
    """Select rows with a small norm, unless they are new."""
    return (rows.norms() < 0.9) & (rows.frequency > 1)


def _is_small(row: Row, norm: float) -> bool:
    own = math.sqrt(np.sum(row.parts["embedding"] ** 2))
    _decided_by_more_than_rounding(own - norm)
    return own < norm


def _unused(steps: int) -> EvictionCase:
    return EvictionCase(Unused(steps), lambda _, of: lambda _, row: row.seen <= of.step - steps)


def _unused_for(seconds: float) -> EvictionCase:
    def select(_: Mapping[int, Row], of: Moment) -> Unwanted:
        limit = of.times.step_before(of.step, of.now, seconds)
        return lambda _, row: row.seen <= limit

    return EvictionCase(UnusedFor(seconds), select, timed=True)


def _capacity(rule: Capacity) -> EvictionCase:
    def rank(row: Row) -> float:
        if rule.by == "lru":
            return row.seen
        if rule.half_life is None:
            return row.frequency
        # No two rows of a few dozen steps come close to a tie with a half-life of 2.7, unless they tie exactly.
        return math.log2(row.frequency + 1) + row.seen / rule.half_life

    def select(rows: Mapping[int, Row], of: Moment) -> Unwanted:
        most = rule.rows if rule.bytes is None else rule.bytes // of.record_bytes
        assert most is not None
        surplus = len(rows) - most
        if surplus <= 0:
            return lambda *_: False
        last = sorted((rank(row), i) for i, row in rows.items())[surplus - 1]
        return lambda i, row: (rank(row), i) <= last

    return EvictionCase(rule, select, ranks=True)


EVICTIONS: dict[str, EvictionCase] = {
    **{f"unused for {n}": _unused(n) for n in (1, 2, 4)},
    **{f"unused for {seconds} s": _unused_for(seconds) for seconds in (10.0, 40.0)},
    "odd": EvictionCase(OddIds(), lambda _, of: lambda i, row: i % 2 == 1 and row.updated < of.step),
    "rarely used": EvictionCase(rarely_used, _rarely_used, timed=True),
    "small": EvictionCase(SmallNorm(0.8), lambda _, __: lambda _, row: _is_small(row, 0.8)),
    "small and known": EvictionCase(
        small_and_known, lambda _, __: lambda _, row: row.frequency > 1 and _is_small(row, 0.9)
    ),
    "6 rows by LRU": _capacity(Capacity(rows=6)),
    "1,000 bytes by LRU": _capacity(Capacity(bytes=1000)),
    "4 rows by LFU": _capacity(Capacity(rows=4, by="lfu")),
    "5 rows by LFU with half-life": _capacity(Capacity(rows=5, by="lfu", half_life=2.7)),
}
