"""Calibration: how many positives are predicted for each one that is there."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.metrics import _faults
from recis_hybrid.metrics._checks import undefined
from recis_hybrid.metrics._metric import SumMetric


class Calibration(SumMetric):
    r"""Accumulates :math:`\sum_i w_i p_i / \sum_i w_i y_i`: 1 where predictions are right on the average.

    ``compute`` gives NaN, with a RuntimeWarning, where no label is 1, and raises ValueError where a label is neither 0
    nor 1, a probability is NaN or outside [0, 1], or a weight is negative or not finite.

    Args:
        process_group: The ranks that evaluate together; None: torch.distributed's default group.
        sync: False computes the value of what this rank alone has seen.

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
        _faults.refuse("Calibration", sums[2:])
        predicted, there = float(sums[0]), float(sums[1])
        if there == 0:
            return undefined("Calibration", f"none of {int(sums[2])} rows is a positive; evaluate on more rows")
        return predicted / there
