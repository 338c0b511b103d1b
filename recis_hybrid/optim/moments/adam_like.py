"""Base class of the optimizers with two moments, a weight decay and the hyperparameters of Adam."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_betas, check_positive

MOMENTS = (StateField("exp_avg"), StateField("exp_avg_sq"))


class AdamLike(SparseOptimizer):
    """An optimizer with the moments of Adam and weight decay; subclasses name its rule."""

    rule_name: ClassVar[str]
    """Key of ``ops.update.RULES``."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        exact: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "exact": exact})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: ``exp_avg`` and ``exp_avg_sq``."""
        return MOMENTS

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_betas(cls.__name__, group["betas"])
        check_positive(cls.__name__, lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        state = [field.name for field in cls.row_state()]
        return rule_of(table, cls.rule_name, state, group["lr"], *group["betas"], group["eps"], group["weight_decay"])
