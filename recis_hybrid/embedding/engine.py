"""EmbeddingEngine: a Batch in, vectors by feature out; gradients back into the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recis_hybrid.embedding.anchor import Anchor
from recis_hybrid.embedding.coalesce import TablePlan, plan_tables
from recis_hybrid.embedding.config import EmbeddingConfig
from recis_hybrid.embedding.describe import describe
from recis_hybrid.embedding.devices import device_of
from recis_hybrid.embedding.eviction import Eviction
from recis_hybrid.embedding.gather import Outputs, differentiable, gather, spread
from recis_hybrid.embedding.hash_table import HashTable
from recis_hybrid.embedding.inputs import FeatureReader, TableReader
from recis_hybrid.embedding.loading import TablesLoader
from recis_hybrid.embedding.lookup import Lookup
from recis_hybrid.embedding.protocols import RowUpdate
from recis_hybrid.embedding.record_layout import StateField
from recis_hybrid.embedding.saving import rows_state, snapshot
from recis_hybrid.embedding.state import load_tables_state, tables_layout, tables_state
from recis_hybrid.ragged import Batch
from recis_hybrid.state import HostMemory, PartState


class RowOptimizer(Protocol):
    """An optimizer, as the engine calls it without autograd."""

    def update_of(self, anchor: Tensor) -> RowUpdate:
        """Counts a step for the anchor's table and returns the update to apply."""


@dataclass(frozen=True)
class EngineLookup:
    """Which rows a batch met, and what the gradients need: one of each for each logical table."""

    lookups: tuple[Lookup, ...]
    outputs: tuple[Outputs, ...]


class EmbeddingEngine(nn.Module):
    """Growing hash tables behind named features.

    Member tables that agree in width, dtypes, record layout, placement and rules are coalesced into one logical table:
    one lookup, one gather and one update serve all of their features. In training mode (``train()``) an id that is met
    for the first time gets a row, if it is admitted; in evaluation mode (``eval()``) nothing is changed, and an unknown
    id counts with the first value it would have.

    Args:
        configs: By feature name, the name of its column in the batch.
        optimizer_state: What the optimizer keeps for every row, e.g. ``optim.Adam.row_state()``.
        seed: Of the rows' first values, which depend on it, the table's name and the id alone, and of rounding.
        device: Where the outputs are, and the tables whose config does not say.
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
        self.device = device_of(device)
        self.plans = plan_tables(self.configs, tuple(optimizer_state), coalesce=coalesce)
        self.tables = [self._table(plan, seed) for plan in self.plans]
        self._readers = [
            TableReader([FeatureReader(name, member, self.configs[name]) for name, member in plan.features.items()])
            for plan in self.plans
        ]
        for number, table in enumerate(self.tables):
            self.register_parameter(f"anchor{number}", table.anchor)

    def _table(self, plan: TablePlan, seed: int) -> HashTable:
        config = plan.config
        table = HashTable(
            plan.members, plan.layout, self.device, seed, placement=config.placement, admission=config.admission,
            read_only=not config.trainable,
        )  # fmt: skip
        table.overrides = dict(config.optimizer or {})
        return table

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Looks a batch up, differentiably.

        Args:
            batch: For each feature a column of ids: int64 ``[B]``, ``[B, L]`` or a RaggedTensor.

        Returns:
            By feature, float32; each starts at a multiple of 64 bytes. ``[B, dim]``; where the combiner is ``tile``
            ``[B, max_length * dim]``; where it is None ``[n, dim]`` in the order of the ids, or ``[B, L, dim]`` for
            ids ``[B, L]``.
        """
        results: dict[str, Tensor] = {}
        for number, table in enumerate(self.tables):
            lookup, outputs = self._find(batch, number)
            takes_gradient = self.training and not table.read_only and torch.is_grad_enabled()
            values = (differentiable if takes_gradient else gather)(table, lookup, outputs)
            results.update(zip(self.plans[number].features, values, strict=True))
        return results if len(self.tables) == 1 else {name: results[name] for name in self.configs}

    @torch.no_grad()
    def lookup(self, batch: Batch) -> tuple[dict[str, Tensor], EngineLookup]:
        """Looks a batch up without autograd.

        Returns:
            The values as :meth:`forward` gives them, and what :meth:`apply_gradients` needs.
        """
        found = [self._find(batch, number) for number in range(len(self.tables))]
        results: dict[str, Tensor] = {}
        for plan, table, (lookup, outputs) in zip(self.plans, self.tables, found, strict=True):
            results.update(zip(plan.features, gather(table, lookup, outputs, keep_winners=True), strict=True))
        lookups, outputs_of = zip(*found, strict=True)
        return {name: results[name] for name in self.configs}, EngineLookup(lookups, outputs_of)

    @torch.no_grad()
    def apply_gradients(self, ctx: EngineLookup, gradients: Mapping[str, Tensor], optimizer: RowOptimizer) -> None:
        """Updates the rows of a lookup: one optimizer step.

        Args:
            ctx: From :meth:`lookup` in training mode.
            gradients: By feature, float32: of what :meth:`lookup` returned. Those of read-only tables are not needed.
            optimizer: One of ``recis_hybrid.optim``, built over this engine's parameters.

        Raises:
            KeyError: If a feature's gradient is missing.
            RuntimeError: If rows of the lookup have been cleared or moved since, or it was made in evaluation mode.
        """
        trained = [number for number, table in enumerate(self.tables) if not table.read_only]
        missing = [name for number in trained for name in self.plans[number].features if name not in gradients]
        if missing:
            raise KeyError(f"apply_gradients: no gradient for the features {missing}")
        if not all(ctx.lookups[number].train for number in trained):
            raise RuntimeError("apply_gradients: the lookup was made in evaluation mode; call train() before it")
        # All of it is checked before the first row changes.
        ready = []
        for number in trained:
            table, lookup = self.tables[number], ctx.lookups[number]
            rows = spread(table, lookup, ctx.outputs[number], [gradients[name] for name in self.plans[number].features])
            ready.append((table, table.gradients(lookup, rows), optimizer.update_of(table.anchor)))
        for table, summed, update in ready:
            table.apply_gradients(summed, update)

    def _find(self, batch: Batch, number: int) -> tuple[Lookup, Outputs]:
        table = self.tables[number]
        request, shapes = self._readers[number](batch, table.device)
        lookup = table.find(request, train=self.training)
        return lookup, Outputs.of(request.bags.vectors, shapes, table, self.device)

    def evict(self, rule: Eviction) -> int:
        """Gives up the rows that a rule names, in every table that is trained. Returns how many."""
        return sum(table.evict(rule) for table in self.tables if not table.read_only)

    def compact(self) -> None:
        """Moves the rows of every table together and gives memory back."""
        for table in self.tables:
            table.compact()

    def memory(self) -> dict[str, int]:
        """Returns the bytes that each part of the tables holds, over all tables."""
        reports = [table.memory() for table in self.tables]
        return {part: sum(report[part] for report in reports) for part in reports[0]}

    def describe(self) -> str:
        """Returns a table of what was coalesced: logical tables, their records, member tables, features and rows."""
        return describe(self.plans, self.tables)

    def checkpoint_state(self) -> PartState:
        """Returns every member table's rows: what Saver writes."""
        return tables_state(self.tables)

    def checkpoint_layout(self) -> PartState:
        """Returns :meth:`checkpoint_state` without its rows."""
        return tables_layout(self.tables)

    def checkpoint_rows(self) -> PartState:
        """Returns :meth:`checkpoint_state` with rows to be read as they are written; none may change before."""
        return rows_state(self.tables)

    def checkpoint_snapshot(self, memory: HostMemory) -> Callable[[], PartState]:
        """Copies every row into host memory; what it returns hands the copies out, in any thread."""
        return snapshot(self.tables, memory)

    def checkpoint_loader(self, saved: PartState) -> TablesLoader:
        """Returns what takes the rows of a checkpoint in pieces; ``saved`` says what it holds, without rows."""
        return TablesLoader(self.tables, saved)

    def load_checkpoint_state(self, state: PartState) -> None:
        """Replaces every member table's rows; see :func:`load_tables_state`."""
        load_tables_state(self.tables, state)

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingEngine:
        """Tables stay where they are, as ``to()`` cannot take them along; dtypes are those of the configs."""
        wanted = fn(torch.empty(0, device=self.device)).device
        if wanted != self.device:
            raise RuntimeError(
                f"EmbeddingEngine: tables cannot be moved from {self.device} to {wanted}; "
                f"build the engine with device={str(wanted)!r}, and load a checkpoint into it"
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Leaves the anchors out of state_dict: rows are saved by Saver."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of a state_dict is the engine's."""


def dense_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a module that are not embedding tables: what to give to torch.optim."""
    return [parameter for parameter in module.parameters() if not isinstance(parameter, Anchor)]
