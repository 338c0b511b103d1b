"""Optimizers with a rule in Python."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding import HashTable, StateField
from recis_hybrid.ops.gather import RowGroups
from recis_hybrid.ops.update import Gradients
from recis_hybrid.optim._base import SparseOptimizer
from recis_hybrid.validation import describe_value


class Custom(SparseOptimizer):
    """Base class of optimizers whose rule is a Python function of rows, gradients and state.

    A subclass defines :meth:`update`; :meth:`row_state` if rows have optimizer state; and ``__init__`` with ``params``
    and its hyperparameters, each with a default, which it passes on as a dict. It then works as the other optimizers
    do, on every device and placement, over ranks, and in checkpoints. Each step reads the rows that have gradients into
    tensors and writes them back, and waits for the device: several times slower than a native rule. It cannot run
    inside ``jax.jit``, nor on rows that ranks split by column.

    Example:
        >>> from recis_hybrid.embedding import Constant, EmbeddingConfig, EmbeddingEngine
        >>> class SignSGD(Custom):
        ...     def __init__(self, params, lr=0.1):
        ...         super().__init__(params, {"lr": lr})
        ...     @staticmethod
        ...     def update(rows, gradients, state, settings, step):
        ...         rows -= settings["lr"] * gradients.sign()
        >>> config = EmbeddingConfig(dim=2, initializer=Constant(1.0))
        >>> engine = EmbeddingEngine({"item": config}, optimizer=SignSGD)
        >>> optimizer = engine.make_optimizer(lr=0.25)
        >>> engine({"item": torch.tensor([7])})["item"].sum().backward()
        >>> optimizer.step()
        >>> engine({"item": torch.tensor([7])})["item"].tolist()
        [[0.75, 0.75]]
    """

    needs_whole_rows = True

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the state of a row: none, unless a subclass overrides it."""
        return ()

    @staticmethod
    @abstractmethod
    def update(
        rows: Tensor, gradients: Tensor, state: dict[str, Tensor], settings: Mapping[str, Any], step: int
    ) -> None:
        """Update rows and their state in place.

        For the result not to depend on coalescing, ranks or the order of ids, the new values of a row must depend on
        no other row.

        Args:
            rows: float32 ``[U, D]``: the embeddings of the U rows that have a gradient, on the table's device. In
                tables of a narrower dtype, the new values are rounded stochastically.
            gradients: float32 ``[U, D]``: their summed gradients.
            state: float32 ``[U, width]`` for each field of :meth:`row_state`.
            settings: Hyperparameters of the table.
            step: Number of the table's step, from 1.
        """

    @classmethod
    def _check(cls, group: dict[str, Any]) -> None:
        """Accept all hyperparameters; subclasses may refuse some."""

    @classmethod
    def _update(
        cls, table: HashTable, records: ops.update.Table, gradients: Gradients, group: dict[str, Any], step: int
    ) -> None:
        groups, layout = gradients.groups, table.layout
        count = int(groups.count)
        unique, device = groups.unique[:count], groups.unique.device
        sums = torch.empty(groups.unique.numel(), layout.dim, device=device)
        ops.update.reduce_rows(gradients, sums)
        names = ["embedding", *(field.name for field in cls._needed(group))]
        parts = {name: _read(records, table, unique, name) for name in names}
        given = {name: parts[name] for name in names[1:]}
        settings = {name: value for name, value in group.items() if name != "params"}
        with torch.no_grad():
            result = cls.update(parts["embedding"], sums[:count], given, settings, step)
        if result is not None:
            raise TypeError(
                f"{cls.__name__}.update must change rows and state in place and return None, got "
                f"{describe_value(result)}; write e.g. rows -= ... or rows.copy_(...)"
            )
        if records.marks_seen:
            ops.blocks.see_rows(records.blocks, groups.count, groups.unique, groups.offsets, records.step)
        numbers = torch.arange(count + 1, device=device)
        singles = RowGroups(groups.count, unique, numbers, numbers[:count], None)
        for number, name in enumerate(names):
            # The rounding of each part has random bits of its own.
            rule = ops.update.Rule(ops.update.RULES["assign"], [layout.offset(name)], [float(number)])
            target = records._replace(
                element=ops.blocks.ELEMENTS[layout.part_dtype(name)],
                state_element=0,
                dim=layout.width(name),
                marks_seen=False,
            )
            ops.update.update_rows(target, Gradients([parts[name]], singles), rule, step)


def _read(records: ops.update.Table, table: HashTable, rows: Tensor, name: str) -> Tensor:
    """Return a part of the records of rows, float32 ``[U, width]``."""
    layout = table.layout
    values = torch.empty(rows.numel(), layout.width(name), dtype=layout.part_dtype(name), device=rows.device)
    ops.blocks.read(records.blocks, rows, layout.offset(name), values)
    return values.to(torch.float32)
