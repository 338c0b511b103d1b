"""Counts of invalid rows, accumulated with the sums of a metric, so that only ``compute`` synchronizes."""

from __future__ import annotations

import torch
from torch import Tensor

COUNTS = 6


def counts(
    scores: Tensor, labels: Tensor, weights: Tensor, *, binary: bool = True, probabilities: bool = True
) -> Tensor:
    """Return float64 ``[COUNTS]``: rows, rows of weight above 0, and rows with each kind of fault.

    The faults are invalid labels, NaN scores, scores outside [0, 1] (if not probabilities: infinite scores), and
    invalid weights.
    """
    labels_fault = ~((labels == 0) | (labels == 1)) if binary else ~labels.isfinite()
    # Comparisons with NaN are false, so a NaN score is counted only once.
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


def check_counts(where: str, fault_counts: Tensor, *, binary: bool = True, probabilities: bool = True) -> None:
    """Raise ValueError if :func:`counts` found invalid rows, or no rows of weight above 0."""
    rows, weighted, labels, nans, outside, weights = (int(count) for count in fault_counts)
    if labels:
        raise ValueError(f"{where}: labels must be {'0 or 1' if binary else 'finite'}, {labels} of {rows} are not")
    if nans:
        raise ValueError(f"{where}: {nans} of {rows} scores are NaN")
    if outside:
        rule = "probabilities must be in [0, 1]" if probabilities else "scores must be finite"
        remedy = "; apply a sigmoid to logits" if probabilities else ""
        raise ValueError(f"{where}: {rule}, {outside} of {rows} are not{remedy}")
    if weights:
        raise ValueError(
            f"{where}: weights must be finite and non-negative, {weights} of {rows} are not; omit these rows"
        )
    if not weighted:
        raise ValueError(
            f"{where}: there must be rows of weight above 0, got {rows} rows of weight 0; evaluate on more rows"
        )
