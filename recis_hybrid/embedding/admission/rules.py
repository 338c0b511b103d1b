"""Admission by chance, and by a function of the user."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.gate import Gate, StatelessGate, TableShare
from recis_hybrid.validation import check_integer, check_number, describe_value

_LOWEST = -(1 << 63)


@dataclass(frozen=True)
class Probability:
    """Admits a random share of the ids: those whose hash with a seed is below ``p``.

    An id is always admitted or never, on every rank and in every run; its decision does not depend on the table.

    Example:
        >>> config = EmbeddingConfig(dim=2, admission=Probability(0.1), unknown="zeros")
    """

    p: float
    """Above 0, at most 1."""
    seed: int = 0
    """Chooses the ids."""

    def __post_init__(self) -> None:
        check_number("Probability", "p", self.p)
        if not 0 < self.p <= 1:
            raise ValueError(f"Probability: p must be above 0 and at most 1, got {self.p}")
        check_integer("Probability", "seed", self.seed)

    def gate(self, share: TableShare) -> Gate:
        """Return a gate without state."""
        return _ProbabilityGate(self.p, self.seed)


class _ProbabilityGate(StatelessGate):
    def __init__(self, p: float, seed: int) -> None:
        # Hashes are compared as unsigned numbers, whose order is that of signed ones with the highest bit inverted.
        self._limit = int(p * (1 << 64)) + _LOWEST
        word = (seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & ((1 << 64) - 1)
        self._salt = word - (1 << 64) if word >= 1 << 63 else word

    def admitted(
        self,
        ids: Sequence[Tensor],
        members: Sequence[int],
        rows: Tensor,
        used: Sequence[Tensor] = (),
        counts: Tensor | None = None,
    ) -> Tensor:
        """Admit the ids whose hashes are below the limit."""
        hashes = ops.hash.hash_ids(torch.cat(list(ids)) ^ self._salt, "xxh64") ^ _LOWEST
        below = hashes < self._limit if self._limit < 1 << 63 else torch.ones_like(hashes, dtype=torch.bool)
        return (below | (rows >= 0)).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class NewIds:
    """Distinct ids of one member table that a training lookup found without a row."""

    table: str
    """Name of the member table."""
    ids: Tensor
    """int64 ``[n]``, ascending."""
    counts: Tensor
    """int64 ``[n]``: how often each occurs in the lookup, over all ranks."""
    step: int
    """Number of steps done on the table."""


@dataclass(frozen=True)
class AdmitIf:
    """Admits the ids that a function selects; a slow path, for rules that are not built in.

    The function is called in each training lookup for each member table that has ids without a row. Where all ranks
    have the same rows (``sharding="replicated"`` or ``"column"``), it must select the same ids on each of them. What it
    remembers is not saved in checkpoints.

    Example:
        >>> allowed = torch.tensor([3, 5])
        >>> config = EmbeddingConfig(dim=2, admission=AdmitIf(lambda new: torch.isin(new.ids, allowed)))
    """

    function: Callable[[NewIds], Tensor]
    """Takes :class:`NewIds`, and returns bool ``[n]``: True for the ids that get a row."""

    def __post_init__(self) -> None:
        if isinstance(self.function, type) or not callable(self.function):
            raise TypeError(f"AdmitIf: function must be a function of NewIds, got {describe_value(self.function)}")

    def __repr__(self) -> str:
        """Return a text that is the same on all ranks."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return f"AdmitIf({name})"

    def gate(self, share: TableShare) -> Gate:
        """Return a gate that calls the function."""
        return _FunctionGate(self.function, share.members)


class _FunctionGate(StatelessGate):
    def __init__(self, function: Callable[[NewIds], Tensor], names: Sequence[str]) -> None:
        self._function, self._names = function, names
        self._step = 0

    def age(self, step: int) -> None:
        """Keep the step for the function."""
        self._step = step

    def admitted(
        self,
        ids: Sequence[Tensor],
        members: Sequence[int],
        rows: Tensor,
        used: Sequence[Tensor] = (),
        counts: Tensor | None = None,
    ) -> Tensor:
        """Call the function with the distinct new ids of each member table."""
        admitted = rows >= 0
        lengths = [part.numel() for part in ids]
        starts = [0, *itertools.accumulate(lengths)]
        for member in dict.fromkeys(members):
            places = []
            for part, (number, n) in enumerate(zip(members, lengths, strict=True)):
                if number == member:
                    valid = int(used[part][-1]) if used and used[part].numel() else n
                    places.append(torch.arange(starts[part], starts[part] + min(valid, n), device=rows.device))
            at = torch.cat(places)
            at = at[rows[at] < 0]
            if at.numel() == 0:
                continue
            new, inverse = torch.cat(list(ids))[at].unique(return_inverse=True)
            weights = torch.ones_like(at) if counts is None else counts[at]
            occurrences = torch.zeros_like(new).index_add_(0, inverse, weights)
            admitted[at] = self._call(NewIds(self._names[member], new, occurrences, self._step))[inverse]
        return admitted.to(torch.uint8)

    def _call(self, new: NewIds) -> Tensor:
        found = self._function(new)
        n = new.ids.numel()
        if not isinstance(found, Tensor) or found.dtype != torch.bool or list(found.shape) != [n]:
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else describe_value(found)
            raise TypeError(
                f"AdmitIf: the function must return a bool tensor [{n}] for the {n} new ids of the table "
                f"{new.table!r}, True for those that get a row, got {got}"
            )
        return found.to(new.ids.device)
