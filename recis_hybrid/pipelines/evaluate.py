"""evaluate: metrics of a step's predictions on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.arguments import check_batch, check_batches, check_step
from recis_hybrid.pipelines.interruption import Interruption
from recis_hybrid.pipelines.lockstep import in_lockstep
from recis_hybrid.pipelines.steps.metrics import Metrics, by_objective, check_metrics, empty_copy, update_metric
from recis_hybrid.pipelines.steps.step import Step
from recis_hybrid.ragged import Batch
from recis_hybrid.validation import describe_value


def evaluate(
    step: Step,
    data: Iterable[Batch],
    metrics: Metrics,
    *,
    transforms: Sequence[Callable[[Batch], Batch]] = (),
    interruption: Interruption | None = None,
) -> dict[str, float]:
    """Compute metrics of a step's predictions. Tables insert no rows.

    All ranks call this together, each with its own batches. Every row counts once: ranks that run out of batches
    continue with empty ones.

    Args:
        step: Makes the predictions. Its model stays in evaluation mode until the next training step.
        data: Batches.
        metrics: By name, for every objective; or by objective and name. They are not modified.
        transforms: Applied in order to each batch before the step.
        interruption: Interruption of the surrounding training. A signal ends the evaluation between two batches.

    Returns:
        The value of each metric by name; by ``OBJECTIVE.NAME`` if there are several objectives.

    Raises:
        TypeError: ``metrics`` is not a mapping of metrics.
        ValueError: A rank has no batch, metrics belong to an unknown objective, the groups of a grouped metric are
            missing, or labels are missing or do not fit a metric.
    """
    check_step("evaluate", "step", step)
    check_batches("evaluate", "data", data)
    check_metrics("evaluate", metrics)
    if not isinstance(transforms, Iterable):
        raise TypeError(f"evaluate: transforms must be a sequence of functions, got {describe_value(transforms)}")
    transforms = list(transforms)
    updated: dict[str, dict[str, Metric]] | None = None
    for batch in in_lockstep(data, interruption):
        check_batch("evaluate", batch)
        for transform in transforms:
            batch = transform(batch)
        predictions = step.predict(batch)
        if updated is None:
            nested = by_objective(metrics, list(predictions))
            updated = {objective: {name: empty_copy(m) for name, m in of.items()} for objective, of in nested.items()}
        for objective, by_name in updated.items():
            for name, metric in by_name.items():
                update_metric(name, metric, predictions[objective])
    if updated is None:
        raise ValueError("evaluate: the data yielded no batch")
    several = len(updated) > 1 or "" not in updated
    return {
        f"{objective}.{name}" if several else name: float(metric.compute())
        for objective, by_name in updated.items()
        for name, metric in by_name.items()
    }
