"""evaluate: metrics of a model on a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from recis_hybrid.pipelines.step import labels_of
from recis_hybrid.ragged import Batch


class Metric(Protocol):
    """torchmetrics' interface, as far as it is used here."""

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a batch."""

    def compute(self) -> float:
        """Returns the value."""


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Iterable[Batch], metrics: Mapping[str, Metric], *, label: str = "label"
) -> dict[str, float]:
    """Feeds the sigmoid of a model's logits to metrics; tables insert nothing.

    Args:
        model: Batch → logits ``[B]``; put into evaluation mode, and back afterwards.
        data: Batches.
        metrics: By name.
        label: The column of labels.

    Returns:
        By name, the value of each metric.
    """
    training = model.training
    model.eval()
    try:
        for batch in data:
            labels = labels_of(batch, label)
            scores = torch.sigmoid(model(batch))
            for metric in metrics.values():
                metric.update(scores, labels)
    finally:
        model.train(training)
    return {name: float(metric.compute()) for name, metric in metrics.items()}
