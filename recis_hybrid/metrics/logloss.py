"""Log loss, the mean negative log-likelihood of binary labels, and normalized entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.metrics import _faults
from recis_hybrid.metrics._checks import check_shapes, one_class
from recis_hybrid.metrics._metric import SumMetric

_EPS = torch.finfo(torch.float64).eps


def logloss(labels: Tensor, probabilities: Tensor, weights: Tensor | None = None) -> float:
    r"""Return the log loss of probabilities, in float64.

    .. math:: -\sum_i w_i (y_i \log p_i + (1 - y_i) \log(1 - p_i)) / \sum_i w_i

    Args:
        labels: ``[N]``, 0 or 1, any dtype.
        probabilities: ``[N]``, floating, in [0, 1]; clipped to one float64 epsilon from 0 and 1, as in scikit-learn.
        weights: ``[N]``, non-negative; None means 1 for all rows.

    Raises:
        ValueError: If shapes differ, there are no rows (of weight above 0), a label is not 0 or 1, a probability is
            NaN or outside [0, 1], or a weight is negative or not finite.

    Example:
        >>> round(logloss(torch.tensor([0, 1]), torch.tensor([0.5, 0.5])), 4)
        0.6931
    """
    loss, _, total = _checked_sums("logloss", _sums("logloss", labels, probabilities, weights))
    return loss / total


def normalized_entropy(labels: Tensor, probabilities: Tensor, weights: Tensor | None = None) -> float:
    r"""Return the log loss divided by the entropy of the mean label.

    A model that predicts the mean label for every row has the value 1.

    .. math:: \frac{\mathrm{logloss}}{-(\bar y \log \bar y + (1 - \bar y) \log(1 - \bar y))}

    Args:
        labels: ``[N]``, 0 or 1, any dtype.
        probabilities: ``[N]``, as in :func:`logloss`.
        weights: ``[N]``, non-negative; None means 1 for all rows.

    Returns:
        The ratio; NaN, with a RuntimeWarning, if there is only one class.

    Raises:
        ValueError: As in :func:`logloss`.

    Example:
        >>> round(normalized_entropy(torch.tensor([0, 1, 1, 0]), torch.tensor([0.5, 0.5, 0.5, 0.5])), 6)
        1.0

    References:
        He et al.: Practical lessons from predicting clicks on ads at Facebook. ADKDD 2014.
    """
    return _ratio("normalized_entropy", _sums("normalized_entropy", labels, probabilities, weights))


class LogLoss(SumMetric):
    """Log loss over batches; see :func:`logloss`.

    Args:
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Example:
        >>> metric = LogLoss()
        >>> metric.update(torch.tensor([0.5]), torch.tensor([1]))
        >>> round(metric.compute(), 4)
        0.6931
    """

    def _terms(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return _terms(scores, labels, weights)

    def _value(self, sums: Tensor) -> float:
        loss, _, total = _checked_sums("LogLoss", sums)
        return loss / total


class NormalizedEntropy(LogLoss):
    """Normalized entropy over batches; see :func:`normalized_entropy`.

    Args:
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Example:
        >>> metric = NormalizedEntropy()
        >>> metric.update(torch.tensor([0.9, 0.2]), torch.tensor([1, 0]))
        >>> round(metric.compute(), 4)
        0.237
    """

    def _value(self, sums: Tensor) -> float:
        return _ratio("NormalizedEntropy", sums)


def _terms(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    clipped = scores.clamp(_EPS, 1 - _EPS)
    losses = -torch.where(labels == 1, clipped.log(), (-clipped).log1p())
    sums = torch.stack([(weights * losses).sum(), (weights * labels).sum(), weights.sum()])
    return torch.cat([sums, _faults.counts(scores, labels, weights)])


def _sums(where: str, labels: Tensor, probabilities: Tensor, weights: Tensor | None) -> Tensor:
    check_shapes(where, labels, probabilities, weights=weights)
    scores = probabilities.detach().double()
    return _terms(scores, labels.double(), torch.ones_like(scores) if weights is None else weights.double()).cpu()


def _checked_sums(where: str, sums: Tensor) -> tuple[float, float, float]:
    """Return the sums of losses, labels and weights."""
    _faults.check_counts(where, sums[3:])
    return float(sums[0]), float(sums[1]), float(sums[2])


def _ratio(where: str, sums: Tensor) -> float:
    loss, positive, total = _checked_sums(where, sums)
    if positive in (0.0, total):
        weighted = int(sums[4])
        return one_class(where, weighted if positive else 0, 0 if positive else weighted)
    rate = torch.tensor(positive / total, dtype=torch.float64)
    entropy = -(rate * rate.log() + (1 - rate) * (-rate).log1p())
    return loss / total / float(entropy)
