"""Stochastic gradient descent on rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.optim._base import SparseOptimizer, rule_of
from recis_hybrid.optim._checks import check_positive


class SGD(SparseOptimizer):
    r"""Stochastic gradient descent, equivalent to ``torch.optim.SGD`` for the rows that have gradients.

    .. math:: u = g + \lambda w,\; b \leftarrow \mu b + u,\; w \leftarrow w - \eta b

    or, with Nesterov momentum, :math:`w \leftarrow w - \eta (u + \mu b)`. While a row has no gradient, its weights and
    its momentum buffer b do not change, not even by weight decay. Rows have this buffer if the engine was built with
    ``optimizer=optim.SGD.spec(momentum=0.9)``, which momentum requires. A schedule that cycles the momentum, such as
    ``OneCycleLR``, does so if rows have the buffer. Otherwise, it only changes the learning rate, and a warning is
    issued.

    Args:
        params: ``engine.parameters()``, or groups of them.
        lr: Learning rate η.
        momentum: μ, in [0, 1).
        weight_decay: λ.
        nesterov: True for Nesterov momentum.
        exact: True for the results of an optimizer that changes every row in every step; see the guide to training.

    Raises:
        TypeError: If a parameter is not a table's anchor.
        ValueError: If a hyperparameter is out of range, rows have no ``momentum_buffer`` although there is momentum, or
            ``nesterov`` is set without momentum.

    References:
        Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning. ICML 2013.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        exact: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "exact": exact}
        super().__init__(params, defaults)

    @staticmethod
    def row_state(momentum: float = 0.0) -> tuple[StateField, ...]:
        """Return the state of a row: ``momentum_buffer`` with momentum, otherwise none."""
        check_positive("SGD", momentum=momentum)
        return (StateField("momentum_buffer"),) if momentum > 0 else ()

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        check_positive("SGD", lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"])
        if group["momentum"] >= 1:
            raise ValueError(f"SGD: momentum must be in [0, 1), got {group['momentum']}")
        if group["nesterov"] and not group["momentum"] > 0:
            raise ValueError("SGD: nesterov=True needs a momentum above 0, e.g. momentum=0.9")

    @classmethod
    def _needed(cls, group: dict[str, Any]) -> tuple[StateField, ...]:
        return SGD.row_state(group["momentum"])

    @staticmethod
    def _spec_call(group: dict[str, Any]) -> str:
        return f".spec(momentum={group['momentum']})" if group["momentum"] > 0 else ""

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        # With exact=True, the rule stays the same where a schedule sets the momentum to 0.
        keeps = group.get("exact") and any(field.name == "momentum_buffer" for field in table.layout.state)
        if keeps or (momentum > 0 and _has_buffer(table, momentum)):
            return rule_of(table, "momentum", ["momentum_buffer"], lr, momentum, decay, float(group["nesterov"]))
        return rule_of(table, "sgd", [], lr, decay)


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
            stacklevel=5,
        )
    return False
