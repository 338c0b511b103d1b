"""evaluate: metrics of a step's predictions on a data set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.interruption import Interruption
from recis_hybrid.pipelines.step import Scored, Step
from recis_hybrid.pipelines.turns import in_turns
from recis_hybrid.ragged import Batch

Metrics: TypeAlias = "Mapping[str, Metric] | Mapping[str, Mapping[str, Metric]]"
"""By name, for each objective; or by objective and name."""


def evaluate(
    step: Step,
    data: Iterable[Batch],
    metrics: Metrics,
    *,
    transforms: Sequence[Callable[[Batch], Batch]] = (),
    interruption: Interruption | None = None,
) -> dict[str, float]:
    """Feeds a step's predictions to metrics; tables insert nothing.

    All ranks call it together, each with batches of its own: every row counts once, also where a rank has more batches
    than others, who go on with empty ones.

    Args:
        step: Predicts. A model that it trains is left in evaluation mode, until the next training step.
        data: Batches.
        metrics: By name, for each objective; or by objective and name. They are left as they are.
        transforms: Made of each batch before the step, one after another.
        interruption: Of the training that it belongs to: a signal ends it between two batches.

    Returns:
        By name the value of each metric; by ``OBJECTIVE.NAME`` where there are several objectives.

    Raises:
        ValueError: If there is no batch, on any rank or on one of several, metrics are of an objective that there is
            not, or a metric by group finds no groups.
    """
    used: dict[str, dict[str, Metric]] | None = None
    for batch in in_turns(data, interruption):
        for transform in transforms:
            batch = transform(batch)
        scored = step.predict(batch)
        if used is None:
            used = _by_objective(metrics, list(scored))
        for objective, by_name in used.items():
            for name, metric in by_name.items():
                _update(name, metric, scored[objective])
    if used is None:
        raise ValueError("evaluate: the data gave no batch")
    several = len(used) > 1 or "" not in used
    return {
        f"{objective}.{name}" if several else name: float(metric.compute())
        for objective, by_name in used.items()
        for name, metric in by_name.items()
    }


def _by_objective(metrics: Metrics, objectives: list[str]) -> dict[str, dict[str, Metric]]:
    """Returns an accumulator of its own for each objective and name."""
    nested = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    if nested and len(nested) < len(metrics):
        raise ValueError("evaluate: give metrics by name, or by objective and name, not mixed")
    by_objective: dict[str, Any] = nested or {objective: metrics for objective in objectives}
    if unknown := sorted(set(by_objective) - set(objectives)):
        raise ValueError(f"evaluate: there are metrics of {unknown}, and the objectives are {objectives}")
    return {objective: {name: _empty(metric) for name, metric in of.items()} for objective, of in by_objective.items()}


def _empty(metric: Metric) -> Metric:
    fresh = copy.copy(metric)
    fresh.reset()
    return fresh


def _update(name: str, metric: Any, scored: Scored) -> None:
    if not metric.takes_groups:
        metric.update(scored.scores, scored.labels)
    elif scored.groups is None:
        raise ValueError(f"evaluate: the metric {name!r} is by group; say which column has groups, TorchStep(groups=)")
    else:
        metric.update(scored.scores, scored.labels, scored.groups)
