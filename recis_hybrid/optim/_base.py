"""What sparse optimizers share: a torch.optim.Optimizer over tables' anchors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from recis_hybrid.embedding import Anchor, HashTable, RowGradients, StateField


class SparseOptimizer(torch.optim.Optimizer):
    """Updates the rows that have gradients; learning-rate schedulers work on it as on any torch optimizer.

    ``step()`` reduces what backward has left at each table once, and updates each record in the same pass. A table
    without gradients is passed over and its step count stays.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], needed: tuple[StateField, ...]) -> None:
        super().__init__(params, defaults)
        name = type(self).__name__
        for group in self.param_groups:
            for number, anchor in enumerate(group["params"]):
                if not isinstance(anchor, Anchor):
                    raise TypeError(
                        f"{name}: parameter {number} (shape {list(anchor.shape)}) is not an embedding table's anchor; "
                        f"give engine.parameters() here, and embedding.dense_parameters(model) to torch.optim"
                    )
                have = {field.name: anchor.table.layout.width(field.name) for field in anchor.table.layout.state}
                want = {field.name: field.width or anchor.table.layout.dim for field in needed}
                if any(have.get(field) != width for field, width in want.items()):
                    raise ValueError(
                        f"{name} keeps {sorted(want)} for every row, but the engine was built with {sorted(have)}: "
                        f"build it with EmbeddingEngine(..., optimizer_state={name}.row_state())"
                    )

    @abstractmethod
    def _update(self, table: HashTable, gradients: RowGradients, group: dict[str, Any], step: int) -> None:
        """Applies one step's gradients to a table; ``step`` counts from 1."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every table that has gradients.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, if there is a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for anchor in group["params"]:
                if anchor.table.pending.lookups:
                    anchor.table.apply_pending(self.update_of(anchor))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients that no step has used."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for anchor in group["params"]:
                anchor.table.pending.clear()

    def update_of(self, anchor: Tensor) -> Callable[[HashTable, RowGradients], None]:
        """Counts a step for the anchor's table and returns the update to apply: what the engine calls."""
        group = next((g for g in self.param_groups if any(p is anchor for p in g["params"])), None)
        if group is None:
            raise ValueError(f"{type(self).__name__}: this table is not among the optimizer's parameters")
        state = self.state[anchor]
        step = state["step"] = state.get("step", 0) + 1
        return lambda table, gradients: self._update(table, gradients, group, step)


def check_positive(owner: str, **values: float) -> None:
    """Raises ValueError for a hyperparameter below zero."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{owner}: {name} must not be negative, got {value}")
