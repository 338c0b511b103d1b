"""Negative sampling: for each item that a user chose, items that the user did not choose.

Letters: B rows of a batch, C candidate items, D draws of all rows together, P pairs of a row and an item of the row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.validation import check_integer

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Number of redraws of a row's own items, before drawing from an explicit list of all other items.
_REDRAWS = 16


@dataclass(frozen=True)
class Candidates:
    """Items to draw from, and their weights."""

    ids: Ints
    """[C], ascending and unique."""
    weights: Floats
    """[C], positive."""


class NegativeSampler:
    """Add a column of negatives to a batch: ``count`` items for each positive, none of them the row's own.

    A row's own items are its positives and its items in the columns ``exclude`` (such as the user's whole history);
    they are never drawn for that row. Another item may be drawn more than once for a row.

    The draws depend only on (seed, epoch) and on the positives and excluded items of the batch, so they are the same in
    all threads and processes. Use the sampler as ``transforms`` of a ColumnDataset, or call it later.

    Args:
        positive: Column of positives: int64 [B], or a RaggedTensor of int64 values with one level.
        count: Number of negatives per positive, or the name of a column of integers [B] with that number for each row.
        items: [C] int64, unique items to draw from; None draws from the positives of the batch.
        frequencies: [C], positive frequencies of the items; None means equal frequencies. Without ``items``, the
            frequency of an item is its number of occurrences among the positives of the batch.
        power: Items are drawn with probability proportional to frequency ** power: 0 is uniform, 1 is by frequency, and
            word2vec uses 0.75.
        exclude: Columns with further own items of a row, of the same types as ``positive``.
        name: Name of the column of negatives.
        seed: Seed, not negative.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``items`` is empty or has duplicates, a frequency is not positive, a number is negative, or
            frequencies to that power exceed the range of float64.

    Example:
        >>> sampler = NegativeSampler("item", 2, items=torch.tensor([1, 2, 3]), exclude=["seen"])
        >>> batch = {"item": torch.tensor([1, 3]), "seen": RaggedTensor.from_lists([[2], [1]])}
        >>> sampler(batch)["negatives"]
        tensor([[3, 3],
                [2, 2]])

    References:
        Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality, 2013 (frequency to
        the power of 0.75).
    """

    def __init__(
        self,
        positive: str,
        count: int | str,
        *,
        items: torch.Tensor | None = None,
        frequencies: torch.Tensor | None = None,
        power: float = 0.75,
        exclude: Sequence[str] = (),
        name: str = "negatives",
        seed: int = 0,
    ) -> None:
        if isinstance(exclude, str):
            raise TypeError(f"NegativeSampler: exclude must be a sequence of columns, got a str; write [{exclude!r}]")
        if isinstance(count, bool) or not isinstance(count, int | str):
            raise TypeError(f"NegativeSampler: count must be an integer or the name of a column, got {count!r}")
        if isinstance(count, int) and count < 1:
            raise ValueError(f"NegativeSampler: count must be at least 1, got {count}")
        # This comparison also fails for NaN.
        if seed < 0 or not 0 <= power < float("inf"):
            raise ValueError(
                f"NegativeSampler: seed and power must not be negative, and power must be finite, got {seed} and "
                f"{power}"
            )
        if items is None and frequencies is not None:
            raise ValueError("NegativeSampler: frequencies need items, but items is None; pass items too")
        self._positive, self._count, self._exclude, self._name = positive, count, tuple(exclude), name
        self._power, self._seed = power, seed
        # Shared with the workers of a DataLoader, which may persist across epochs.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self._table = None if items is None else _table(items, frequencies, power)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Memory sent to a worker is already shared; a deep copy has new memory.
        self._epoch.share_memory_()

    def __copy__(self) -> NegativeSampler:
        copy = object.__new__(type(self))
        copy.__setstate__({**self.__dict__, "_epoch": self._epoch.clone()})
        return copy

    def set_epoch(self, epoch: int) -> None:
        """Use the draws of ``epoch`` from now on, in DataLoader workers too; call it between passes.

        Args:
            epoch: Not negative.

        Raises:
            TypeError: The epoch is not an integer.
            ValueError: The epoch is negative.
        """
        self._epoch.fill_(check_integer("NegativeSampler", "epoch", epoch, 0))

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the column of negatives.

        Args:
            batch: A batch on the CPU.

        Returns:
            The batch with negatives: int64 [B, count] if positives are [B] and the count is a number; otherwise a
            RaggedTensor of int64, in which a row holds the negatives of its positives in order.

        Raises:
            TypeError: A column has the wrong type.
            ValueError: A column is missing, all candidates are excluded in a row, or a count is negative.
        """
        rows, positives = self._pairs(batch, self._positive)
        others = [self._pairs(batch, name) for name in self._exclude]
        own_rows = np.concatenate([rows, *(each for each, _ in others)])
        own_items = np.concatenate([positives, *(each for _, each in others)])
        counts = self._counts(batch, rows)
        generator = self._generator(own_rows, own_items, counts)
        draw_rows = np.repeat(rows, counts)
        items = _draw(self._candidates(positives), draw_rows, own_rows, own_items, generator, self._name)
        column = batch[self._positive]
        negatives: torch.Tensor | RaggedTensor = torch.from_numpy(items)
        if isinstance(column, torch.Tensor) and isinstance(self._count, int):
            negatives = torch.from_numpy(items).view(-1, self._count)
        else:
            size = column.batch_size if isinstance(column, RaggedTensor) else column.shape[0]
            lengths = np.bincount(draw_rows, minlength=size)
            offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
            negatives = RaggedTensor(torch.from_numpy(items), torch.from_numpy(offsets))
        return {**batch, self._name: negatives}

    def _pairs(self, batch: Batch, name: str) -> tuple[Ints, Ints]:
        """Return the row and the item of each value of a column."""
        if name not in batch:
            raise ValueError(f"NegativeSampler: the batch has no column {name!r}, only {', '.join(batch)}")
        column = batch[name]
        if column.dtype != torch.int64 or not _is_flat(column):
            raise TypeError(
                f"NegativeSampler: column {name!r} must be int64 [B] or a RaggedTensor of int64 with one level, got "
                f"{column if isinstance(column, RaggedTensor) else f'{column.dtype} {list(column.shape)}'}"
            )
        if isinstance(column, torch.Tensor):
            return np.arange(column.shape[0]), column.numpy()
        return np.repeat(np.arange(column.batch_size), column.lengths().numpy()), column.values.numpy()

    def _counts(self, batch: Batch, rows: Ints) -> Ints:
        """Return the number of negatives of each positive."""
        if isinstance(self._count, int):
            return np.full(len(rows), self._count)
        counts = batch.get(self._count)
        if not isinstance(counts, torch.Tensor) or counts.dim() != 1 or counts.is_floating_point():
            raise TypeError(f"NegativeSampler: column {self._count!r} must be counts, integers [B], got {counts!r}")
        if counts.numel() and int(counts.min()) < 0:
            raise ValueError(f"NegativeSampler: column {self._count!r} has the negative count {int(counts.min())}")
        return counts.to(torch.int64).numpy()[rows]

    def _candidates(self, positives: Ints) -> Candidates:
        if self._table is not None:
            return self._table
        ids, counts = np.unique(positives, return_counts=True)
        return Candidates(ids, _weights(counts.astype(np.float64), self._power))

    def _generator(self, *content: Ints) -> np.random.Generator:
        digest = hashlib.blake2b(digest_size=16)
        for array in content:
            digest.update(np.ascontiguousarray(array).tobytes())
        words = np.frombuffer(digest.digest(), np.uint32).tolist()
        return np.random.Generator(np.random.PCG64([self._seed, int(self._epoch), *words]))


def _table(items: torch.Tensor, frequencies: torch.Tensor | None, power: float) -> Candidates:
    if not isinstance(items, torch.Tensor) or items.dtype != torch.int64 or items.dim() != 1:
        raise TypeError(f"NegativeSampler: items must be int64 [C], got {getattr(items, 'dtype', type(items))}")
    ids, order = np.unique(items.cpu().numpy(), return_index=True)
    if len(ids) == 0 or len(ids) != items.numel():
        raise ValueError(
            f"NegativeSampler: items must be unique and at least one, got {items.numel()} with {len(ids)} distinct"
        )
    if frequencies is None:
        return Candidates(ids, np.ones(len(ids)))
    if frequencies.shape != items.shape:
        raise ValueError(
            f"NegativeSampler: frequencies must be one per item, got {list(frequencies.shape)} for {len(ids)} items"
        )
    sorted_frequencies = frequencies.cpu().to(torch.float64).numpy()[order]
    if not (np.isfinite(sorted_frequencies) & (sorted_frequencies > 0)).all():
        raise ValueError("NegativeSampler: frequencies must be positive; omit items that must never be drawn")
    return Candidates(ids, _weights(sorted_frequencies, power))


def _weights(frequencies: Floats, power: float) -> Floats:
    with np.errstate(over="ignore", under="ignore"):
        weights: Floats = frequencies**power
        total = weights.sum()
    if not np.isfinite(total) or not (weights > 0).all():
        low, high = frequencies.min(), frequencies.max()
        raise ValueError(
            f"NegativeSampler: frequencies from {low:g} to {high:g} to the power of {power:g} exceed the range of "
            f"float64, and some items would never be drawn; use a smaller power, or frequencies that differ less"
        )
    return weights


def _draw(
    candidates: Candidates, rows: Ints, own_rows: Ints, own_items: Ints, generator: np.random.Generator, name: str
) -> Ints:
    """Return an item for each of ``rows`` [D] that is not one of the pairs (own_rows, own_items) [P].

    Rejected draws are repeated, so accepted ones follow the weights of the remaining items.
    """
    count = len(candidates.ids)
    if len(rows) == 0:
        return np.empty(0, np.int64)
    cumulative = candidates.weights.cumsum()
    positions = np.searchsorted(candidates.ids, own_items).clip(max=max(count - 1, 0))
    known = candidates.ids[positions] == own_items
    excluded = np.unique(own_rows[known] * count + positions[known])
    indices, pending = np.empty(len(rows), np.int64), np.arange(len(rows))
    for _ in range(_REDRAWS):
        uniform = generator.random(len(pending)) * cumulative[-1]
        trial = np.searchsorted(cumulative, uniform, side="right").clip(max=count - 1)
        indices[pending] = trial
        pending = pending[np.isin(rows[pending] * count + trial, excluded)]
        if len(pending) == 0:
            return candidates.ids[indices]
    for row in np.unique(rows[pending]):
        weights = candidates.weights.copy()
        weights[excluded[(excluded >= row * count) & (excluded < (row + 1) * count)] - row * count] = 0
        total = weights.sum()
        if total == 0:
            raise ValueError(
                f"NegativeSampler: all {count} candidates for {name!r} are excluded in row {row} of the batch; draw "
                f"from more items, or from larger batches"
            )
        draws = pending[rows[pending] == row]
        indices[draws] = generator.choice(count, len(draws), p=weights / total)
    return candidates.ids[indices]


def _is_flat(column: torch.Tensor | RaggedTensor) -> bool:
    if isinstance(column, RaggedTensor):
        return column.levels == 1 and column.values.dim() == 1
    return column.dim() == 1
