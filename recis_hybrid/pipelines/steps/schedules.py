"""Learning-rate schedules of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, SupportsFloat

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from recis_hybrid.pipelines.arguments import check_callable
from recis_hybrid.pipelines.steps.trainable import parameters_of
from recis_hybrid.validation import check_type, describe_value


class Scheduler(Protocol):
    """A learning-rate schedule: torch's or :class:`LrSchedule`."""

    def step(self) -> Any:
        """Set the learning rate for the next update."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Restore the state."""


class LrSchedule:
    """Sets an optimizer's learning rate to a function of the number of updates, such as an optax schedule.

    Works with dense and sparse optimizers. A parameter group whose learning rate differs from the optimizer's default,
    such as that of a table whose config sets it, keeps its ratio to the default.

    Args:
        optimizer: The optimizer.
        rate: Function from the number of completed updates to the learning rate, such as any optax schedule.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The optimizer has no learning rate.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([parameter], lr=0.1)
        >>> schedule = LrSchedule(optimizer, lambda step: 0.1 / (1 + step))
        >>> schedule.step()
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(self, optimizer: Optimizer, rate: Callable[[int], SupportsFloat]) -> None:
        check_type("LrSchedule", "optimizer", optimizer, Optimizer, "an optimizer")
        check_callable("LrSchedule", "rate", rate, "a function from completed updates to the learning rate")
        if "lr" not in optimizer.defaults:
            raise ValueError(
                f"LrSchedule: {type(optimizer).__name__} has no learning rate; pass the schedule to the optax "
                f"transformation"
            )
        self._optimizer = optimizer
        self._rate = rate
        self._steps = 0
        own = optimizer.defaults["lr"]
        self._ratios = [group["lr"] / own if own else 1.0 for group in optimizer.param_groups]
        self._set()

    def step(self) -> None:
        """Count an update and set the learning rate for the next one."""
        self._steps += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates."""
        return {"steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates and set the learning rate."""
        self._steps = state_dict["steps"]
        self._set()

    def _set(self) -> None:
        rate = float(self._rate(self._steps))
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = rate * ratio


def check_schedules(where: str, schedules: Any, optimizers: Mapping[str, Optimizer]) -> list[Scheduler]:
    """Return schedules as a list.

    Args:
        where: The caller, for messages.
        schedules: The argument.
        optimizers: The step's optimizers.

    Raises:
        TypeError: The argument is not a sequence of schedules.
        ValueError: A schedule needs a metric, or belongs to an optimizer of another step.
    """
    expected = "a sequence of schedules, such as [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]"
    if not isinstance(schedules, Iterable) or isinstance(schedules, str | Mapping):
        hint = "; put it into a list" if hasattr(schedules, "step") else ""
        raise TypeError(f"{where}: schedules must be {expected}, got {describe_value(schedules)}{hint}")
    result = list(schedules)
    own = {id(p) for optimizer in optimizers.values() for p in parameters_of(optimizer)}
    for number, schedule in enumerate(result):
        which = f"{where}: schedules[{number}]"
        if isinstance(schedule, ReduceLROnPlateau):
            raise ValueError(
                f"{which}: ReduceLROnPlateau needs a metric, which a step does not have; pass it to "
                f"Trainer(callbacks=[PlateauSchedule('eval/auc', [schedule])]), with mode='max' if larger is better"
            )
        methods = ("step", "state_dict", "load_state_dict")
        if isinstance(schedule, type | Optimizer) or not all(hasattr(schedule, m) for m in methods):
            hint = "; wrap it: LrSchedule(optimizer, function)" if callable(schedule) else ""
            raise TypeError(f"{which} must be a torch schedule or an LrSchedule, got {describe_value(schedule)}{hint}")
        optimizer = getattr(schedule, "optimizer", None)
        if isinstance(optimizer, Optimizer) and not any(id(p) in own for p in parameters_of(optimizer)):
            raise ValueError(
                f"{which} must schedule an optimizer of this step, got one of another optimizer; pass it to the step "
                f"that has the optimizer"
            )
    return result
