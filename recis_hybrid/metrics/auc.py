"""AUC, the area under the ROC curve: exact, with ties counted by half."""

from __future__ import annotations

from torch import Tensor

from recis_hybrid.metrics._scored import ScoredLabels, check


def auc(labels: Tensor, scores: Tensor) -> float:
    r"""Returns the probability that a positive's score exceeds a negative's, a tie counting half.

    .. math:: \frac{1}{P N} \sum_{i \in pos} \sum_{j \in neg} [s_i > s_j] + \tfrac12 [s_i = s_j]

    Args:
        labels: ``[N]``, 0 or 1, any dtype.
        scores: ``[N]``, floating; higher means more likely positive.

    Raises:
        ValueError: If shapes differ, a label is neither 0 nor 1, a score is NaN, or there is only one class.

    Example:
        >>> auc(torch.tensor([0, 1, 1]), torch.tensor([0.3, 0.3, 0.9]))
        0.75

    References:
        Fawcett: An introduction to ROC analysis. Pattern Recognition Letters 2006.
    """
    labels, scores = check("auc", labels, scores)
    positives = int(labels.sum())
    negatives = labels.numel() - positives
    if positives == 0 or negatives == 0:
        raise ValueError(
            f"auc: needs both classes, got {positives} positives and {negatives} negatives; evaluate on more rows"
        )
    _, group, counts = scores.unique(return_inverse=True, return_counts=True)
    # Mean rank, from 1, of each group of equal scores: the rank-sum form of the double sum (Mann and Whitney).
    last = counts.cumsum(0).double()
    ranks = (last - (counts.double() - 1) / 2)[group]
    above = float(ranks[labels].sum()) - positives * (positives + 1) / 2
    return above / positives / negatives


class AUC(ScoredLabels):
    """Accumulates labels and scores and computes their exact AUC.

    Example:
        >>> metric = AUC()
        >>> metric.update(torch.tensor([0.3, 0.9]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([0.4]), torch.tensor([1]))
        >>> metric.compute()
        1.0
    """

    def compute(self) -> float:
        """Returns the AUC of everything seen since the last reset; raises ValueError for one class only."""
        return auc(*self.seen())
