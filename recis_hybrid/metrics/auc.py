"""AUC, the area under the ROC curve: exact, with ties counting half."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.metrics._checks import check_rows, one_class
from recis_hybrid.metrics._metric import ScoredLabels


def auc(labels: Tensor, scores: Tensor, weights: Tensor | None = None) -> float:
    r"""Return the probability that a positive's score exceeds a negative's, a tie counting half.

    .. math:: \frac{\sum_{i \in pos} \sum_{j \in neg} w_i w_j \left([s_i > s_j] + \tfrac12 [s_i = s_j]\right)}
        {\sum_{i \in pos} w_i \sum_{j \in neg} w_j}

    Args:
        labels: ``[N]``, 0 or 1, any dtype.
        scores: ``[N]``, floating; higher means more likely positive.
        weights: ``[N]``, the weight of each row, not negative; None weighs all rows 1.

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

    It keeps every row, whereas :class:`BinnedAUC` keeps a fixed number of counts.

    Args:
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks; False covers this rank alone.

    Example:
        >>> metric = AUC()
        >>> metric.update(torch.tensor([0.3, 0.9]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([0.4]), torch.tensor([1]))
        >>> metric.compute()
        1.0
    """

    def compute(self) -> float:
        """Return the AUC over all rows since the last reset, on all ranks; NaN for a single class."""
        rows = self.seen()
        return _auc("AUC", rows["labels"], rows["scores"], rows["weights"])


def _auc(where: str, labels: Tensor, scores: Tensor, weights: Tensor | None) -> float:
    labels, scores, weights = check_rows(where, labels, scores, weights)
    # Rows of weight 0 do not count, nor make up a class.
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
    # A positive is above all negatives of lower scores, and half of those of its own score.
    above = negative.cumsum(0) - negative / 2
    # Divide last: whole numbers of pairs add up exactly.
    return float((positive @ above) / positive.sum() / negative.sum())
