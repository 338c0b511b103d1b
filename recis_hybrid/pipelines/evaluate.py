"""evaluate: metrics of a step's predictions on a data set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.arguments import (
    described,
    refuse_no_batch,
    refuse_no_batches,
    refuse_no_step,
    refuse_other_than,
)
from recis_hybrid.pipelines.interruption import Interruption
from recis_hybrid.pipelines.steps.model_outputs import one_a_row
from recis_hybrid.pipelines.steps.step import Metrics as Metrics, Scored, Step
from recis_hybrid.pipelines.turns import in_turns
from recis_hybrid.ragged import Batch


def evaluate(
    step: Step,
    data: Iterable[Batch],
    metrics: Metrics,
    *,
    transforms: Sequence[Callable[[Batch], Batch]] = (),
    interruption: Interruption | None = None,
) -> dict[str, float]:
    """Feed a step's predictions to metrics; tables insert nothing.

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
        TypeError: If metrics are no mapping of metrics.
        ValueError: If there is no batch, on any rank or on one of several, metrics are of an objective that there is
            not, a metric by group finds no groups, or there are no labels, or none that a metric takes.
    """
    refuse_no_step("evaluate", "step", step)
    refuse_no_batches("evaluate", "data", data)
    refuse_no_metrics("evaluate", metrics)
    if not isinstance(transforms, Iterable):
        raise TypeError(f"evaluate: transforms must be a sequence of functions, got {described(transforms)}")
    transforms = list(transforms)
    used: dict[str, dict[str, Metric]] | None = None
    for batch in in_turns(data, interruption):
        refuse_no_batch("evaluate", batch)
        for transform in transforms:
            batch = transform(batch)
        scored = step.predict(batch)
        if used is None:
            used = by_objective(metrics, list(scored))
            used = {objective: {name: _empty(metric) for name, metric in of.items()} for objective, of in used.items()}
        for objective, by_name in used.items():
            for name, metric in by_name.items():
                update(name, metric, scored[objective])
    if used is None:
        raise ValueError("evaluate: the data gave no batch")
    several = len(used) > 1 or "" not in used
    return {
        f"{objective}.{name}" if several else name: float(metric.compute())
        for objective, by_name in used.items()
        for name, metric in by_name.items()
    }


def by_objective(
    metrics: Metrics,
    objectives: Sequence[str],
    *,
    where: str = "evaluate",
    others: Literal["refuse", "ignore"] = "refuse",
) -> dict[str, dict[str, Metric]]:
    """Return metrics by objective and name.

    Args:
        metrics: By name, for each objective, which then gets copies without a past; or by objective and name.
        objectives: The objectives that there are.
        where: For messages.
        others: What to do with metrics of other objectives.

    Raises:
        TypeError: They are no mapping of metrics.
        ValueError: They are mixed, or of an objective that there is not.
    """
    refuse_no_metrics(where, metrics)
    nested: dict[str, Any] = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    if not nested and len(objectives) > 1:
        return {objective: {name: _empty(metric) for name, metric in metrics.items()} for objective in objectives}  # type: ignore[arg-type]
    nested = nested or {objective: dict(metrics) for objective in objectives}
    unknown = sorted(set(nested) - set(objectives))
    if unknown and others == "refuse":
        raise ValueError(f"{where}: there are metrics of {unknown}, and the objectives are {list(objectives)}")
    return {objective: dict(of) for objective, of in nested.items() if objective not in unknown}


def refuse_no_metrics(where: str, metrics: object) -> None:
    """Check that metrics are given by name, or by objective and name.

    Raises:
        TypeError: They are not; the message names what was expected.
        ValueError: Some are by name and others by objective.
    """
    expected = "a mapping of metrics by name, as {'auc': AUC()}, or by objective and name"
    if not isinstance(metrics, Mapping):
        hint = "; name it" if isinstance(metrics, Metric) else ""
        raise TypeError(f"{where}: metrics must be {expected}, got {described(metrics)}{hint}")
    nested = [name for name, value in metrics.items() if isinstance(value, Mapping)]
    if nested and len(nested) < len(metrics):
        raise ValueError(f"{where}: give metrics by name, or by objective and name, not mixed")
    for name, value in metrics.items():
        for inner, metric in value.items() if isinstance(value, Mapping) else [(name, value)]:
            refuse_other_than(where, f"the metric {inner!r}", metric, Metric, "a metric, as AUC()")


def rehearse(metrics: Mapping[str, Metric], scored: Scored) -> None:
    """Try metrics on predictions, without collectives; the metrics stay unchanged.

    Raises:
        ValueError: A metric does not take the shapes or dtypes.
    """
    for name, metric in metrics.items():
        groups = scored.groups
        if metric.takes_groups and groups is None:  # which may be in the data of evaluations alone
            groups = torch.zeros(len(scored.scores), dtype=torch.int64, device=scored.scores.device)
        update(name, _empty(metric), Scored(scored.scores, scored.labels, groups))


def _empty(metric: Metric) -> Metric:
    fresh = copy.copy(metric)
    fresh.reset()
    return fresh


def update(name: str, metric: Any, scored: Scored) -> None:
    """Add predictions to a metric.

    Args:
        name: Of the metric, for messages.
        metric: Updated in place.
        scored: The predictions.

    Raises:
        ValueError: There are no labels, or no groups, or the metric does not take the shapes or dtypes.
    """
    if scored.labels is None:
        raise ValueError(f"evaluate: the metric {name!r} needs labels; say which column has them, TorchStep(label=)")
    if metric.takes_groups and scored.groups is None:
        raise ValueError(f"evaluate: the metric {name!r} is by group; say which column has groups, TorchStep(groups=)")
    scores, labels = one_a_row(scored.scores), one_a_row(scored.labels)
    try:
        if metric.takes_groups and scored.groups is not None:
            metric.update(scores, labels, one_a_row(scored.groups))
        else:
            metric.update(scores, labels)
    except ValueError as error:
        if scores.dim() == 1 and labels.dim() == 1:
            raise
        raise ValueError(
            f"evaluate: the metric {name!r} cannot take scores {list(scored.scores.shape)} and labels "
            f"{list(scored.labels.shape)}: {error}. Make a score and a label of each row, by Objective(link=) of the "
            f"outputs and by an objective for each column of labels"
        ) from error
