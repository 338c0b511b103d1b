"""Bad rows are counted along with a metric's sums and refused when it is computed, so that no update waits."""

from __future__ import annotations

import torch
from torch import Tensor

COUNTS = 6


def counts(
    scores: Tensor, labels: Tensor, weights: Tensor, *, binary: bool = True, probabilities: bool = True
) -> Tensor:
    """Return float64 [COUNTS]: rows, rows of weight above 0, bad labels, NaNs, scores outside [0, 1], bad weights."""
    labels_fault = ~((labels == 0) | (labels == 1)) if binary else ~labels.isfinite()
    # A NaN is counted as that alone.
    outside = (scores < 0) | (scores > 1) if probabilities else scores.isinf()
    masks = [
        torch.ones_like(labels_fault),
        weights > 0,
        labels_fault,
        scores.isnan(),
        outside,
        ~(weights >= 0) | weights.isinf(),
    ]
    return torch.stack([mask.sum() for mask in masks]).double()


def refuse(where: str, counted: Tensor, *, binary: bool = True, probabilities: bool = True) -> None:
    """Raise ValueError for what :func:`counts` has found."""
    rows, weighty, labels, nans, outside, weights = (int(count) for count in counted)
    if labels:
        raise ValueError(f"{where}: labels must be {'0 or 1' if binary else 'finite'}, {labels} of {rows} are not")
    if nans:
        raise ValueError(f"{where}: {nans} of {rows} scores are NaN")
    if outside:
        rule = "probabilities must lie in [0, 1]" if probabilities else "scores must be finite"
        remedy = "; apply a sigmoid to logits" if probabilities else ""
        raise ValueError(f"{where}: {rule}, {outside} of {rows} do not{remedy}")
    if weights:
        raise ValueError(
            f"{where}: weights must be finite and not negative, {weights} of {rows} are not; leave them out"
        )
    if not weighty:
        raise ValueError(f"{where}: there are no rows of weight above 0, got {rows} rows; evaluate on others")
