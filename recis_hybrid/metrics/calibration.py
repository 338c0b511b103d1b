"""Calibration: the ratio of predicted to actual positives."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.metrics import _faults
from recis_hybrid.metrics._checks import undefined
from recis_hybrid.metrics._metric import SumMetric


class Calibration(SumMetric):
    r"""Calibration :math:`\sum_i w_i p_i / \sum_i w_i y_i` over batches: 1 if predictions are right on average.

    ``compute`` returns NaN, with a RuntimeWarning, if no label is 1. It raises ValueError if a label is not 0 or 1, a
    probability is NaN or outside [0, 1], or a weight is negative or not finite.

    Args:
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Example:
        >>> metric = Calibration()
        >>> metric.update(torch.tensor([0.5, 0.75, 0.25]), torch.tensor([1, 0, 0]))
        >>> metric.compute()
        1.5

    References:
        He et al.: Practical lessons from predicting clicks on ads at Facebook. ADKDD 2014.
    """

    def _terms(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        sums = torch.stack([(weights * scores).sum(), (weights * labels).sum()])
        return torch.cat([sums, _faults.counts(scores, labels, weights)])

    def _value(self, sums: Tensor) -> float:
        _faults.check_counts("Calibration", sums[2:])
        predicted, actual = float(sums[0]), float(sums[1])
        if actual == 0:
            return undefined("Calibration", f"none of {int(sums[2])} rows are positive; evaluate on more rows")
        return predicted / actual
