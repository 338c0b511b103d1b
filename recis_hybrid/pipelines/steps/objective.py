"""Objectives: losses by name, and what they weigh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from recis_hybrid.pipelines.arguments import described, refuse_no_callable, refuse_no_name, refuse_no_number

Loss: TypeAlias = Callable[..., Tensor]
"""(outputs, labels) → scalar; outputs alone where there are no labels."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One thing that a model is trained for.

    Example:
        >>> bce = torch.nn.functional.binary_cross_entropy_with_logits
        >>> Objective(loss=bce, label="bought", weight=lambda step: min(1.0, step / 1000)).label
        'bought'
    """

    loss: Loss | None
    """(outputs, labels) → scalar, of the outputs in float32; None where the model returns its own loss."""
    label: str | None = "label"
    """The column of labels; None: the loss takes the outputs alone."""
    weight: float | Callable[[int], float] = 1.0
    """What the loss counts in the sum: fixed, or by a function of the number of updates done."""
    link: Callable[[Any], Tensor] | None = None
    """Outputs → scores ``[B]`` that metrics take. None: a sigmoid; but outputs as they are where the loss is one of
    torch's for numbers or probabilities, as ``mse_loss`` or ``binary_cross_entropy``."""
    groups: str | None = None
    """The column that says which group a row belongs to, int64 ``[B]``, for metrics by group."""

    def __post_init__(self) -> None:
        if self.loss is not None:
            refuse_no_callable("Objective", "loss", self.loss, "a function (outputs, labels) → scalar")
        refuse_no_name("Objective", "label", self.label)
        refuse_no_name("Objective", "groups", self.groups)
        if self.link is not None:
            refuse_no_callable("Objective", "link", self.link, "a function of the outputs, as torch.sigmoid")
        if not callable(self.weight):
            refuse_no_number("Objective", "weight", self.weight)

    def weight_at(self, update: int) -> float:
        """Return what the loss counts in an update.

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
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise TypeError(f"UncertaintyWeights: names must be a sequence of names, got {described(names)}")
        self.names = list(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"UncertaintyWeights: names must be distinct, and one at least, got {self.names}")
        self.log_variances = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Losses by objective → scalar."""
        values = torch.stack([losses[name] for name in self.names])
        return ((-self.log_variances).exp() * values + self.log_variances / 2).sum()

    def weights(self) -> dict[str, Tensor]:
        """Return what each loss counts now."""
        return dict(zip(self.names, (-self.log_variances.detach()).exp(), strict=True))
