"""What metrics of (label, score) pairs share. Letters: N pairs, B pairs of one update."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def check(where: str, labels: Tensor, scores: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns labels as bool, scores and weights as float64, all [N] on the CPU, or raises ValueError."""
    labels, scores = labels.detach().cpu(), scores.detach().cpu().double()
    weights = torch.ones_like(scores) if weights is None else weights.detach().cpu().double()
    if labels.dim() != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"{where}: labels and scores must be [N] each, got {list(labels.shape)} and {list(scores.shape)}"
        )
    if weights.shape != labels.shape:
        raise ValueError(
            f"{where}: weights must be [N] with N = {labels.numel()} as labels are, got {list(weights.shape)}"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"{where}: labels must be 0 or 1, got values from {labels.min()} to {labels.max()}")
    if bool(scores.isnan().any()):
        raise ValueError(f"{where}: {int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
    if wrong := int((~(weights >= 0) | weights.isinf()).sum()):
        raise ValueError(
            f"{where}: weights must be finite and not negative, {wrong} of {weights.numel()} are not; leave them out"
        )
    return labels == 1, scores, weights


class ScoredLabels(ABC):
    """Keeps every (score, label, weight); interface as torchmetrics' (update, compute, reset), and mergeable."""

    def __init__(self) -> None:
        self._labels: list[Tensor] = []
        self._scores: list[Tensor] = []
        # None for a batch whose rows all weigh 1.
        self._weights: list[Tensor | None] = []

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Adds a batch without waiting for a device.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, 0 or 1, any dtype.
            weights: ``[B]``, how much each row counts; None counts each once.
        """
        # Copies: the caller may use its buffers again, and a slice of a reader's buffer would hold all of it in memory.
        self._scores.append(scores.detach().clone())
        self._labels.append(labels.detach().clone())
        self._weights.append(None if weights is None else weights.detach().clone())

    def merge(self, other: ScoredLabels) -> None:
        """Adds everything that another accumulator has seen."""
        self._scores.extend(other._scores)
        self._labels.extend(other._labels)
        self._weights.extend(other._weights)

    def reset(self) -> None:
        """Forgets everything."""
        self._scores.clear()
        self._labels.clear()
        self._weights.clear()

    def seen(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns all labels, scores and weights, [N] each; None for weights of which there were none."""
        if not self._labels:
            raise ValueError(f"{type(self).__name__}: nothing to compute; call update first")
        weights = None
        if any(each is not None for each in self._weights):
            weights = torch.cat(
                [
                    torch.ones_like(scores) if each is None else each
                    for each, scores in zip(self._weights, self._scores, strict=True)
                ]
            )
        return torch.cat(self._labels), torch.cat(self._scores), weights

    @abstractmethod
    def compute(self) -> float:
        """Returns the metric of everything seen since the last reset."""
