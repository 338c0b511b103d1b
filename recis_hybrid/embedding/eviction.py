"""Eviction: rules that select rows to erase, and the metadata they are based on.

Letters: n rows.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import distributed
from recis_hybrid.validation import check_choice, check_integer, check_number

_DIGITS = 16
_MOST_TIMES = 4096


@dataclass(frozen=True)
class SharedRows:
    """Distribution of a logical table's rows over ranks; by default, this process has them alone."""

    group: dist.ProcessGroup | None = None
    """The ranks that share the table; None: only this process."""
    everywhere: bool = False
    """True if every rank has every row."""
    columns: bool = False
    """True if every rank has only some elements of each row."""

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum of numbers that each rank computed from its own rows; collective."""
        return numbers if self.group is None or self.everywhere else distributed.sum_over_ranks(numbers, self.group)

    def total_of_columns(self, numbers: Tensor) -> Tensor:
        """Return the sum of numbers that each rank computed from its own elements of the rows; collective."""
        return distributed.sum_over_ranks(numbers, self.group) if self.group is not None and self.columns else numbers

    def agreed(self, number: float) -> float:
        """Return the number of the first rank; collective."""
        if self.group is None:
            return number
        own = number if distributed.rank(self.group) == 0 else 0.0
        return float(distributed.sum_over_ranks(torch.tensor([own], dtype=torch.float64), self.group))


class StepTimes:
    """Times at which a table had done its steps: one sample per eviction by time, the older half thinned at 4,096.

    Samples that are older than any age asked for so far are dropped when one is added, so that rules may ask for
    several ages.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[int, float]] = []
        """Steps done, and seconds since 1970, both ascending."""
        self._longest = 0.0
        """The greatest age that was asked for so far."""

    def step_before(self, step: int, now: float, seconds: float) -> int:
        """Record that the table has done ``step`` steps, and return the last one known to be ``seconds`` old, or -1."""
        if not self.samples or self.samples[-1][0] < step:
            last = self.samples[-1][1] if self.samples else now
            self.samples.append((step, max(now, last)))
            if self._longest:
                self.samples = self.samples[max(self._before(now - self._longest) - 1, 0) :]
            if len(self.samples) > _MOST_TIMES:
                half = len(self.samples) // 2
                self.samples = [*self.samples[:half:2], *self.samples[half:]]
        self._longest = max(self._longest, seconds)
        old = self._before(now - seconds)
        return self.samples[old - 1][0] if old else -1

    def _before(self, time: float) -> int:
        """Return the number of samples up to a time."""
        return bisect_right(self.samples, time, key=lambda sample: sample[1])


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one member table on this process, in no particular order; int64 ``[n]`` each, on the table's device.

    If ranks share the table, each has its own rows, and :meth:`norms` and :meth:`seen_before` are collective.
    """

    table: str
    """Name of the member table."""
    ids: Tensor
    updated_step: Tensor
    """Step of the last update of the row; 0: none."""
    seen_step: Tensor
    """Step of the last training lookup of the row; 0: none."""
    frequency: Tensor
    """Number of training lookups of the row."""
    step: int
    """Number of steps done on the table."""
    row_bytes: int = 0
    """Bytes of a whole record, with optimizer state and metadata."""
    shared: SharedRows = field(default_factory=SharedRows)
    """Distribution of the rows over ranks."""
    times: StepTimes = field(default_factory=StepTimes)
    """Times of the table's steps."""
    read_norms: Callable[[], Tensor] | None = None
    """Reads the L2 norms of this rank's elements of the embeddings, float32 ``[n]``."""

    def norms(self) -> Tensor:
        """Return the L2 norm of each embedding, float32 ``[n]``; reads all of them, a few MiB at a time."""
        assert self.read_norms is not None
        norms = self.read_norms()
        if not self.shared.columns:
            return norms
        order = self.ids.argsort()  # equal on all ranks, while the order of rows is not
        squares = torch.empty_like(norms)
        squares[order] = self.shared.total_of_columns(norms[order].square())
        return squares.sqrt()

    def seen_before(self, seconds: float) -> Tensor:
        """Return whether each row is known to have had no training lookup for a time, bool ``[n]``.

        Times are recorded when this is called. So what happened before the first call counts as of that call, and rows
        are selected at the first call after they reach the age.
        """
        limit = self.times.step_before(self.step, self.shared.agreed(time.time()), seconds)
        return self.seen_step <= limit


class Eviction(Protocol):
    """A rule that selects rows to erase."""

    def unwanted(self, rows: Rows) -> Tensor:
        """Return bool ``[n]``: True for the rows to erase.

        Args:
            rows: The rows of one member table. If ranks share it, each rank calls the rule with its own rows. Where all
                ranks have the same rows (``sharding="replicated"`` or ``"column"``), they must select the same ids.
        """


EvictionRule: TypeAlias = "Eviction | Callable[[Rows], Tensor]"
"""A rule, or just the function ``unwanted``."""


@dataclass(frozen=True)
class Unused:
    """Erases rows without a training lookup in the last ``steps`` steps.

    Example:
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2)})
        >>> _ = engine({"item": torch.tensor([1, 2])})
        >>> engine.evict(Unused(steps=1000))
        0
    """

    steps: int
    """Number of optimizer steps, at least 1."""

    def __post_init__(self) -> None:
        check_integer("Unused", "steps", self.steps, low=1)

    def unwanted(self, rows: Rows) -> Tensor:
        """Return the rows whose last lookup was ``steps`` or more steps ago."""
        return rows.seen_step <= rows.step - self.steps


@dataclass(frozen=True)
class UnusedFor:
    """Erases rows without a training lookup in the last ``seconds`` seconds of wall time.

    Rows have steps but no times: each eviction by this rule records the time of the table's present step, 16 bytes per
    table, in checkpoints too. So the first one erases nothing, and if the rule is applied every t seconds, a row goes
    ``seconds`` to ``seconds + t`` after its last lookup. Ranks use the clock of the first one.

    Example:
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2)})
        >>> engine.evict(UnusedFor(seconds=7 * 24 * 3600))
        0
    """

    seconds: float
    """Above 0."""

    def __post_init__(self) -> None:
        check_number("UnusedFor", "seconds", self.seconds, finite=True)
        if self.seconds <= 0:
            raise ValueError(f"UnusedFor: seconds must be above 0, got {self.seconds}")

    def unwanted(self, rows: Rows) -> Tensor:
        """Return the rows whose last lookup is known to be so long ago."""
        return rows.seen_before(self.seconds)


@dataclass(frozen=True)
class SmallNorm:
    """Erases rows whose embedding has an L2 norm below ``norm``, e.g. after weight decay.

    New rows may have small norms, too. To keep them, combine conditions in a function:
    ``engine.evict(lambda rows: (rows.norms() < 1e-3) & (rows.frequency > 10))``.

    Example:
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2, initializer=Constant(0.0))})
        >>> _ = engine({"item": torch.tensor([1, 2])})
        >>> engine.evict(SmallNorm(1e-6))
        2
    """

    norm: float
    """Above 0."""

    def __post_init__(self) -> None:
        check_number("SmallNorm", "norm", self.norm)
        if not self.norm > 0:
            raise ValueError(f"SmallNorm: norm must be above 0, got {self.norm}")

    def unwanted(self, rows: Rows) -> Tensor:
        """Return the rows below the norm."""
        return rows.norms() < self.norm


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Keeps a number of rows of each table, and erases the rest: those used longest ago, or least often.

    With ``by="lru"``, rows are ranked by the step of their last training lookup. With ``by="lfu"``, they are ranked by
    ``(frequency + 1) * 2 ** (-age / half_life)``, where the age is the number of steps since the last lookup; without
    ``half_life``, by frequency. Of rows that tie, those with the lowest ids go first; scores that are not equal tie if
    their base-2 logarithms are equal in float64. The number is that of the whole table: the selection over all ranks is
    exact, and the same for any number of ranks.

    If an eviction is spread over calls, all rows are ranked once, when it begins. That fixes which rows are erased,
    except that those are kept which a training lookup has seen since. So the table ends with that number of rows, and
    with the rows that are new or were seen again.

    Example:
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2)})
        >>> _ = engine({"item": torch.tensor([5, 6, 7, 7])})
        >>> engine.evict(Capacity(rows=1, by="lfu"))
        2
        >>> engine.tables[0].ids(0)
        tensor([7])
    """

    rows: int | None = None
    """Number of rows that remain in each table to which the rule is applied."""
    bytes: int | None = None
    """The same in bytes of whole records, optimizer state included, without the IDMap; pass either."""
    by: Literal["lru", "lfu"] = "lru"
    """The ranking: least recently, or least frequently used."""
    half_life: float | None = None
    """Steps in which the frequency of a row that is not used counts half; for ``lfu``. None: no decay."""

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.bytes is None):
            raise ValueError(f"Capacity: pass either rows or bytes, got rows={self.rows}, bytes={self.bytes}")
        for name in ("rows", "bytes"):
            if getattr(self, name) is not None:
                check_integer("Capacity", name, getattr(self, name), low=0)
        check_choice("Capacity", "by", self.by, ("lru", "lfu"))
        if self.half_life is not None:
            check_number("Capacity", "half_life", self.half_life, finite=True)
            if self.by == "lru" or self.half_life <= 0:
                raise ValueError(
                    f"Capacity: half_life is for by='lfu' and must be above 0, got by={self.by!r}, "
                    f"half_life={self.half_life}"
                )

    def unwanted(self, rows: Rows) -> Tensor:
        """Return the lowest rows beyond the capacity."""
        return self.cutoff(rows).unwanted(rows)

    def cutoff(self, rows: Rows) -> Cutoff:
        """Rank all rows of the table; collective."""
        most = self.rows if self.bytes is None else self.bytes // rows.row_bytes
        assert most is not None
        n = torch.tensor([rows.ids.numel()], device=rows.ids.device)
        surplus = int(rows.shared.total(n)) - most
        if surplus <= 0:
            return Cutoff(self)
        ranks = self.ranks(rows)
        rank, ties = _nth_lowest(ranks, surplus, rows.shared)
        last, _ = _nth_lowest(rows.ids[ranks == rank], ties, rows.shared)
        return Cutoff(self, rank, last)

    def ranks(self, rows: Rows) -> Tensor:
        """Return int64 ``[n]``, lowest for the rows that go first; comparable between steps."""
        if self.by == "lru":
            return rows.seen_step
        if self.half_life is None:
            return rows.frequency
        # log2(frequency + 1) + seen_step / half_life. Two rows have the same score only if frequency + 1 = odd * 2^k
        # with the same odd factor and the same k * half_life + seen_step, which is exact then: so they tie, whatever
        # log2 and the division round to.
        _, exponents = torch.frexp(((rows.frequency + 1) & -(rows.frequency + 1)).double())
        doublings = exponents.long() - 1
        odd = (rows.frequency + 1) >> doublings
        score = odd.double().log2() + (doublings.double() * self.half_life + rows.seen_step) / self.half_life
        return score.view(torch.int64)  # in the same order, because scores are not negative


@dataclass(frozen=True)
class Cutoff:
    """The result of ranking a table: a rule that can be applied to each row by itself."""

    capacity: Capacity
    rank: int | None = None
    """Rank of the last row to be erased; None: erase none."""
    last_id: int = 0
    """Greatest id to be erased of those with this rank."""

    def unwanted(self, rows: Rows) -> Tensor:
        """Return the rows up to the last one."""
        if self.rank is None:
            return torch.zeros_like(rows.ids, dtype=torch.bool)
        ranks = self.capacity.ranks(rows)
        return (ranks < self.rank) | ((ranks == self.rank) & (rows.ids <= self.last_id))


def _nth_lowest(numbers: Tensor, n: int, shared: SharedRows) -> tuple[int, int]:
    """Return the n-th lowest of the numbers of all ranks, and how many equal to it are among the n; collective.

    Counts numbers by 16 bits at a time, so that ranks exchange only counts and nothing is sorted.

    Args:
        numbers: int64 ``[m]`` of this rank.
        n: 1 to the number of numbers of all ranks.
        shared: The ranks.
    """
    found = 0
    for shift in range(64 - _DIGITS, -1, -_DIGITS):
        digits = (numbers >> shift) & ((1 << _DIGITS) - 1)
        if shift == 64 - _DIGITS:
            digits ^= 1 << (_DIGITS - 1)  # negative numbers come first
        below = shared.total(digits.bincount(minlength=1 << _DIGITS)).cumsum(0)
        digit = int((below < n).sum())
        n -= int(below[digit - 1]) if digit > 0 else 0
        numbers = numbers[digits == digit]
        found = found << _DIGITS | (digit ^ (1 << (_DIGITS - 1)) if shift == 64 - _DIGITS else digit)
    return found - (1 << 64) if found >= 1 << 63 else found, n


def check_rule(where: str, rule: object) -> None:
    """Raise TypeError unless an object is a rule."""
    if isinstance(rule, type) or not (callable(getattr(rule, "unwanted", None)) or callable(rule)):
        raise TypeError(
            f"{where} must be a function of rows or have a method unwanted(rows), e.g. Unused(steps=1000), got {rule!r}"
        )


def ranks_rows(rule: EvictionRule | Mapping[int, EvictionRule]) -> bool:
    """Return whether a rule, or one of several, ranks all rows of a table before it decides about one."""
    return any(isinstance(each, Capacity) for each in (rule.values() if isinstance(rule, Mapping) else [rule]))


def unwanted_rows(rule: EvictionRule, rows: Rows) -> Tensor:
    """Return the rows of a member table that a rule selects.

    Args:
        rule: The rule.
        rows: ``[n]``.

    Returns:
        bool ``[n]``, on the device of the rows.

    Raises:
        TypeError: If the rule is not a rule, or does not return a bool tensor.
        ValueError: If that tensor does not have one element for each row.
    """
    check_rule("evict: a rule", rule)
    function: Any = getattr(rule, "unwanted", rule)
    unwanted = function(rows)
    n = rows.ids.numel()
    name = f"{type(rule).__name__}.unwanted" if function is not rule else getattr(rule, "__name__", repr(rule))
    if not isinstance(unwanted, Tensor) or unwanted.dtype != torch.bool:
        got = unwanted.dtype if isinstance(unwanted, Tensor) else f"a {type(unwanted).__name__}"
        raise TypeError(f"evict: {name} must return a bool tensor [{n}], True for rows to erase, got {got}")
    if list(unwanted.shape) != [n]:
        raise ValueError(
            f"evict: {name} must return one element for each of the {n} rows of the table {rows.table!r}, bool [{n}], "
            f"got bool {list(unwanted.shape)}"
        )
    return unwanted.to(rows.ids.device)


def rules_by_member(rule: EvictionRule | Mapping[int, EvictionRule], members: int) -> list[tuple[int, EvictionRule]]:
    """Return the member tables that have a rule, given one for all ``members`` tables, or rules by their numbers."""
    if isinstance(rule, Mapping):
        return sorted(rule.items())
    return [(member, rule) for member in range(members)]
