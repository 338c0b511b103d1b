"""Objectives: losses by name, and what they weigh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs [B], labels [B]) → scalar."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One thing that a model is trained for.

    Example:
        >>> bce = torch.nn.functional.binary_cross_entropy_with_logits
        >>> Objective(loss=bce, label="bought", weight=lambda step: min(1.0, step / 1000)).label
        'bought'
    """

    loss: Loss
    """(outputs, labels) → scalar, of the outputs in float32."""
    label: str = "label"
    """The column of labels, ``[B]``."""
    weight: float | Callable[[int], float] = 1.0
    """What the loss counts in the sum: fixed, or by a function of the number of updates done."""
    link: Callable[[Tensor], Tensor] = torch.sigmoid
    """What makes of outputs the scores that metrics take."""
    groups: str | None = None
    """The column that says which group a row belongs to, int64 ``[B]``, for metrics by group."""

    def weight_at(self, update: int) -> float:
        """Returns what the loss counts in an update.

        Args:
            update: How many were done before it.

        Raises:
            ValueError: If it is not a finite number.
        """
        weight = float(self.weight(update)) if callable(self.weight) else self.weight
        if not math.isfinite(weight):
            raise ValueError(f"Objective: the weight of label {self.label!r} is {weight} at update {update}")
        return weight


class UncertaintyWeights(nn.Module):
    r"""Weighs losses by learnt uncertainties.

    .. math:: L = \sum_i e^{-s_i} L_i + \tfrac12 s_i

    with one parameter s for each loss, the logarithm of its variance, 0 at first. Give its parameters to a dense
    optimizer.

    Args:
        names: Of the objectives.

    Example:
        >>> weights = UncertaintyWeights(["click", "buy"])
        >>> weights({"click": torch.tensor(0.5), "buy": torch.tensor(0.25)}).item()
        0.75

    References:
        Kendall, Gal, Cipolla: Multi-task learning using uncertainty to weigh losses for scene geometry and semantics.
        CVPR 2018.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.log_variances = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Losses by objective → scalar."""
        values = torch.stack([losses[name] for name in self.names])
        return ((-self.log_variances).exp() * values + self.log_variances / 2).sum()

    def weights(self) -> dict[str, Tensor]:
        """Returns what each loss counts now."""
        return dict(zip(self.names, (-self.log_variances.detach()).exp(), strict=True))
