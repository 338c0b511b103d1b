"""Adam on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_betas, check_positive
from recis_hybrid.optim.moments.adam_like import MOMENTS


class Adam(SparseOptimizer):
    r"""Adam for the rows that have gradients, equivalent to ``torch.optim.SparseAdam``.

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m),\; v \leftarrow v + (1 - \beta_2)(g^2 - v),\;
        w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt{v} + \epsilon}

    The moments of a row do not change while it has no gradient. t counts the steps of its table. ``torch.optim.Adam``
    adds ε after the bias correction of v, as :class:`AdamL2` does.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the square root.
        exact: True for the results of an optimizer that changes every row in every step; see the guide to training.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg`` and ``exp_avg_sq``.

    References:
        Kingma, Ba: Adam: a method for stochastic optimization. ICLR 2015.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        exact: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "exact": exact})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: ``exp_avg`` and ``exp_avg_sq``."""
        return MOMENTS

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas("Adam", group["betas"])
        check_positive("Adam", lr=group["lr"], eps=group["eps"])

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        return rule_of(table, "adam", ["exp_avg", "exp_avg_sq"], group["lr"], *group["betas"], group["eps"])
