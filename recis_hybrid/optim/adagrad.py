"""Adagrad on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_positive


class Adagrad(SparseOptimizer):
    r"""Adagrad for the rows that have gradients, equivalent to ``torch.optim.Adagrad``.

    .. math::
        u = g + \lambda w,\; s \leftarrow s + u^2,\;
        w \leftarrow w - \frac{\eta}{1 + (t - 1) \eta'} \frac{u}{\sqrt{s} + \epsilon}

    While a row has no gradient, it does not change, not even by weight decay. t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        eps: Added to the square root.
        lr_decay: Decay η' of the learning rate.
        weight_decay: λ.
        exact: True for the results of an optimizer that changes every row in every step; see the guide to training.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is negative, or rows have no ``sum``.

    References:
        Duchi, Hazan, Singer: Adaptive subgradient methods for online learning and stochastic optimization. JMLR 2011.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        exact: bool = False,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "lr_decay": lr_decay, "weight_decay": weight_decay, "exact": exact}
        super().__init__(params, defaults)

    @staticmethod
    def row_state(initial_accumulator_value: float = 0.0) -> tuple[StateField, ...]:
        """Return the state of a row: ``sum``, starting at ``initial_accumulator_value``."""
        check_positive("Adagrad", initial_accumulator_value=initial_accumulator_value)
        return (StateField("sum", first_value=initial_accumulator_value),)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_positive("Adagrad", **{name: group[name] for name in ("lr", "eps", "lr_decay", "weight_decay")})

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        values = (group[name] for name in ("lr", "lr_decay", "weight_decay", "eps"))
        return rule_of(table, "adagrad", ["sum"], *values)
