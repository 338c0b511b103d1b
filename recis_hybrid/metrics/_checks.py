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


def on_host(*columns: Tensor | None) -> tuple[Tensor, ...]:
    """Return the columns (``[N]`` each) that are not None on the CPU, waiting once for a device."""
    given = [column.detach() for column in columns if column is not None]
    away = [number for number, column in enumerate(given) if not column.is_cpu]
    if len({given[number].device for number in away}) == 1:
        # One copy of the bytes of all, the widest elements first so that each column is aligned.
        away.sort(key=lambda number: -given[number].element_size())
        parts = [given[number].contiguous().view(torch.uint8).view(-1) for number in away]
        received = torch.cat(parts).cpu().split([part.numel() for part in parts])
        for number, part in zip(away, received, strict=True):
            given[number] = part.view(given[number].dtype)
    return tuple(column.cpu() for column in given)


def check_rows(
    where: str, labels: Tensor, scores: Tensor, weights: Tensor | None, *, binary: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels as bool (float64 if not binary), and scores and weights as float64, all ``[N]`` on the CPU.

    Raises:
        ValueError: If shapes differ, a label is not 0 or 1 (if not binary: negative or not finite), a score is NaN, or
            a weight is negative or not finite.
    """
    check_shapes(where, labels, scores, weights=weights)
    labels, scores, *rest = on_host(labels, scores, weights)
    scores = scores.double()
    weights = rest[0].double() if rest else torch.ones_like(scores)
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
