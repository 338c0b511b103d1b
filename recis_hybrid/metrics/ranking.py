"""Metrics of the first k rows of each group's ranking: precision, recall, NDCG and hit rate.

Each metric is the mean over all orders of rows with equal scores, so it depends neither on the order of the rows nor on
their distribution over ranks.
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
    """Base class of metrics of the first k rows of each group, averaged over groups; rows have no weights."""

    def __init__(self, k: int, *, process_group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        super().__init__(process_group=process_group, sync=sync)
        self._k = check_integer(type(self).__name__, "k", k, low=1)

    def _settings(self) -> dict[str, object]:
        return {"k": self._k}

    def update(self, scores: Tensor, labels: Tensor, groups: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch without synchronizing the device. Rows of a group may be spread over batches and ranks.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, non-negative; above 0 means relevant.
            groups: int64 ``[B]``, the user, session or query of each row.
            weights: Must be None; rows of a ranking have no weights.
        """
        if weights is not None:
            raise ValueError(f"{type(self).__name__}: weights must be None, because rows of a ranking have no weights")
        super().update(scores, labels, groups)

    def compute(self) -> float:
        """Return the mean over the groups of all ranks since the last reset; NaN if no group counts."""
        where = type(self).__name__
        rows = self.seen()
        labels, scores, _ = check_rows(where, rows["labels"], rows["scores"], None, binary=False)
        ranking = Sorted.of(rows["groups"], scores)
        figures, counts = self._figures(ranking, labels[ranking.order])
        if not bool(counts.any()):
            return undefined(where, f"none of {ranking.groups} groups have a relevant row; evaluate on more rows")
        return float(figures[counts].mean())

    @abstractmethod
    def _figures(self, rows: Sorted, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the metric of each group, float64 ``[G]``, and whether the group counts, bool ``[G]``.

        Args:
            rows: The sorted rows.
            labels: Labels of the sorted rows, float64 ``[N]``.
        """

    def _among_first(self, rows: Sorted) -> Tensor:
        """Return the probability that a row of a run is among the first k, float64 ``[T]``."""
        return ((self._k - rows.first).double() / rows.size).clamp_(0.0, 1.0)

    def _hits(self, rows: Sorted, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the number of relevant rows of each group, among its first k and in total, float64 ``[G]`` each."""
        relevant = rows.by_tie((labels > 0).double())
        return rows.by_group(relevant * self._among_first(rows)), rows.by_group(relevant)


class PrecisionAtK(_AtK):
    """Share of relevant rows among the first k rows of a group, averaged over all groups.

    The number of relevant rows is divided by k, even in groups with fewer than k rows.

    Args:
        k: Number of rows at the top of the ranking.
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Raises:
        TypeError: If k is not an integer.
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
    """Share of a group's relevant rows that are among its first k, averaged over the groups that have a relevant row.

    Args:
        k: Number of rows at the top of the ranking.
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Raises:
        TypeError: If k is not an integer.
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
    """Share of groups that have a relevant row among their first k.

    Groups without a relevant row do not count.

    Args:
        k: Number of rows at the top of the ranking.
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Raises:
        TypeError: If k is not an integer.
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
        # Probability that no row drawn from a run is relevant: C(size - relevant, drawn) / C(size, drawn).
        possible = drawn <= size - relevant
        missed = torch.where(possible, (_log_choose(size - relevant, drawn) - _log_choose(size, drawn)).exp(), 0.0)
        # Only the last run among the first k is drawn partially, so the probabilities multiply.
        log_missed = rows.by_group(torch.where(possible, missed.log(), -torch.inf))
        return 1 - log_missed.exp(), rows.by_group(relevant) > 0


class NDCGAtK(_AtK):
    r"""Normalized discounted cumulative gain of the first k rows of a group.

    .. math:: \mathrm{DCG} = \sum_{i=1}^{k} y_i / \log_2(i + 1),\; \mathrm{NDCG} = \mathrm{DCG} / \max \mathrm{DCG}

    It is averaged over the groups that have a relevant row. The gain is the label itself; for exponential gain, pass
    ``2**label - 1`` as labels.

    Args:
        k: Number of rows at the top of the ranking.
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Raises:
        TypeError: If k is not an integer.
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
        discounts = 1 / torch.arange(2, self._k + 2, dtype=torch.float64).log2()
        # For each position, the sum of the discounts of the positions before it.
        cumulative = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])
        actual = self._gain(rows, labels, cumulative)
        best = Sorted.of(rows.group, labels)
        ideal = self._gain(best, labels[best.order], cumulative)
        return actual / ideal, ideal > 0

    def _gain(self, rows: Sorted, labels: Tensor, cumulative: Tensor) -> Tensor:
        first, last = rows.first.clamp(max=self._k), (rows.first + rows.size).clamp(max=self._k)
        return rows.by_group(rows.by_tie(labels) * (cumulative[last] - cumulative[first]) / rows.size)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
