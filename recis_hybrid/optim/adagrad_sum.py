"""Adagrad with the squares of each rank's gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_positive


class AdagradSum(SparseOptimizer):
    r"""Adagrad that adds up the squared gradients of the ranks, not the square of their sum.

    .. math::
        s \leftarrow s + \sum_r g_r^2,\;
        w \leftarrow w - \frac{\eta}{1 + (t - 1) \eta'} \frac{\sum_r g_r}{\sqrt{s} + \epsilon}

    :math:`g_r` is the gradient that rank r sends for the row, summed over its batch: build the engine with
    ``reduce="sum"``, or it is weighted by the rank's share of the samples. t counts the steps of the table. A table
    that ranks do not share is updated as by :class:`Adagrad`. In a shared one, several lookups in one step count
    separately, and ``clip_row_norm_`` and ``clip_grad_norm_`` add up the gradients of the ranks first, so that their
    sum is squared.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        eps: Added to the square root.
        lr_decay: Decay η' of the learning rate.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is negative, or rows have no ``sum``.

    References:
        ``SparseAdagradSum`` of RecIS (https://github.com/alibaba/RecIS), with its ``grad_reduce_by="worker_sum"``.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, eps: float = 1e-10, lr_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "lr_decay": lr_decay})

    @staticmethod
    def row_state(initial_accumulator_value: float = 0.0) -> tuple[StateField, ...]:
        """Return the state of a row: ``sum``, starting at ``initial_accumulator_value``."""
        check_positive("AdagradSum", initial_accumulator_value=initial_accumulator_value)
        return (StateField("sum", first_value=initial_accumulator_value),)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_positive("AdagradSum", lr=group["lr"], eps=group["eps"], lr_decay=group["lr_decay"])

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        # The sources of a shared row are the sums of ranks; those of another row are positions of the batch.
        kind = "adagrad" if table.remote is None else "adagrad_sum"
        return rule_of(table, kind, ["sum"], group["lr"], group["lr_decay"], 0.0, group["eps"])
