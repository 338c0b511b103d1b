"""Adagrad with one sum per row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_positive

_MODES = ("l2", "decoupled")


class RowwiseAdagrad(SparseOptimizer):
    r"""Adagrad with one sum per row, of the mean squared gradient: 4 bytes of state per row instead of per element.

    .. math:: s \leftarrow s + \frac{1}{D} \sum_d g_d^2,\; w \leftarrow w - \eta \frac{g}{\sqrt{s} + \epsilon}

    The sum is float32 regardless of the table's dtypes. With weight decay in the mode ``"l2"``, the gradient is
    :math:`g + f \lambda w` in both formulas; in the mode ``"decoupled"``, w is first multiplied by
    :math:`1 - \eta f \lambda`. f is 1, or, with a half-life h of counters, it is h divided by the row's counter

    .. math:: c \leftarrow 1 + 2^{-\Delta / h} c

    where Δ is the number of steps since the row's last update. So f is about 0.7 for a row that has a gradient in each
    step, and up to h for a rare one, which decays in fewer steps. While a row has no gradient, it does not change.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        eps: Added to the square root.
        weight_decay: λ.
        weight_decay_mode: ``"l2"`` or ``"decoupled"``.
        counter_halflife: h, in steps; 0 for no counters. Rows have a ``row_counter`` if the engine was built with
            ``optimizer=optim.RowwiseAdagrad.spec(counter_halflife=...)``.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``sum`` of one element, or no ``row_counter``
            although there is a half-life.

    References:
        Mudigere et al.: Software-hardware co-design for fast and scalable training of deep learning recommendation
        models. ISCA 2022. Equivalent to EXACT_ROWWISE_ADAGRAD of FBGEMM with its ``weight_decay``,
        ``weight_decay_mode`` (L2 or DECOUPLE) and ``CounterBasedRegularizationDefinition(counter_halflife=)``.
    """

    needs_whole_rows = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: Literal["l2", "decoupled"] = "l2",
        counter_halflife: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, {**defaults, "weight_decay_mode": weight_decay_mode, "counter_halflife": counter_halflife}
        )

    @staticmethod
    def row_state(initial_accumulator_value: float = 0.0, counter_halflife: float = 0.0) -> tuple[StateField, ...]:
        """Return the state of a row: one ``sum``, and one ``row_counter`` if there is a half-life."""
        check_positive(
            "RowwiseAdagrad",
            initial_accumulator_value=initial_accumulator_value,
            counter_halflife=counter_halflife,
        )
        total = StateField("sum", width=1, first_value=initial_accumulator_value, dtype=torch.float32)
        counter = StateField("row_counter", width=1, dtype=torch.float32)
        return (total, counter) if counter_halflife > 0 else (total,)

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        names = ("lr", "eps", "weight_decay", "counter_halflife")
        check_positive("RowwiseAdagrad", **{name: group[name] for name in names})
        if (mode := group["weight_decay_mode"]) not in _MODES:
            raise ValueError(f"RowwiseAdagrad: weight_decay_mode must be one of {list(_MODES)}, got {mode!r}")

    @classmethod
    def _needed(cls, group: dict[str, Any]) -> tuple[StateField, ...]:
        return RowwiseAdagrad.row_state(counter_halflife=group["counter_halflife"])

    @staticmethod
    def _spec_call(group: dict[str, Any]) -> str:
        return f".spec(counter_halflife={group['counter_halflife']})" if group["counter_halflife"] > 0 else ""

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        halflife, decoupled = group["counter_halflife"], float(group["weight_decay_mode"] == "decoupled")
        state = ["sum", "row_counter"] if halflife > 0 else ["sum"]
        values = group["lr"], group["eps"], group["weight_decay"], decoupled, halflife
        return rule_of(table, "rowwise_adagrad", state, *values)
