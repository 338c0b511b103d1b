"""FTRL-proximal on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_positive


class FTRL(SparseOptimizer):
    r"""Follow the proximally regularized leader, for the rows that have gradients.

    .. math::
        \sigma = \frac{\sqrt{n + g^2} - \sqrt{n}}{\eta},\; z \leftarrow z + g - \sigma w,\; n \leftarrow n + g^2,\;
        w \leftarrow \begin{cases} 0 & |z| \le \lambda_1 \\
        -\frac{z - \operatorname{sign}(z) \lambda_1}{(\beta + \sqrt{n}) / \eta + \lambda_2} & \text{else} \end{cases}

    From its first update on, a weight is a function of z and n, and exactly 0 while λ₁ outweighs its gradients.
    Without L1 and L2, it is Adagrad with a learning rate of η / (β + √n) and its first value in z only. So tables
    usually start at zero: ``EmbeddingConfig(initializer=Constant(0))``. A row does not change while it has no gradient.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η, called α in the paper; above 0.
        beta: β.
        l1: λ₁.
        l2: λ₂. TensorFlow's ``l2_regularization_strength`` is half of it.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``linear`` and ``sum``.

    References:
        McMahan et al.: Ad click prediction: a view from the trenches. KDD 2013, algorithm 1.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, beta: float = 1.0, l1: float = 0.0, l2: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "l1": l1, "l2": l2})

    @staticmethod
    def row_state(initial_accumulator_value: float = 0.0) -> tuple[StateField, ...]:
        """Return the state of a row: ``linear``, and ``sum`` starting at ``initial_accumulator_value``."""
        check_positive("FTRL", initial_accumulator_value=initial_accumulator_value)
        return StateField("linear"), StateField("sum", first_value=initial_accumulator_value)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_positive("FTRL", lr=group["lr"], beta=group["beta"], l1=group["l1"], l2=group["l2"])
        if not group["lr"] > 0:
            raise ValueError(f"FTRL: lr must be above 0, because updates divide by it, got {group['lr']}")

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        cls._check(group)  # a schedule may have set lr to 0
        return rule_of(table, "ftrl", ["linear", "sum"], *(group[name] for name in ("lr", "beta", "l1", "l2")))
