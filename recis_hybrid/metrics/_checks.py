"""Input checks of metrics, and undefined values. Letters: N rows."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from recis_hybrid.distributed import rank


def check_shapes(where: str, labels: Tensor, scores: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless labels, scores and other columns are ``[N]`` each; does not synchronize."""
    if labels.dim() != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"{where}: labels and scores must be [N] each, got {list(labels.shape)} and {list(scores.shape)}"
        )
    for name, values in others.items():
        if values is not None and values.shape != labels.shape:
            raise ValueError(
                f"{where}: {name} must be [N] with N = {labels.numel()} like labels, got {list(values.shape)}"
            )


def check_rows(
    where: str, labels: Tensor, scores: Tensor, weights: Tensor | None, *, binary: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels as bool (float64 if not binary), and scores and weights as float64, all ``[N]`` on the CPU.

    Raises:
        ValueError: If shapes differ, a label is not 0 or 1 (if not binary: negative or not finite), a score is NaN, or
            a weight is negative or not finite.
    """
    check_shapes(where, labels, scores, weights=weights)
    labels, scores = labels.detach().cpu(), scores.detach().cpu().double()
    weights = torch.ones_like(scores) if weights is None else weights.detach().cpu().double()
    if binary and not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"{where}: labels must be 0 or 1, got values from {labels.min()} to {labels.max()}")
    if not binary and not bool(((labels >= 0) & (labels != math.inf)).all()):
        raise ValueError(
            f"{where}: labels must be finite and non-negative, got values from {labels.min()} to {labels.max()}"
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"{where}: {int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
    if wrong := int((~(weights >= 0) | weights.isinf()).sum()):
        raise ValueError(
            f"{where}: weights must be finite and non-negative, {wrong} of {weights.numel()} are not; omit these rows"
        )
    return labels == 1 if binary else labels.double(), scores, weights


def undefined(where: str, why: str) -> float:
    """Return NaN and issue a RuntimeWarning on rank 0 that names the metric and the reason."""
    if rank() == 0:
        warnings.warn(f"{where} is undefined, returning NaN: {why}", RuntimeWarning, stacklevel=3)
    return math.nan


def one_class(where: str, positives: int, negatives: int) -> float:
    """Return NaN and warn that only one class is present."""
    return undefined(
        where, f"it needs both classes, got {positives} positives and {negatives} negatives; evaluate on more rows"
    )
