"""Callbacks that follow a metric of an evaluation: early stopping, and schedules that wait for it to stand still."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch.optim.lr_scheduler import ReduceLROnPlateau

from recis_hybrid.pipelines.arguments import described, refuse_no_count, refuse_no_number, refuse_other_than
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.stages import Evaluate

if TYPE_CHECKING:
    from recis_hybrid.pipelines.stages import Stage
    from recis_hybrid.pipelines.trainer import Trainer


class _OnMetric(Callback):
    def __init__(self, metric: str) -> None:
        refuse_other_than(type(self).__name__, "metric", metric, str, "STAGE/METRIC, as 'eval/auc'")
        stage, _, name = metric.partition("/")
        if not name:
            raise ValueError(f"{type(self).__name__}: metric must be STAGE/METRIC, as 'eval/auc', got {metric!r}")
        self.metric = metric
        self._stage, self._name = stage, name

    def after_stage(self, trainer: Trainer, stage: Stage) -> None:
        """Look at the metric after the evaluation that it is of."""
        if not isinstance(stage, Evaluate) or stage.name != self._stage:
            return
        figures = trainer.figures[stage.name]
        if self._name not in figures:
            raise KeyError(f"there is no metric {self._name!r} of {stage.name!r}, there are {sorted(figures)}")
        self.seen(trainer, figures[self._name])

    def seen(self, trainer: Trainer, value: float) -> None:
        """Is called with each new value."""


class EarlyStop(_OnMetric):
    """Stops the training when a metric has not improved for a number of evaluations; NaN is no improvement.

    Args:
        metric: Of which evaluation and which one, ``eval/auc``.
        mode: Whether the greatest or the least is best.
        patience: After how many evaluations in a row without an improvement.
        min_delta: By how much a value must be better than the best to count.

    Raises:
        ValueError: If mode or patience are out of range, or metric names no stage.
    """

    def __init__(
        self, metric: str, *, mode: Literal["max", "min"] = "max", patience: int = 2, min_delta: float = 0.0
    ) -> None:
        super().__init__(metric)
        refuse_no_count("EarlyStop", "patience", patience)
        refuse_no_number("EarlyStop", "min_delta", min_delta)
        if mode not in ("max", "min"):
            raise ValueError(f"EarlyStop: mode must be 'max', of a metric that is to grow, or 'min', got {mode!r}")
        self._sign = 1.0 if mode == "max" else -1.0
        self._patience, self._min_delta = patience, min_delta
        self.best = math.nan
        """The best value so far; NaN before the first."""
        self.bad = 0
        """Evaluations since then."""

    def seen(self, trainer: Trainer, value: float) -> None:
        """Counts, and stops."""
        gain = self._sign * (value - self.best)
        if gain > self._min_delta or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.bad = value, 0
            return
        self.bad += 1
        self.before_fit(trainer)

    def before_fit(self, trainer: Trainer) -> None:
        """Stop a run that is resumed after it was stopped."""
        if self.bad >= self._patience:
            trainer.stop(f"{self.metric} has not been better than {self.best:.6g} for {self.bad} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the evaluations since."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.best, self.bad = state["best"], state["bad"]


class PlateauSchedule(_OnMetric):
    """Steps torch's ReduceLROnPlateau schedules by a metric.

    Args:
        metric: Of which evaluation and which one, ``eval/auc``.
        schedules: One for each optimizer; give each the ``mode`` of the metric.

    Raises:
        TypeError: If a schedule is another one.
        ValueError: If metric names no stage.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
        >>> callback = PlateauSchedule("eval/auc", [plateau])  # for Trainer(callbacks=[...])
    """

    def __init__(self, metric: str, schedules: Sequence[ReduceLROnPlateau]) -> None:
        super().__init__(metric)
        if isinstance(schedules, type) or not isinstance(schedules, Iterable):
            raise TypeError(
                f"PlateauSchedule: schedules must be a sequence of ReduceLROnPlateau, got {described(schedules)}; "
                f"put it into a list"
            )
        self._schedules = list(schedules)
        for number, schedule in enumerate(self._schedules):
            refuse_other_than(
                "PlateauSchedule",
                f"schedules[{number}]",
                schedule,
                ReduceLROnPlateau,
                "a torch.optim.lr_scheduler.ReduceLROnPlateau; others step with updates, TorchStep(schedules=[...])",
            )

    def seen(self, trainer: Trainer, value: float) -> None:
        """Step the schedules."""
        for schedule in self._schedules:
            schedule.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each schedule."""
        return {"schedules": [schedule.state_dict() for schedule in self._schedules]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for schedule, saved in zip(self._schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
