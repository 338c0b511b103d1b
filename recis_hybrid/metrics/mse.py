"""Mean squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.metrics import _faults
from recis_hybrid.metrics._metric import SumMetric


class MSE(SumMetric):
    r"""Mean squared error :math:`\sum_i w_i (p_i - y_i)^2 / \sum_i w_i` over batches.

    ``compute`` raises ValueError if a score or a label is not finite, or a weight is negative or not finite.

    Args:
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Example:
        >>> metric = MSE()
        >>> metric.update(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        >>> metric.compute()
        2.0
    """

    def _terms(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        sums = torch.stack([(weights * (scores - labels).square()).sum(), weights.sum()])
        return torch.cat([sums, _faults.counts(scores, labels, weights, binary=False, probabilities=False)])

    def _value(self, sums: Tensor) -> float:
        _faults.check_counts("MSE", sums[2:], binary=False, probabilities=False)
        return float(sums[0] / sums[1])
