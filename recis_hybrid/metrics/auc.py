"""Exact AUC, the area under the ROC curve; ties count half."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.metrics._checks import check_rows, one_class
from recis_hybrid.metrics._metric import ScoredLabels


def auc(labels: Tensor, scores: Tensor, weights: Tensor | None = None) -> float:
    r"""Return the probability that a positive scores higher than a negative; ties count half.

    .. math:: \frac{\sum_{i \in pos} \sum_{j \in neg} w_i w_j \left([s_i > s_j] + \tfrac12 [s_i = s_j]\right)}
        {\sum_{i \in pos} w_i \sum_{j \in neg} w_j}

    Args:
        labels: ``[N]``, 0 or 1, any dtype.
        scores: ``[N]``, floating; higher means more likely positive.
        weights: ``[N]``, non-negative; None means 1 for all rows.

    Returns:
        The AUC; NaN, with a RuntimeWarning, if there is only one class (of weight above 0).

    Raises:
        ValueError: If shapes differ, a label is not 0 or 1, a score is NaN, or a weight is negative or not finite.

    Example:
        >>> auc(torch.tensor([0, 1, 1]), torch.tensor([0.3, 0.3, 0.9]))
        0.75

    References:
        Fawcett: An introduction to ROC analysis. Pattern Recognition Letters 2006.
    """
    return _auc("auc", labels, scores, weights)


class AUC(ScoredLabels):
    """Exact AUC over batches; see :func:`auc`.

    Keeps every row; :class:`BinnedAUC` needs constant memory.

    Args:
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Example:
        >>> metric = AUC()
        >>> metric.update(torch.tensor([0.3, 0.9]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([0.4]), torch.tensor([1]))
        >>> metric.compute()
        1.0
    """

    def compute(self) -> float:
        """Return the AUC over the rows of all ranks since the last reset; NaN for a single class."""
        rows = self.seen()
        return _auc("AUC", rows["labels"], rows["scores"], rows["weights"])


def _auc(where: str, labels: Tensor, scores: Tensor, weights: Tensor | None) -> float:
    labels, scores, weights = check_rows(where, labels, scores, weights)
    # Rows of weight 0 do not count; a class needs a row of weight above 0.
    positives, negatives = (int((of_class & (weights > 0)).sum()) for of_class in (labels, ~labels))
    if positives == 0 or negatives == 0:
        return one_class(where, positives, negatives)
    distinct, group = scores.unique(return_inverse=True)
    positive, negative = (
        torch.zeros_like(distinct).index_add_(0, group, torch.where(of_class, weights, 0.0))
        for of_class in (labels, ~labels)
    )
    return ordered_share(positive, negative)


def ordered_share(positive: Tensor, negative: Tensor) -> float:
    """Return the AUC from the weights of positives and negatives, float64 ``[n]`` each, by ascending score."""
    # A positive wins against all negatives of lower scores and half of those with an equal score.
    above = negative.cumsum(0) - negative / 2
    # Divide last, because sums of whole numbers of pairs are exact.
    return float((positive @ above) / positive.sum() / negative.sum())
