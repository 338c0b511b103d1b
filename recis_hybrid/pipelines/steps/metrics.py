"""Metrics of predictions, by objective and name."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.metrics_record import is_reserved
from recis_hybrid.pipelines.steps.model_outputs import squeeze_column
from recis_hybrid.pipelines.steps.objective import Objective
from recis_hybrid.pipelines.steps.step import Predictions
from recis_hybrid.validation import check_type, describe_value

Metrics: TypeAlias = "Mapping[str, Metric] | Mapping[str, Mapping[str, Metric]]"
"""Metrics by name, for every objective; or by objective and name."""


def check_metrics(where: str, metrics: object) -> None:
    """Check that metrics are a mapping by name, or by objective and name.

    Raises:
        TypeError: They have another type.
        ValueError: Some are by name and others by objective.
    """
    expected = "a mapping of metrics by name, such as {'auc': AUC()}, or by objective and name"
    if not isinstance(metrics, Mapping):
        hint = "; name it" if isinstance(metrics, Metric) else ""
        raise TypeError(f"{where}: metrics must be {expected}, got {describe_value(metrics)}{hint}")
    nested = [name for name, value in metrics.items() if isinstance(value, Mapping)]
    if nested and len(nested) < len(metrics):
        raise ValueError(
            f"{where}: metrics must be all by name or all by objective and name, got both: only {nested} are mappings"
        )
    for name, value in metrics.items():
        for inner, metric in value.items() if isinstance(value, Mapping) else [(name, value)]:
            check_type(where, f"the metric {inner!r}", metric, Metric, "a metric, such as AUC()")


def by_objective(
    metrics: Metrics,
    objectives: Sequence[str],
    *,
    where: str = "evaluate",
    others: Literal["raise", "ignore"] = "raise",
) -> dict[str, dict[str, Metric]]:
    """Return metrics by objective and name.

    Args:
        metrics: By name, of which each objective gets empty copies; or by objective and name.
        objectives: Names of the objectives.
        where: The caller, for messages.
        others: Whether metrics of unknown objectives raise or are ignored.

    Raises:
        TypeError: The argument is not a mapping of metrics.
        ValueError: The two forms are mixed, or metrics belong to an unknown objective.
    """
    check_metrics(where, metrics)
    nested: dict[str, Any] = {name: value for name, value in metrics.items() if isinstance(value, Mapping)}
    if not nested and len(objectives) > 1:
        return {objective: {name: empty_copy(metric) for name, metric in metrics.items()} for objective in objectives}  # type: ignore[arg-type]
    nested = nested or {objective: dict(metrics) for objective in objectives}
    unknown = sorted(set(nested) - set(objectives))
    if unknown and others == "raise":
        raise ValueError(f"{where}: there are metrics of {unknown}, but the objectives are {list(objectives)}")
    return {objective: dict(by_name) for objective, by_name in nested.items() if objective not in unknown}


def training_metrics(
    where: str, metrics: Metrics | None, objectives: Mapping[str, Objective]
) -> dict[str, dict[str, Metric]]:
    """Return the metrics that a step updates while it trains, by objective and name.

    Args:
        where: The caller, for messages.
        metrics: By name, for every objective; or by objective and name.
        objectives: The step's objectives.

    Raises:
        TypeError: The argument is not a mapping of metrics.
        ValueError: The log uses the name of a metric itself, or the metric's objective has no labels or groups.
    """
    nested = by_objective(metrics, list(objectives), where=where) if metrics else {}
    for objective, by_name in nested.items():
        for name, metric in by_name.items():
            if is_reserved(name):
                raise ValueError(f"{where}: the log uses {name!r} itself; give the metric another name")
            if objectives[objective].label is None:
                raise ValueError(f"{where}: the metric {name!r} needs labels; set label= to their column")
            if metric.takes_groups and objectives[objective].groups is None:
                raise ValueError(f"{where}: the metric {name!r} needs groups; set groups= to their column")
    return nested


def try_metrics(metrics: Mapping[str, Metric], predictions: Predictions) -> None:
    """Update copies of metrics with predictions to check that they fit; no collectives.

    Raises:
        ValueError: A metric does not accept the shapes or dtypes.
    """
    for name, metric in metrics.items():
        groups = predictions.groups
        if metric.takes_groups and groups is None:  # perhaps only evaluation data has groups
            groups = torch.zeros(len(predictions.scores), dtype=torch.int64, device=predictions.scores.device)
        update_metric(name, empty_copy(metric), Predictions(predictions.scores, predictions.labels, groups))


def empty_copy(metric: Metric) -> Metric:
    """Return a copy of a metric without its state."""
    result = copy.copy(metric)
    result.reset()
    return result


def update_metric(name: str, metric: Any, predictions: Predictions) -> None:
    """Add predictions to a metric.

    Args:
        name: Name of the metric, for messages.
        metric: Updated in place.
        predictions: The predictions.

    Raises:
        ValueError: Labels or groups are missing, or the metric does not accept the shapes or dtypes.
    """
    if predictions.labels is None:
        raise ValueError(f"evaluate: the metric {name!r} needs labels; set TorchStep(label=) to their column")
    if metric.takes_groups and predictions.groups is None:
        raise ValueError(f"evaluate: the metric {name!r} needs groups; set TorchStep(groups=) to their column")
    scores, labels = squeeze_column(predictions.scores), squeeze_column(predictions.labels)
    try:
        if metric.takes_groups and predictions.groups is not None:
            metric.update(scores, labels, squeeze_column(predictions.groups))
        else:
            metric.update(scores, labels)
    except ValueError as error:
        if scores.dim() == 1 and labels.dim() == 1:
            raise
        raise ValueError(
            f"evaluate: the metric {name!r} cannot take scores {list(predictions.scores.shape)} and labels "
            f"{list(predictions.labels.shape)}: {error}. Reduce the outputs to one score per row with Objective(link=) "
            f"and use one objective per column of labels"
        ) from error
