"""Callbacks that monitor a metric of an evaluation: early stopping and learning-rate reduction on a plateau."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch.optim.lr_scheduler import ReduceLROnPlateau

from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.stages import Evaluate, Run, Stage
from recis_hybrid.validation import check_choice, check_integer, check_number, check_type, describe_value


class _OnMetric(Callback):
    def __init__(self, metric: str) -> None:
        check_type(type(self).__name__, "metric", metric, str, "STAGE/METRIC, such as 'eval/auc'")
        stage, _, name = metric.partition("/")
        if not name:
            raise ValueError(f"{type(self).__name__}: metric must be STAGE/METRIC, such as 'eval/auc', got {metric!r}")
        self.metric = metric
        self._stage, self._name = stage, name

    def after_stage(self, trainer: Run, stage: Stage) -> None:
        """Call :meth:`on_metric` after the metric's evaluation."""
        if not isinstance(stage, Evaluate) or stage.name != self._stage:
            return
        figures = trainer.figures[stage.name]
        if self._name not in figures:
            raise KeyError(f"{stage.name!r} has no metric {self._name!r}, it has {sorted(figures)}")
        self.on_metric(trainer, figures[self._name])

    def on_metric(self, trainer: Run, value: float) -> None:
        """Run with each new value."""


class EarlyStop(_OnMetric):
    """Stops the training when a metric has not improved for a number of evaluations. NaN is no improvement.

    Args:
        metric: Names of the evaluation and the metric, such as ``eval/auc``.
        mode: Whether larger or smaller values are better.
        patience: Number of consecutive evaluations without an improvement after which the training stops.
        min_delta: An improvement must exceed this difference.

    Raises:
        ValueError: An argument is out of range, or ``metric`` names no stage.
    """

    def __init__(
        self, metric: str, *, mode: Literal["max", "min"] = "max", patience: int = 2, min_delta: float = 0.0
    ) -> None:
        super().__init__(metric)
        check_integer("EarlyStop", "patience", patience, low=1)
        check_number("EarlyStop", "min_delta", min_delta)
        check_choice("EarlyStop", "mode", mode, ("max", "min"))
        self._sign = 1.0 if mode == "max" else -1.0
        self._patience, self._min_delta = patience, min_delta
        self.best = math.nan
        """Best value so far; NaN before the first."""
        self.bad = 0
        """Evaluations since the best one."""

    def on_metric(self, trainer: Run, value: float) -> None:
        """Count evaluations without an improvement and stop after too many."""
        gain = self._sign * (value - self.best)
        if gain > self._min_delta or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.bad = value, 0
            return
        self.bad += 1
        self.before_fit(trainer)

    def before_fit(self, trainer: Run) -> None:
        """Stop a resumed run that this callback had already stopped."""
        if self.bad >= self._patience:
            trainer.stop(f"{self.metric} has not improved on {self.best:.6g} for {self.bad} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the number of evaluations since."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.best, self.bad = state["best"], state["bad"]


class PlateauSchedule(_OnMetric):
    """Steps torch's ReduceLROnPlateau schedules with a metric.

    Args:
        metric: Names of the evaluation and the metric, such as ``eval/auc``.
        schedules: One per optimizer, built with the ``mode`` that fits the metric.

    Raises:
        TypeError: An item is not a ReduceLROnPlateau.
        ValueError: ``metric`` names no stage.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        >>> callback = PlateauSchedule("eval/auc", [plateau])  # for Trainer(callbacks=[...])
    """

    def __init__(self, metric: str, schedules: Sequence[ReduceLROnPlateau]) -> None:
        super().__init__(metric)
        if isinstance(schedules, type) or not isinstance(schedules, Iterable):
            raise TypeError(
                f"PlateauSchedule: schedules must be a sequence of ReduceLROnPlateau, got {describe_value(schedules)}; "
                f"put it into a list"
            )
        self._schedules = list(schedules)
        for number, schedule in enumerate(self._schedules):
            check_type(
                "PlateauSchedule",
                f"schedules[{number}]",
                schedule,
                ReduceLROnPlateau,
                "a torch.optim.lr_scheduler.ReduceLROnPlateau (pass others to TorchStep(schedules=[...]))",
            )

    def on_metric(self, trainer: Run, value: float) -> None:
        """Step the schedules."""
        for schedule in self._schedules:
            schedule.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each schedule."""
        return {"schedules": [schedule.state_dict() for schedule in self._schedules]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        for schedule, saved in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
