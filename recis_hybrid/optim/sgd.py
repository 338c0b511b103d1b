"""Stochastic gradient descent on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, RowGradients, StateField
from recis_hybrid.optim._base import SparseOptimizer, check_positive


class SGD(SparseOptimizer):
    r"""Stochastic gradient descent: :math:`w \leftarrow w - \eta g`, as ``torch.optim.SGD`` without momentum.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If lr is negative.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2) -> None:
        check_positive("SGD", lr=lr)
        super().__init__(params, {"lr": lr}, self.row_state())

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Returns what a row keeps: nothing."""
        return ()

    def _update(self, table: HashTable, gradients: RowGradients, group: dict[str, Any], step: int) -> None:
        ops.update.sgd_update(
            table.blocks.handle, table.layout.dim, gradients.gradients, gradients.groups, lr=group["lr"]
        )
