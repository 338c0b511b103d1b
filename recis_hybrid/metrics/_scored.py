"""What metrics of (label, score) pairs share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def check(where: str, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns labels as bool and scores as float64, both [N] on the CPU, or raises ValueError."""
    labels, scores = labels.detach().cpu(), scores.detach().cpu().double()
    if labels.dim() != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"{where}: labels and scores must be [N] each, got {list(labels.shape)} and {list(scores.shape)}"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"{where}: labels must be 0 or 1, got values from {labels.min()} to {labels.max()}")
    if bool(scores.isnan().any()):
        raise ValueError(f"{where}: {int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
    return labels == 1, scores


class ScoredLabels(ABC):
    """Keeps every (score, label) pair; interface as torchmetrics' (update, compute, reset), and mergeable."""

    def __init__(self) -> None:
        self._labels: list[Tensor] = []
        self._scores: list[Tensor] = []

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a batch: scores ``[B]`` floating, labels ``[B]`` 0 or 1. Does not wait for a device."""
        self._scores.append(scores.detach())
        self._labels.append(labels.detach())

    def merge(self, other: ScoredLabels) -> None:
        """Adds everything that another accumulator has seen."""
        self._scores.extend(other._scores)
        self._labels.extend(other._labels)

    def reset(self) -> None:
        """Forgets everything."""
        self._scores.clear()
        self._labels.clear()

    def seen(self) -> tuple[Tensor, Tensor]:
        """Returns all labels and scores, [N] each."""
        if not self._labels:
            raise ValueError(f"{type(self).__name__}: nothing to compute; call update first")
        return torch.cat(self._labels), torch.cat(self._scores)

    @abstractmethod
    def compute(self) -> float:
        """Returns the metric of everything seen since the last reset."""
