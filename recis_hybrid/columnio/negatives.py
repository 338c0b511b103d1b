"""NegativeSampler: draws items that a user did not choose, for each one that the user did.

Letters: B rows of a batch, C items to draw from, D draws of all rows together, P pairs of a row and an item of its own.
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

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Draws that hit an item of their own row are drawn again this often before all other items are listed for that row.
_REDRAWS = 16


@dataclass(frozen=True)
class Candidates:
    """The items to draw from, and how likely each is."""

    ids: Ints
    """[C], ascending, each once."""
    weights: Floats
    """[C], positive."""


class NegativeSampler:
    """Adds a column of negatives to a batch: for each positive `count` items that are none of the row's own.

    A row's own items are its positives and what it holds in the columns `exclude` (all that the user ever chose, for
    instance): none of them is ever drawn in that row. An item may be drawn twice in a row.

    What is drawn is a function of (seed, epoch) and of the batch's positives and excluded items: the same in any thread
    and process, and another for another batch. Use it in `transforms` of a ColumnDataset, or later.

    Args:
        positive: The column of positives: int64 [B], or a RaggedTensor of int64 values of one level.
        count: Negatives for each positive; or a column of them, integers [B], for each positive of that row.
        items: [C] int64, the table to draw from, each once; None draws from the batch's own positives.
        frequencies: [C], how often each item of the table occurs, positive; None has all alike. In-batch it is how
            often an item is a positive of the batch.
        power: An item is drawn with a probability proportional to frequency ** power: 0 is uniform, 1 is by frequency,
            and 0.75 is what word2vec takes.
        exclude: Columns of further items of a row, of the same forms as `positive`.
        name: The column of negatives.
        seed: Not negative.

    Raises:
        TypeError: An argument has another type.
        ValueError: A table is empty or has an item twice, a frequency is not positive, a number is negative, or
            frequencies to that power are beyond float64.

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
        # A comparison that also fails for NaN.
        if seed < 0 or not 0 <= power < float("inf"):
            raise ValueError(
                f"NegativeSampler: seed and power must not be negative, and power must be finite, got {seed} and "
                f"{power}"
            )
        if items is None and frequencies is not None:
            raise ValueError("NegativeSampler: frequencies are of the items of a table, and there is none; give items")
        self._positive, self._count, self._exclude, self._name = positive, count, tuple(exclude), name
        self._power, self._seed = power, seed
        # In memory that the workers of a DataLoader see, which may live on from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self._table = None if items is None else _table(items, frequencies, power)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # What a DataLoader hands to a worker is shared already; a deep copy gets memory of its own.
        self._epoch.share_memory_()

    def __copy__(self) -> NegativeSampler:
        made = object.__new__(type(self))
        made.__setstate__({**self.__dict__, "_epoch": self._epoch.clone()})
        return made

    def set_epoch(self, epoch: int) -> None:
        """Make the next draws those of `epoch`, in the workers of a DataLoader, too; call it between passes.

        Args:
            epoch: Not negative.

        Raises:
            TypeError: It is no integer.
            ValueError: It is negative.
        """
        if not isinstance(epoch, int):
            raise TypeError(f"NegativeSampler: epoch must be an integer, got {epoch!r}")
        if epoch < 0:
            raise ValueError(f"NegativeSampler: epoch must not be negative, got {epoch}")
        self._epoch.fill_(epoch)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the column of negatives.

        Args:
            batch: On the CPU.

        Returns:
            The batch, and int64 [B, count] negatives where positives are [B] and the count is a number; otherwise a
            RaggedTensor of int64, row i holding the negatives of its positives one after another.

        Raises:
            TypeError: A column has another form.
            ValueError: All items that could be drawn are a row's own; the column of counts is not one of counts.
        """
        rows, positives = self._pairs(batch, self._positive)
        others = [self._pairs(batch, name) for name in self._exclude]
        own_rows = np.concatenate([rows, *(each for each, _ in others)])
        own_items = np.concatenate([positives, *(items for _, items in others)])
        counts = self._counts(batch, rows)
        generator = self._generator(own_rows, own_items, counts)
        of_draws = np.repeat(rows, counts)
        drawn = _draw(self._candidates(positives), of_draws, own_rows, own_items, generator, self._name)
        column = batch[self._positive]
        made: torch.Tensor | RaggedTensor = torch.from_numpy(drawn)
        if isinstance(column, torch.Tensor) and isinstance(self._count, int):
            made = torch.from_numpy(drawn).view(-1, self._count)
        else:
            size = column.batch_size if isinstance(column, RaggedTensor) else column.shape[0]
            lengths = np.bincount(of_draws, minlength=size)
            offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
            made = RaggedTensor(torch.from_numpy(drawn), torch.from_numpy(offsets))
        return {**batch, self._name: made}

    def _pairs(self, batch: Batch, name: str) -> tuple[Ints, Ints]:
        """Return the row and the item of each value of a column."""
        if name not in batch:
            raise ValueError(f"NegativeSampler: the batch has no column {name!r}, it has {', '.join(batch)}")
        column = batch[name]
        if column.dtype != torch.int64 or not _is_flat(column):
            raise TypeError(
                f"NegativeSampler: column {name!r} must be int64 [B] or rows of int64 without further levels, got "
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
            f"NegativeSampler: items must be at least one, each once, got {items.numel()} of which {len(ids)} differ"
        )
    if frequencies is None:
        return Candidates(ids, np.ones(len(ids)))
    if frequencies.shape != items.shape:
        raise ValueError(
            f"NegativeSampler: frequencies must be one for each item, got {list(frequencies.shape)} for "
            f"{len(ids)} items"
        )
    found = frequencies.cpu().to(torch.float64).numpy()[order]
    if not (np.isfinite(found) & (found > 0)).all():
        raise ValueError("NegativeSampler: frequencies must be positive; leave out what is never to be drawn")
    return Candidates(ids, _weights(found, power))


def _weights(frequencies: Floats, power: float) -> Floats:
    with np.errstate(over="ignore", under="ignore"):
        weights: Floats = frequencies**power
        total = weights.sum()
    if not np.isfinite(total) or not (weights > 0).all():
        low, high = frequencies.min(), frequencies.max()
        raise ValueError(
            f"NegativeSampler: frequencies from {low:g} to {high:g} to the power of {power:g} are beyond what float64 "
            f"holds, and some items would never be drawn; take a smaller power, or frequencies that differ less"
        )
    return weights


def _draw(
    candidates: Candidates, rows: Ints, own_rows: Ints, own_items: Ints, generator: np.random.Generator, name: str
) -> Ints:
    """Draws an item for each of rows [D] that is none of (own_rows, own_items) [P].

    A draw that hits is drawn again: what remains has the weights of all other items, which is what is wanted.
    """
    count = len(candidates.ids)
    if len(rows) == 0:
        return np.empty(0, np.int64)
    edges = candidates.weights.cumsum()
    places = np.searchsorted(candidates.ids, own_items).clip(max=max(count - 1, 0))
    known = candidates.ids[places] == own_items
    own = np.unique(own_rows[known] * count + places[known])
    drawn, left = np.empty(len(rows), np.int64), np.arange(len(rows))
    for _ in range(_REDRAWS):
        tried = np.searchsorted(edges, generator.random(len(left)) * edges[-1], side="right").clip(max=count - 1)
        drawn[left] = tried
        left = left[np.isin(rows[left] * count + tried, own)]
        if len(left) == 0:
            return candidates.ids[drawn]
    for row in np.unique(rows[left]):
        weights = candidates.weights.copy()
        weights[own[(own >= row * count) & (own < (row + 1) * count)] - row * count] = 0
        total = weights.sum()
        if total == 0:
            raise ValueError(
                f"NegativeSampler: all {count} items that {name!r} could hold in row {row} of the batch are the row's "
                f"own; draw from a larger table, or from larger batches"
            )
        of_row = left[rows[left] == row]
        drawn[of_row] = generator.choice(count, len(of_row), p=weights / total)
    return candidates.ids[drawn]


def _is_flat(column: torch.Tensor | RaggedTensor) -> bool:
    if isinstance(column, RaggedTensor):
        return column.levels == 1 and column.values.dim() == 1
    return column.dim() == 1
