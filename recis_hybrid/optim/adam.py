"""Adam on rows."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.ops.update import Gradients
from recis_hybrid.optim._base import SparseOptimizer, check_positive


class Adam(SparseOptimizer):
    r"""Adam for the rows that have gradients, equivalent to ``torch.optim.SparseAdam``.

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m),\; v \leftarrow v + (1 - \beta_2)(g^2 - v),\;
        w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt{v} + \epsilon}

    The moments of a row do not change while it has no gradient. t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the square root.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg`` and ``exp_avg_sq``.

    References:
        Kingma, Ba: Adam: a method for stochastic optimization. ICLR 2015.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: ``exp_avg`` and ``exp_avg_sq``."""
        return _MOMENTS

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        _check_betas("Adam", group["betas"])
        check_positive("Adam", lr=group["lr"], eps=group["eps"])

    @staticmethod
    def _needed(group: dict[str, Any]) -> tuple[StateField, ...]:
        return _MOMENTS

    @staticmethod
    def _rule(table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        return _adam_rule("adam", table, group)

    @staticmethod
    def _update(
        table: HashTable, records: ops.update.Table, gradients: Gradients, group: dict[str, Any], step: int
    ) -> None:
        _adam(table, records, gradients, group, step, eps=group["eps"], decay=1.0)


class AdamW(SparseOptimizer):
    r"""AdamW for the rows that have gradients; equivalent to ``torch.optim.AdamW`` for rows that always have one.

    .. math::
        w \leftarrow (1 - \eta \lambda) w,\;
        w \leftarrow w - \frac{\eta}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with the moments m and v of Adam. While a row has no gradient, its moments and weights do not change, not even by
    weight decay. t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the square root.
        weight_decay: λ.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``exp_avg`` and ``exp_avg_sq``.

    References:
        Loshchilov, Hutter: Decoupled weight decay regularization. ICLR 2019.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: ``exp_avg`` and ``exp_avg_sq``."""
        return _MOMENTS

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        _check_betas("AdamW", group["betas"])
        check_positive("AdamW", lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])

    @staticmethod
    def _needed(group: dict[str, Any]) -> tuple[StateField, ...]:
        return _MOMENTS

    @staticmethod
    def _rule(table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        rule = _adam_rule("adamw", table, group)
        return rule._replace(weight_decay=group["weight_decay"])

    @staticmethod
    def _update(
        table: HashTable, records: ops.update.Table, gradients: Gradients, group: dict[str, Any], step: int
    ) -> None:
        eps = group["eps"] * (1 - group["betas"][1] ** step) ** 0.5
        _adam(table, records, gradients, group, step, eps=eps, decay=1 - group["lr"] * group["weight_decay"])


_MOMENTS = (StateField("exp_avg"), StateField("exp_avg_sq"))


def _adam(
    table: HashTable,
    records: ops.update.Table,
    gradients: Gradients,
    group: dict[str, Any],
    step: int,
    *,
    eps: float,
    decay: float,
) -> None:
    layout = table.layout
    ops.update.adam_update(
        records,
        gradients,
        exp_avg_offset=layout.offset("exp_avg"),
        exp_avg_sq_offset=layout.offset("exp_avg_sq"),
        lr=group["lr"],
        betas=group["betas"],
        eps=eps,
        decay=decay,
        t=step,
    )


def _adam_rule(kind: str, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
    offsets = [table.layout.offset("exp_avg"), table.layout.offset("exp_avg_sq")]
    return ops.update.Rule(ops.update.RULES[kind], offsets, group["lr"], tuple(group["betas"]), group["eps"])


def _check_betas(owner: str, betas: tuple[float, float]) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(isinstance(beta, Real) for beta in betas):
        raise TypeError(f"{owner}: betas must be two numbers, e.g. (0.9, 0.999), got {betas!r}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{owner}: betas must be in [0, 1), got {betas}")
