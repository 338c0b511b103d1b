"""Adagrad on rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.ops.update import Gradients
from recis_hybrid.optim._base import SparseOptimizer, check_positive


class Adagrad(SparseOptimizer):
    r"""Adagrad, equivalent to ``torch.optim.Adagrad``.

    .. math:: s \leftarrow s + g^2,\; w \leftarrow w - \eta \frac{g}{\sqrt{s} + \epsilon}

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        eps: Added to the square root.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is negative, or rows have no ``sum``.

    References:
        Duchi, Hazan, Singer: Adaptive subgradient methods for online learning and stochastic optimization. JMLR 2011.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @staticmethod
    def row_state(initial_accumulator_value: float = 0.0) -> tuple[StateField, ...]:
        """Return the state of a row: ``sum``, starting at ``initial_accumulator_value``."""
        check_positive("Adagrad", initial_accumulator_value=initial_accumulator_value)
        return (StateField("sum", first_value=initial_accumulator_value),)

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        check_positive("Adagrad", lr=group["lr"], eps=group["eps"])

    @staticmethod
    def _needed(group: dict[str, Any]) -> tuple[StateField, ...]:
        return Adagrad.row_state()

    @staticmethod
    def _rule(table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        offsets = [table.layout.offset("sum")]
        return ops.update.Rule(ops.update.RULES["adagrad"], offsets, group["lr"], eps=group["eps"])

    @staticmethod
    def _update(
        table: HashTable, records: ops.update.Table, gradients: Gradients, group: dict[str, Any], step: int
    ) -> None:
        offset = table.layout.offset("sum")
        ops.update.adagrad_update(records, gradients, sum_offset=offset, lr=group["lr"], eps=group["eps"])


class RowwiseAdagrad(SparseOptimizer):
    r"""Adagrad with one sum per row, of the mean squared gradient: 4 bytes of state per row instead of per element.

    .. math:: s \leftarrow s + \frac{1}{D} \sum_d g_d^2,\; w \leftarrow w - \eta \frac{g}{\sqrt{s} + \epsilon}

    The sum is float32 regardless of the table's dtypes.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        eps: Added to the square root.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is negative, or rows have no ``sum`` of one element.

    References:
        Mudigere et al.: Software-hardware co-design for fast and scalable training of deep learning recommendation
        models. ISCA 2022. Equivalent to EXACT_ROWWISE_ADAGRAD of FBGEMM.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @staticmethod
    def row_state(initial_accumulator_value: float = 0.0) -> tuple[StateField, ...]:
        """Return the state of a row: one ``sum``, starting at ``initial_accumulator_value``."""
        check_positive("RowwiseAdagrad", initial_accumulator_value=initial_accumulator_value)
        return (StateField("sum", width=1, first_value=initial_accumulator_value, dtype=torch.float32),)

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        check_positive("RowwiseAdagrad", lr=group["lr"], eps=group["eps"])

    @staticmethod
    def _needed(group: dict[str, Any]) -> tuple[StateField, ...]:
        return RowwiseAdagrad.row_state()

    @staticmethod
    def _rule(table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        offsets = [table.layout.offset("sum")]
        return ops.update.Rule(ops.update.RULES["rowwise_adagrad"], offsets, group["lr"], eps=group["eps"])

    @staticmethod
    def _update(
        table: HashTable, records: ops.update.Table, gradients: Gradients, group: dict[str, Any], step: int
    ) -> None:
        offset = table.layout.offset("sum")
        ops.update.rowwise_adagrad_update(records, gradients, sum_offset=offset, lr=group["lr"], eps=group["eps"])
