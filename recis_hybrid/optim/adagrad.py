"""Adagrad on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, RowGradients, StateField
from recis_hybrid.optim._base import SparseOptimizer, check_positive


class Adagrad(SparseOptimizer):
    r"""Adagrad, as ``torch.optim.Adagrad``.

    .. math:: s \leftarrow s + g^2,\; w \leftarrow w - \eta \frac{g}{\sqrt{s} + \epsilon}

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        eps: Added to the root.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is negative, or the engine keeps no ``sum``.

    References:
        Duchi, Hazan, Singer: Adaptive subgradient methods for online learning and stochastic optimization. JMLR 2011.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10) -> None:
        check_positive("Adagrad", lr=lr, eps=eps)
        super().__init__(params, {"lr": lr, "eps": eps}, self.row_state())

    @staticmethod
    def row_state(initial_accumulator_value: float = 0.0) -> tuple[StateField, ...]:
        """Returns what a row keeps: ``sum``, starting at ``initial_accumulator_value``."""
        check_positive("Adagrad", initial_accumulator_value=initial_accumulator_value)
        return (StateField("sum", first_value=initial_accumulator_value),)

    def _update(self, table: HashTable, gradients: RowGradients, group: dict[str, Any], step: int) -> None:
        layout = table.layout
        ops.update.adagrad_update(
            table.blocks.handle, layout.dim, gradients.gradients, gradients.groups,
            sum_offset=layout.offset("sum"), lr=group["lr"], eps=group["eps"],
        )  # fmt: skip
