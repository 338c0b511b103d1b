"""Objectives: named losses and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from recis_hybrid.pipelines.arguments import check_callable, check_column_name
from recis_hybrid.pipelines.steps.trainable import parameters_of
from recis_hybrid.validation import check_number, check_type, describe_value

Loss: TypeAlias = Callable[..., Tensor]
"""(outputs, labels) → scalar; outputs → scalar without labels."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One training objective of a model.

    Example:
        >>> bce = torch.nn.functional.binary_cross_entropy_with_logits
        >>> Objective(loss=bce, label="bought", weight=lambda step: min(1.0, step / 1000)).label
        'bought'
    """

    loss: Loss | None
    """(outputs, labels) → scalar, with outputs in float32; None if the model returns its own loss."""
    label: str | None = "label"
    """Column of labels; None: the loss takes only the outputs."""
    weight: float | Callable[[int], float] = 1.0
    """Weight of the loss in the sum: a number, or a function of the number of completed updates."""
    link: Callable[[Any], Tensor] | None = None
    """Outputs → scores ``[B]`` for metrics. None: the outputs themselves for torch's regression losses and losses of
    probabilities, such as ``mse_loss`` or ``binary_cross_entropy``; their sigmoid for all others."""
    groups: str | None = None
    """Column of the group of each row, int64 ``[B]``, for metrics by group."""

    def __post_init__(self) -> None:
        if self.loss is not None:
            check_callable("Objective", "loss", self.loss, "a function (outputs, labels) → scalar")
        check_column_name("Objective", "label", self.label)
        check_column_name("Objective", "groups", self.groups)
        if self.link is not None:
            check_callable("Objective", "link", self.link, "a function of the outputs, such as torch.sigmoid")
        if not callable(self.weight):
            check_number("Objective", "weight", self.weight)

    def weight_at(self, update: int) -> float:
        """Return the weight of the loss in an update.

        Args:
            update: Number of updates completed before it.

        Raises:
            ValueError: The weight is not a finite number.
        """
        weight = float(self.weight(update)) if callable(self.weight) else self.weight
        if not math.isfinite(weight):
            raise ValueError(
                f"Objective: the weight of label {self.label!r} must be finite, got {weight} at update {update}"
            )
        return weight


class UncertaintyWeights(nn.Module):
    r"""Weights losses by learned uncertainties.

    .. math:: L = \sum_i e^{-s_i} L_i + \tfrac12 s_i

    with one parameter s per loss, the log variance, initially 0. Add the parameters to a dense optimizer.

    Args:
        names: Names of the objectives.

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
            raise TypeError(f"UncertaintyWeights: names must be a sequence of names, got {describe_value(names)}")
        self.names = list(names)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"UncertaintyWeights: names must be at least one distinct name, got {self.names}")
        self.log_variances = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of losses by objective, a scalar."""
        values = torch.stack([losses[name] for name in self.names])
        return ((-self.log_variances).exp() * values + self.log_variances / 2).sum()

    def weights(self) -> dict[str, Tensor]:
        """Return the current weight of each loss."""
        return dict(zip(self.names, (-self.log_variances.detach()).exp(), strict=True))


def objectives_of(where: str, loss: Any, label: str | None, groups: str | None) -> dict[str, Objective]:
    """Return a step's objectives by name. A single unnamed objective has the name ``""``.

    Args:
        where: The caller, for messages.
        loss: A function, an Objective, objectives by name, or None.
        label: Column of labels, if ``loss`` is a function or None.
        groups: Column of groups, if ``loss`` is a function or None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no objective, or a named objective has no loss.
    """
    if isinstance(loss, Mapping):
        for name, objective in loss.items():
            check_type(where, f"loss[{name!r}]", objective, Objective, "an Objective")
            if objective.loss is None and (name, len(loss)) != ("", 1):
                raise ValueError(
                    f"{where}: the objective {name!r} must have a loss, got None; only {where}(loss=None) uses the "
                    f"loss that the model returns"
                )
        if not loss:
            raise ValueError(f"{where}: loss must have at least one objective, got an empty mapping")
        return dict(loss)
    if isinstance(loss, Objective):
        return {"": loss}
    check_column_name(where, "label", label)
    check_column_name(where, "groups", groups)
    if loss is not None and (isinstance(loss, type) or not callable(loss)):
        raise TypeError(
            f"{where}: loss must be a function (outputs, labels) → scalar, such as "
            f"torch.nn.functional.binary_cross_entropy_with_logits, an Objective, objectives by name, or None if "
            f"the model returns its loss, got {describe_value(loss)}"
        )
    return {"": Objective(loss=loss, label=label, groups=groups)}


def check_weighting(
    where: str,
    weighting: UncertaintyWeights,
    optimizers: Mapping[str, torch.optim.Optimizer],
    objectives: Mapping[str, Objective],
) -> None:
    """Check that a weighting matches the objectives and is trained.

    Args:
        where: The caller, for messages.
        weighting: The argument.
        optimizers: The step's optimizers.
        objectives: The step's objectives.

    Raises:
        TypeError: The weighting is not a module.
        ValueError: Its names differ from those of the objectives, or no optimizer has its parameters.
    """
    check_type(where, "weighting", weighting, nn.Module, "UncertaintyWeights with the names of the objectives")
    trained = {id(parameter) for optimizer in optimizers.values() for parameter in parameters_of(optimizer)}
    if optimizers and any(id(parameter) not in trained for parameter in weighting.parameters()):
        raise ValueError(
            f"{where}: no optimizer has the parameters of weighting; add weighting.parameters() to a dense one"
        )
    if set(weighting.names) != set(objectives):
        raise ValueError(
            f"{where}: weighting must have the names of the objectives, {list(objectives)}, got {weighting.names}"
        )
