"""Lion on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_betas, check_positive


class Lion(SparseOptimizer):
    r"""Lion for the rows that have gradients: the sign of a momentum, with one moment of state.

    .. math::
        w \leftarrow (1 - \eta \lambda) w - \eta \operatorname{sign}(\beta_1 m + (1 - \beta_1) g),\;
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    The sign of 0 is 0. While a row has no gradient, its moment and weights do not change.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η, typically 3 to 10 times smaller than Adam's.
        betas: β₁ and β₂, in [0, 1).
        weight_decay: λ, decoupled.
        exact: True for the results of an optimizer that changes every row in every step; see the guide to training.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg``.

    References:
        Chen et al.: Symbolic discovery of optimization algorithms. NeurIPS 2023.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        exact: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "exact": exact})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: ``exp_avg``."""
        return (StateField("exp_avg"),)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas("Lion", group["betas"])
        check_positive("Lion", lr=group["lr"], weight_decay=group["weight_decay"])

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        return rule_of(table, "lion", ["exp_avg"], group["lr"], *group["betas"], group["weight_decay"])
