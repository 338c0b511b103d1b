"""Counts of bad rows, kept with the sums of a metric, so that only ``compute`` has to wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor

COUNTS = 6


def counts(
    scores: Tensor, labels: Tensor, weights: Tensor, *, binary: bool = True, probabilities: bool = True
) -> Tensor:
    """Return float64 ``[COUNTS]``: rows, rows of weight above 0, and rows with each kind of fault.

    The faults are bad labels, NaN scores, scores outside [0, 1] (if not probabilities: infinite), and bad weights.
    """
    labels_fault = ~((labels == 0) | (labels == 1)) if binary else ~labels.isfinite()
    # A NaN is in neither range, so it is counted once.
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
    """Raise ValueError if :func:`counts` found bad rows, or no rows of weight above 0."""
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
        raise ValueError(
            f"{where}: there must be rows of weight above 0, got {rows} rows without; evaluate on more rows"
        )
