"""Log loss: the mean negative log likelihood of binary labels."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.metrics._scored import ScoredLabels, check


def logloss(labels: Tensor, probabilities: Tensor, weights: Tensor | None = None) -> float:
    r"""Returns :math:`-\sum_i w_i (y_i \log p_i + (1 - y_i) \log(1 - p_i)) / \sum_i w_i`, in float64.

    Args:
        labels: ``[N]``, 0 or 1, any dtype.
        probabilities: ``[N]``, floating, in [0, 1]; clipped to float64's resolution away from 0 and 1, as scikit-learn
            does.
        weights: ``[N]``, how much each row counts, none negative; None counts each once.

    Raises:
        ValueError: If shapes differ, there are no rows (of weight above 0), a label is neither 0 nor 1, a probability
            is NaN or outside [0, 1], or a weight is negative or not finite.

    Example:
        >>> round(logloss(torch.tensor([0, 1]), torch.tensor([0.5, 0.5])), 4)
        0.6931
    """
    labels, probabilities, weights = check("logloss", labels, probabilities, weights)
    if not bool((weights > 0).any()):
        raise ValueError(f"logloss: there are no rows of weight above 0, got {labels.numel()} rows; evaluate on others")
    low, high = float(probabilities.min()), float(probabilities.max())
    if low < 0 or high > 1:
        raise ValueError(f"logloss: probabilities must lie in [0, 1], got {low} to {high}; apply a sigmoid to logits")
    eps = torch.finfo(torch.float64).eps
    right = torch.where(labels, probabilities, 1 - probabilities).clamp(eps, 1.0)
    return float(-(weights @ right.log()) / weights.sum())


class LogLoss(ScoredLabels):
    """Accumulates labels and probabilities and computes their log loss.

    Example:
        >>> metric = LogLoss()
        >>> metric.update(torch.tensor([0.5]), torch.tensor([1]))
        >>> round(metric.compute(), 4)
        0.6931
    """

    def compute(self) -> float:
        """Returns the log loss of everything seen since the last reset."""
        return logloss(*self.seen())
