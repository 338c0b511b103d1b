"""Stochastic gradient descent on rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.ops.update import Gradients
from recis_hybrid.optim._base import SparseOptimizer, check_positive


class SGD(SparseOptimizer):
    r"""Stochastic gradient descent, equivalent to ``torch.optim.SGD``.

    .. math:: b \leftarrow \mu b + g,\; w \leftarrow w - \eta b

    The momentum buffer b of a row does not change while the row has no gradient. Rows have this buffer if the engine
    was built with ``optimizer=optim.SGD.spec(momentum=0.9)``, which momentum requires. A schedule that cycles the
    momentum, such as ``OneCycleLR``, does so if rows have the buffer. Otherwise, it only changes the learning rate, and
    a warning is issued.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        momentum: μ, in [0, 1).

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, or rows have no ``momentum_buffer`` although there is momentum.

    References:
        Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning. ICML 2013.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @staticmethod
    def row_state(momentum: float = 0.0) -> tuple[StateField, ...]:
        """Return the state of a row: ``momentum_buffer`` with momentum, otherwise none."""
        check_positive("SGD", momentum=momentum)
        return (StateField("momentum_buffer"),) if momentum > 0 else ()

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        check_positive("SGD", lr=group["lr"], momentum=group["momentum"])
        if group["momentum"] >= 1:
            raise ValueError(f"SGD: momentum must be in [0, 1), got {group['momentum']}")

    @staticmethod
    def _needed(group: dict[str, Any]) -> tuple[StateField, ...]:
        return SGD.row_state(group["momentum"])

    @staticmethod
    def _spec_call(group: dict[str, Any]) -> str:
        return f".spec(momentum={group['momentum']})" if group["momentum"] > 0 else ""

    @staticmethod
    def _update(
        table: HashTable, records: ops.update.Table, gradients: Gradients, group: dict[str, Any], step: int
    ) -> None:
        if group["momentum"] > 0 and _has_buffer(table, group["momentum"]):
            offset = table.layout.offset("momentum_buffer")
            ops.update.momentum_update(
                records, gradients, buffer_offset=offset, lr=group["lr"], momentum=group["momentum"]
            )
        else:
            ops.update.sgd_update(records, gradients, lr=group["lr"])

    @staticmethod
    def _rule(table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        if group["momentum"] > 0 and _has_buffer(table, group["momentum"]):
            offsets = [table.layout.offset("momentum_buffer")]
            return ops.update.Rule(ops.update.RULES["momentum"], offsets, group["lr"], (group["momentum"], 0.0))
        return ops.update.Rule(ops.update.RULES["sgd"], [], group["lr"])


_warned: WeakSet[HashTable] = WeakSet()
"""Tables of which :func:`_has_buffer` has warned."""


def _has_buffer(table: HashTable, momentum: float) -> bool:
    """Return whether rows have a momentum buffer; if not, warn once: a schedule must have set the momentum."""
    if any(field.name == "momentum_buffer" for field in table.layout.state):
        return True
    if table not in _warned:
        _warned.add(table)
        warnings.warn(
            f"SGD: rows of the table {table.name} have no momentum_buffer, so the momentum {momentum:g} set by a "
            f"schedule is ignored; build the engine with optimizer=optim.SGD.spec(momentum=0.9), or the schedule with "
            f"cycle_momentum=False",
            stacklevel=4,
        )
    return False
