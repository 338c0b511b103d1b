"""Metrics of the first k of each group's ranking: precision, recall, NDCG and hit rate.

Rows of equal score have no order: each figure is the mean over all orders of them, so that it depends neither on the
order of the rows nor on the ranks that they lie on.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid.metrics._checks import check_rows, undefined
from recis_hybrid.metrics._metric import GroupedLabels
from recis_hybrid.metrics._sorted import Sorted
from recis_hybrid.validation import check_integer


class _AtK(GroupedLabels):
    """A figure of each group's first k, averaged over groups; weights of rows do not count."""

    def __init__(self, k: int, *, process_group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        super().__init__(process_group=process_group, sync=sync)
        self._k = check_integer(type(self).__name__, "k", k, low=1)

    def _settings(self) -> dict[str, object]:
        return {"k": self._k}

    def update(self, scores: Tensor, labels: Tensor, groups: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch without waiting for a device. The rows of a group may come in any batches, on any ranks.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, not negative; above 0 means relevant.
            groups: int64 ``[B]``, to which user, session or query each row belongs.
            weights: Refused: a place in a ranking is taken or not.
        """
        if weights is not None:
            raise ValueError(f"{type(self).__name__}: rows of a ranking have no weights; leave them out")
        super().update(scores, labels, groups)

    def compute(self) -> float:
        """Return the mean over the groups that all ranks have seen since the last reset; NaN if none counts."""
        where = type(self).__name__
        rows = self.seen()
        labels, scores, _ = check_rows(where, rows["labels"], rows["scores"], None, binary=False)
        found = Sorted.of(rows["groups"], scores)
        figures, counts = self._figures(found, labels[found.order])
        if not bool(counts.any()):
            return undefined(where, f"none of {found.groups} groups has a relevant row; evaluate on more rows")
        return float(figures[counts].mean())

    @abstractmethod
    def _figures(self, rows: Sorted, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each group's figure, float64 [G], and which groups count, bool [G]; labels are as sorted."""

    def _among_first(self, rows: Sorted) -> Tensor:
        """Return the chance that a row of a run is among the first k, float64 [T]."""
        return ((self._k - rows.first).double() / rows.size).clamp_(0.0, 1.0)

    def _hits(self, rows: Sorted, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many relevant rows each group has among its first k, and in all, float64 [G] each."""
        relevant = rows.by_tie((labels > 0).double())
        return rows.by_group(relevant * self._among_first(rows)), rows.by_group(relevant)


class PrecisionAtK(_AtK):
    """Accumulates rankings and computes how much of the first k is relevant: hits / k, the mean over all groups.

    A group of fewer than k rows is divided by k all the same.

    Args:
        k: How many.
        process_group: The ranks that evaluate together; None: torch.distributed's default group.
        sync: False computes the value of what this rank alone has seen.

    Raises:
        TypeError: If k is no integer.
        ValueError: If k is less than 1.

    Example:
        >>> metric = PrecisionAtK(2)
        >>> metric.update(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1]), torch.tensor([5, 5, 5]))
        >>> metric.compute()
        0.5
    """

    def _figures(self, rows: Sorted, labels: Tensor) -> tuple[Tensor, Tensor]:
        hits, _ = self._hits(rows, labels)
        return hits / self._k, torch.ones_like(hits, dtype=torch.bool)


class RecallAtK(_AtK):
    """Accumulates rankings and computes how many of a group's relevant rows are among its first k.

    The mean over the groups that have a relevant row.

    Args:
        k: How many.
        process_group: The ranks that evaluate together; None: torch.distributed's default group.
        sync: False computes the value of what this rank alone has seen.

    Raises:
        TypeError: If k is no integer.
        ValueError: If k is less than 1.

    Example:
        >>> metric = RecallAtK(2)
        >>> metric.update(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1]), torch.tensor([5, 5, 5]))
        >>> metric.compute()
        0.5
    """

    def _figures(self, rows: Sorted, labels: Tensor) -> tuple[Tensor, Tensor]:
        hits, relevant = self._hits(rows, labels)
        return hits / relevant, relevant > 0


class HitRateAtK(_AtK):
    """Accumulates rankings and computes how many groups have a relevant row among their first k.

    The share of the groups that have a relevant row at all.

    Args:
        k: How many.
        process_group: The ranks that evaluate together; None: torch.distributed's default group.
        sync: False computes the value of what this rank alone has seen.

    Raises:
        TypeError: If k is no integer.
        ValueError: If k is less than 1.

    Example:
        >>> metric = HitRateAtK(1)
        >>> metric.update(torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 0, 0, 1]), torch.tensor([5, 5, 6, 6]))
        >>> metric.compute()
        0.5
    """

    def _figures(self, rows: Sorted, labels: Tensor) -> tuple[Tensor, Tensor]:
        relevant, size = rows.by_tie((labels > 0).double()), rows.size.double()
        drawn = (self._k - rows.first).double().clamp_(min=0.0).minimum(size)
        # The chance that none of the rows drawn of a run is relevant, C(size - relevant, drawn) / C(size, drawn).
        possible = drawn <= size - relevant
        missed = torch.where(possible, (_log_choose(size - relevant, drawn) - _log_choose(size, drawn)).exp(), 0.0)
        # Only the last run that reaches into the first k is cut; those before are drawn whole, so chances multiply.
        log_missed = rows.by_group(torch.where(possible, missed.log(), -torch.inf))
        return 1 - log_missed.exp(), rows.by_group(relevant) > 0


class NDCGAtK(_AtK):
    r"""Accumulates rankings and computes the normalized discounted cumulative gain of the first k.

    .. math:: \mathrm{DCG} = \sum_{i=1}^{k} y_i / \log_2(i + 1),\; \mathrm{NDCG} = \mathrm{DCG} / \max \mathrm{DCG}

    The mean over the groups that have a relevant row. The gain is the label itself; give ``2**label - 1`` for the other
    one in use.

    Args:
        k: How many.
        process_group: The ranks that evaluate together; None: torch.distributed's default group.
        sync: False computes the value of what this rank alone has seen.

    Raises:
        TypeError: If k is no integer.
        ValueError: If k is less than 1.

    Example:
        >>> metric = NDCGAtK(2)
        >>> metric.update(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0, 1, 0]), torch.tensor([5, 5, 5]))
        >>> round(metric.compute(), 4)
        0.6309

    References:
        Järvelin, Kekäläinen: Cumulated gain-based evaluation of IR techniques. TOIS 2002.
    """

    def _figures(self, rows: Sorted, labels: Tensor) -> tuple[Tensor, Tensor]:
        # What the places before place p add up to, of the first k.
        discounts = 1 / torch.arange(2, self._k + 2, dtype=torch.float64).log2()
        summed = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])
        own = self._gain(rows, labels, summed)
        best = Sorted.of(rows.group, labels)
        ideal = self._gain(best, labels[best.order], summed)
        return own / ideal, ideal > 0

    def _gain(self, rows: Sorted, labels: Tensor, summed: Tensor) -> Tensor:
        first, last = rows.first.clamp(max=self._k), (rows.first + rows.size).clamp(max=self._k)
        return rows.by_group(rows.by_tie(labels) * (summed[last] - summed[first]) / rows.size)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
