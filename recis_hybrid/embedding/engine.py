"""EmbeddingEngine: a Batch in, one vector a bag and feature out; gradients back into the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recis_hybrid import ops
from recis_hybrid.embedding.coalesce import TablePlan, plan_tables
from recis_hybrid.embedding.config import EmbeddingConfig
from recis_hybrid.embedding.hash_table import Anchor, HashTable, RowUpdate
from recis_hybrid.embedding.inputs import feature_ids
from recis_hybrid.embedding.lookup import Lookup
from recis_hybrid.embedding.record_layout import StateField
from recis_hybrid.embedding.state import load_tables_state, tables_state
from recis_hybrid.ragged import Batch
from recis_hybrid.state import PartState

_PART_FLOATS = 16  # 64 bytes: what JAX wants of a buffer that it is to share


class RowOptimizer(Protocol):
    """An optimizer, as the engine calls it without autograd."""

    def update_of(self, anchor: Tensor) -> RowUpdate:
        """Counts a step for the anchor's table and returns the update to apply."""


@dataclass(frozen=True)
class EngineLookup:
    """Which rows a batch met: one Lookup for each logical table."""

    lookups: tuple[Lookup, ...]


class EmbeddingEngine(nn.Module):
    """Growing hash tables behind named features.

    Member tables of one width and record layout are coalesced into one logical table: one lookup, one gather and one
    update serve all of their features. In training mode (``train()``) an id that is met for the first time gets a row;
    in evaluation mode (``eval()``) nothing is inserted and an unknown id counts with the first value it would have.

    Args:
        configs: By feature name, the name of its column in the batch.
        optimizer_state: What the optimizer keeps for every row, e.g. ``optim.Adam.row_state()``.
        seed: Of the rows' first values, which depend on it, the table's name and the id alone.
        device: Where the tables live.
        coalesce: False gives every member table a HashTable of its own; the numbers are the same.

    Raises:
        ValueError: If there is no feature, or features that share a table disagree about it.

    Example:
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=8), "user": EmbeddingConfig(dim=8)})
        >>> engine({"item": torch.tensor([3, -1]), "user": torch.tensor([7, 7])})["item"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        configs: Mapping[str, EmbeddingConfig],
        *,
        optimizer_state: tuple[StateField, ...] = (),
        seed: int = 0,
        device: torch.device | str = "cpu",
        coalesce: bool = True,
    ) -> None:
        super().__init__()
        if not configs:
            raise ValueError("EmbeddingEngine: give at least one feature")
        self.configs = dict(configs)
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.plans = plan_tables(self.configs, tuple(optimizer_state), coalesce=coalesce)
        self.tables = [HashTable(plan.members, plan.layout, self.device, seed) for plan in self.plans]
        for number, table in enumerate(self.tables):
            self.register_parameter(f"anchor{number}", table.anchor)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Looks a batch up, differentiably.

        Args:
            batch: For each feature a column of ids: int64 ``[B]``, ``[B, L]`` or a RaggedTensor.

        Returns:
            By feature, float32 ``[B, dim]``; each starts at a multiple of 64 bytes.
        """
        outputs: dict[str, Tensor] = {}
        for plan, table, lookup in zip(self.plans, self.tables, self._find(batch), strict=True):
            if self.training and torch.is_grad_enabled():
                values = _Gather.apply(table.anchor, table, lookup)  # type: ignore[no-untyped-call]
            else:
                values = _gather(table, lookup)
            outputs.update(zip(plan.features, values, strict=True))
        return {name: outputs[name] for name in self.configs}

    @torch.no_grad()
    def lookup(self, batch: Batch) -> tuple[dict[str, Tensor], EngineLookup]:
        """Looks a batch up without autograd.

        Returns:
            The values as :meth:`forward` gives them, and what :meth:`apply_gradients` needs.
        """
        lookups = self._find(batch)
        outputs: dict[str, Tensor] = {}
        for plan, table, lookup in zip(self.plans, self.tables, lookups, strict=True):
            outputs.update(zip(plan.features, _gather(table, lookup), strict=True))
        return {name: outputs[name] for name in self.configs}, EngineLookup(lookups)

    @torch.no_grad()
    def apply_gradients(self, ctx: EngineLookup, gradients: Mapping[str, Tensor], optimizer: RowOptimizer) -> None:
        """Updates the rows of a lookup: one optimizer step.

        Args:
            ctx: From :meth:`lookup` in training mode.
            gradients: By feature, float32 ``[B, dim]``: of what :meth:`lookup` returned.
            optimizer: One of ``recis_hybrid.optim``, built over this engine's parameters.

        Raises:
            KeyError: If a feature's gradient is missing.
            RuntimeError: If rows of the lookup have been cleared or moved since.
        """
        missing = [name for name in self.configs if name not in gradients]
        if missing:
            raise KeyError(f"apply_gradients: no gradient for the features {missing}")
        for plan, table, lookup in zip(self.plans, self.tables, ctx.lookups, strict=True):
            table.apply_gradients(
                lookup, [gradients[name] for name in plan.features], optimizer.update_of(table.anchor)
            )

    def _find(self, batch: Batch) -> tuple[Lookup, ...]:
        return tuple(
            table.lookup(self._features(batch, plan), insert=self.training)
            for plan, table in zip(self.plans, self.tables, strict=True)
        )

    def _features(self, batch: Batch, plan: TablePlan) -> list[Any]:
        return [
            feature_ids(batch, name, self.device, member, ops.blocks.COMBINERS[self.configs[name].combiner])
            for name, member in plan.features.items()
        ]

    def describe(self) -> str:
        """Returns a table of what was coalesced: logical tables, their width, member tables, features and rows."""
        lines = [f"{'table':<8}{'dim':>6}{'record':>9}{'rows':>12}  members (features)"]
        for number, (plan, table) in enumerate(zip(self.plans, self.tables, strict=True)):
            readers: dict[int, list[str]] = {}
            for feature, member in plan.features.items():
                readers.setdefault(member, []).append(feature)
            members = ", ".join(
                f"{plan.members[member].name} ({', '.join(names)})" for member, names in readers.items()
            )
            record = f"{plan.layout.record_bytes} B"
            lines.append(f"{number:<8}{plan.layout.dim:>6}{record:>9}{len(table):>12,}  {members}")
        return "\n".join(lines)

    def checkpoint_state(self) -> PartState:
        """Returns every member table's rows: what Saver writes."""
        return tables_state(self.tables)

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replaces all rows by those of a checkpoint.

        Raises:
            ValueError: If tables are missing or too many, or their width or optimizer state differ.
        """
        load_tables_state(self.tables, state)

    # Anchors hold nothing: a model's state_dict is its dense part, and rows go through Saver.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return None


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a model that are not tables' anchors: what ``torch.optim`` and DDP should get."""
    return [parameter for parameter in model.parameters() if not isinstance(parameter, Anchor)]


def _gather(table: HashTable, lookup: Lookup) -> list[Tensor]:
    """One buffer for a logical table's outputs, each feature's part starting at a multiple of 64 bytes."""
    dim = table.layout.dim
    starts, total = [], 0
    for feature in lookup.features:
        starts.append(total)
        total += -(-feature.bags * dim // _PART_FLOATS) * _PART_FLOATS
    buffer = ops.memory.empty_bytes(4 * max(total, _PART_FLOATS), table.device).view(torch.float32)
    outs = [
        buffer.as_strided((feature.bags, dim), (dim, 1), start)
        for feature, start in zip(lookup.features, starts, strict=True)
    ]
    table.gather(lookup, outs)
    return outs


class _Gather(torch.autograd.Function):
    """Gathers; backward leaves the gradients at the table, for the optimizer's step to reduce once."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: HashTable, lookup: Lookup) -> tuple[Tensor, ...]:
        ctx.table, ctx.lookup = table, lookup
        ctx.set_materialize_grads(False)  # a feature that the loss does not use has no gradient, not one of zeros
        return tuple(_gather(table, lookup))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None]:
        table: HashTable = ctx.table
        lookup: Lookup = ctx.lookup
        used = [number for number, gradient in enumerate(gradients) if gradient is not None]
        table.add_gradients(lookup.select(used), [gradient for gradient in gradients if gradient is not None])
        return None, None, None
