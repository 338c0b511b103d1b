"""LrSchedule: a learning rate by a function of the step, as optax's schedules are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsFloat

import torch

from recis_hybrid.pipelines.arguments import refuse_no_callable, refuse_other_than


class LrSchedule:
    """Sets an optimizer's learning rate to a function of the number of updates done.

    Works on dense and sparse optimizers. A parameter group whose learning rate is another than the optimizer's own (as
    that of a table whose config sets it) keeps its ratio to it.

    Args:
        optimizer: Whose learning rate it is.
        rate: Number of updates done → learning rate; any of optax's schedules will do.

    Raises:
        TypeError: If they are of another kind.
        ValueError: If the optimizer has no learning rate.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([parameter], lr=0.1)
        >>> schedule = LrSchedule(optimizer, lambda step: 0.1 / (1 + step))
        >>> schedule.step()
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[int], SupportsFloat]) -> None:
        refuse_other_than("LrSchedule", "optimizer", optimizer, torch.optim.Optimizer, "an optimizer")
        refuse_no_callable("LrSchedule", "rate", rate, "a function from updates done to the learning rate")
        if "lr" not in optimizer.defaults:
            raise ValueError(
                f"LrSchedule: {type(optimizer).__name__} has no learning rate; optax takes schedules itself"
            )
        self._optimizer = optimizer
        self._rate = rate
        self._steps = 0
        own = optimizer.defaults["lr"]
        self._ratios = [group["lr"] / own if own else 1.0 for group in optimizer.param_groups]
        self._set()

    def step(self) -> None:
        """Count an update and set the learning rate for the next."""
        self._steps += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._steps = state_dict["steps"]
        self._set()

    def _set(self) -> None:
        rate = float(self._rate(self._steps))
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = rate * ratio
