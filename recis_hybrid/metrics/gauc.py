"""GAUC: the mean AUC of groups of rows, such as the rows of each user."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid.metrics._checks import check_rows, check_shapes, on_host, undefined
from recis_hybrid.metrics._metric import GroupedLabels
from recis_hybrid.metrics._sorted import Sorted

Average: TypeAlias = Literal["groups", "rows", "positives"]


def gauc(
    labels: Tensor, scores: Tensor, groups: Tensor, weights: Tensor | None = None, *, average: Average = "groups"
) -> float:
    r"""Return the mean AUC of the groups that have both classes.

    .. math:: \frac{\sum_g a_g \mathrm{AUC}_g}{\sum_g a_g}

    Args:
        labels: ``[N]``, 0 or 1, any dtype.
        scores: ``[N]``, floating; higher means more likely positive.
        groups: int64 ``[N]``, the group of each row.
        weights: ``[N]``, non-negative; None means 1 for all rows.
        average: Weight a_g of a group: 1 for ``"groups"``, the weight of its rows for ``"rows"`` (as in the paper), the
            weight of its positives for ``"positives"``.

    Returns:
        The GAUC; NaN, with a RuntimeWarning, if no group has both classes.

    Raises:
        ValueError: If shapes differ, a label is not 0 or 1, a score is NaN, a weight is negative or not finite, or
            ``average`` is none of these.

    Example:
        >>> labels, groups = torch.tensor([1, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 1])
        >>> gauc(labels, torch.tensor([0.6, 0.4, 0.55, 0.45, 0.5]), groups)
        0.75

    References:
        Zhou et al.: Deep interest network for click-through rate prediction. KDD 2018.
    """
    return _gauc("gauc", labels, scores, groups, weights, average)


class GAUC(GroupedLabels):
    """Mean AUC of groups over batches; see :func:`gauc`.

    Args:
        average: Weight of a group: 1 for ``"groups"``, the weight of its rows for ``"rows"``, the weight of its
            positives for ``"positives"``.
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.

    Raises:
        ValueError: If ``average`` is none of these.

    Example:
        >>> metric = GAUC()
        >>> metric.update(torch.tensor([0.3, 0.9, 0.4]), torch.tensor([0, 1, 1]), torch.tensor([7, 7, 8]))
        >>> metric.compute()
        1.0
    """

    def __init__(
        self, average: Average = "groups", *, process_group: dist.ProcessGroup | None = None, sync: bool = True
    ) -> None:
        super().__init__(process_group=process_group, sync=sync)
        self._average = _check_average("GAUC", average)

    def _settings(self) -> dict[str, object]:
        return {"average": repr(self._average)}

    def compute(self) -> float:
        """Return the GAUC over the rows of all ranks since the last reset; NaN if no group has both classes."""
        rows = self.seen()
        return _gauc("GAUC", rows["labels"], rows["scores"], rows["groups"], rows["weights"], self._average)


def _check_average(where: str, average: Average) -> Average:
    if average not in get_args(Average):
        raise ValueError(f"{where}: average must be one of {list(get_args(Average))}, got {average!r}")
    return average


def _gauc(
    where: str, labels: Tensor, scores: Tensor, groups: Tensor, weights: Tensor | None, average: Average
) -> float:
    _check_average(where, average)
    check_shapes(where, labels, scores, groups=groups)
    labels, scores, groups, *rest = on_host(labels, scores, groups, weights)
    labels, scores, weights = check_rows(where, labels, scores, rest[0] if rest else None)
    if not len(labels):
        return undefined(where, "there are no rows")
    rows = Sorted.of(groups, scores)
    weights, labels = weights[rows.order], labels[rows.order]
    positive, negative = (rows.by_tie(torch.where(of_class, weights, 0.0)) for of_class in (labels, ~labels))
    positives, negatives = rows.by_group(positive), rows.by_group(negative)
    # The negatives below a run are those of its group, except those before and in the run.
    running = negative.cumsum(0)
    before_group = torch.cat([running.new_zeros(1), running])[_first_of_group(rows)]
    below = negatives[rows.tie_group] - (running - before_group[rows.tie_group])
    shares = rows.by_group(positive * (below + negative / 2))
    usable = (positives > 0) & (negatives > 0)
    if not bool(usable.any()):
        return undefined(where, f"none of {rows.groups} groups have both classes; evaluate on more rows per group")
    aucs = shares[usable] / (positives[usable] * negatives[usable])
    counts = {"groups": torch.ones_like(aucs), "rows": (positives + negatives)[usable], "positives": positives[usable]}
    return float((aucs * counts[average]).sum() / counts[average].sum())


def _first_of_group(rows: Sorted) -> Tensor:
    """Return the first run of each group, int64 ``[G]``."""
    runs = torch.bincount(rows.tie_group)
    return runs.cumsum(0) - runs
