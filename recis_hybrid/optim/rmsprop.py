"""RMSprop on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_positive


class RMSprop(SparseOptimizer):
    r"""RMSprop; equivalent to ``torch.optim.RMSprop`` for rows that always have a gradient.

    .. math::
        u = g + \lambda w,\; v \leftarrow \alpha v + (1 - \alpha) u^2,\;
        w \leftarrow w - \eta \frac{u}{\sqrt{v} + \epsilon}

    While a row has no gradient, its state and weights do not change, not even by weight decay.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        alpha: α, in [0, 1).
        eps: Added to the square root.
        weight_decay: λ.
        exact: True for the results of an optimizer that changes every row in every step; see the guide to training.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``square_avg``.

    References:
        Tieleman, Hinton: Neural networks for machine learning, lecture 6.5: RMSprop. Coursera 2012.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        exact: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "exact": exact})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: ``square_avg``."""
        return (StateField("square_avg"),)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_positive("RMSprop", **{name: group[name] for name in ("lr", "alpha", "eps", "weight_decay")})
        if group["alpha"] >= 1:
            raise ValueError(f"RMSprop: alpha must be in [0, 1), got {group['alpha']}")

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        values = (group[name] for name in ("lr", "alpha", "eps", "weight_decay"))
        return rule_of(table, "rmsprop", ["square_avg"], *values)
