"""Adam on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, RowGradients, StateField
from recis_hybrid.optim._base import SparseOptimizer, check_positive


class Adam(SparseOptimizer):
    r"""Adam for the rows that have gradients, as ``torch.optim.SparseAdam``.

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m),\; v \leftarrow v + (1 - \beta_2)(g^2 - v),\;
        w \leftarrow w - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m}{\sqrt{v} + \epsilon}

    The moments of a row stand still while it has no gradient; t counts the steps of its table.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        betas: β₁ and β₂, in [0, 1).
        eps: Added to the root.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or the engine keeps no ``exp_avg`` and ``exp_avg_sq``.

    References:
        Kingma, Ba: Adam: a method for stochastic optimization. ICLR 2015.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        check_positive("Adam", lr=lr, eps=eps)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Adam: betas must lie in [0, 1), got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, self.row_state())

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Returns what a row keeps: ``exp_avg`` and ``exp_avg_sq``."""
        return StateField("exp_avg"), StateField("exp_avg_sq")

    def _update(self, table: HashTable, gradients: RowGradients, group: dict[str, Any], step: int) -> None:
        layout = table.layout
        ops.update.adam_update(
            table.blocks.handle, layout.dim, gradients.gradients, gradients.groups,
            exp_avg_offset=layout.offset("exp_avg"), exp_avg_sq_offset=layout.offset("exp_avg_sq"),
            lr=group["lr"], betas=group["betas"], eps=group["eps"], step=step,
        )  # fmt: skip
