"""EmbeddingEngine: looks up the vectors of a Batch by feature, and sends gradients back to the tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recis_hybrid import distributed
from recis_hybrid.checkpointing import BUCKETS, are_tables_apart, owned_buckets
from recis_hybrid.embedding.checkpoint.load import LoadedTables
from recis_hybrid.embedding.checkpoint.save import SavedTables
from recis_hybrid.embedding.checkpoint.state_dict import (
    RowsInStateDict,
    belongs_to_tables,
    load_rows,
    refuse_rows_in_state_dict,
    save_key,
    save_rows,
    warn_of_rows_left_out,
)
from recis_hybrid.embedding.compilation import not_recorded, outside_graphs, refuse_recording
from recis_hybrid.embedding.config import EmbeddingConfig, check_configs
from recis_hybrid.embedding.distributed.exchange import Exchange, Traffic, group_of
from recis_hybrid.embedding.distributed.prefetch import Prefetcher
from recis_hybrid.embedding.distributed.sharded_table import ShardedLookup, ShardedTables, refuse_settings, shard
from recis_hybrid.embedding.eviction import EvictionRule, SharedRows
from recis_hybrid.embedding.gradients import non_finite_features
from recis_hybrid.embedding.inputs import FeatureReader, TableReader, distinct_columns, samples_of
from recis_hybrid.embedding.optimizer import OptimizerSpec, RowOptimizer
from recis_hybrid.embedding.placement import output_device
from recis_hybrid.embedding.planner.coalesce import TablePlan, describe_plans, layout_on, plan_tables, table_reads
from recis_hybrid.embedding.pooling import AnyTable, Outputs, differentiable, gather, spread
from recis_hybrid.embedding.statistics import TableStatistics, statistics_of
from recis_hybrid.embedding.sweeps import CompactionSweep, EvictionSweep
from recis_hybrid.embedding.table.hash_table import Anchor, HashTable
from recis_hybrid.embedding.table.lookup import Lookup, Request
from recis_hybrid.embedding.table.tracking import LookupTracker
from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.validation import check_choice, check_flag, check_integer, check_type, describe_value

_T = TypeVar("_T")


@dataclass(frozen=True)
class EngineLookup:
    """The lookups of a batch, of each logical table and then of frozen features.

    Input of :meth:`EmbeddingEngine.apply_gradients`.
    """

    lookups: tuple[Lookup | ShardedLookup, ...]
    outputs: tuple[Outputs, ...]


@outside_graphs(
    "forward",
    "lookup",
    "apply_gradients",
    "add_gradients",
    "add_gradients",
    "distinct",
    "prefetch",
    "prefetch_rows",
    "has_read",
    "drop_prefetched",
    "evict",
    "compact",
    "memory",
    "track",
    "stats",
    "describe",
)
class EmbeddingEngine(SavedTables, LoadedTables, nn.Module):
    """Growing hash tables behind named features.

    Member tables with the same width, dtypes, record layout, placement and rules are coalesced into one logical table:
    one lookup, one gather and one update serve all of their features. In training mode (``train()``), a new id gets a
    row, if it is admitted. In evaluation mode (``eval()``), nothing changes, and an unknown id has the first value that
    its row would have.

    Backward accumulates gradients in the tables until an optimizer's ``step()`` uses them or ``zero_grad()`` drops
    them; until then, they take memory. To train only a tower, call the engine under ``torch.no_grad()``, or set
    ``trainable=False`` in its configs.

    If torch.distributed is initialized with several ranks, or a launcher such as torchrun has started several, they
    share the tables (``docs/distributed.md``): each rank passes its own batch, rows are distributed according to the
    configs' ``sharding``, and a step equals that of one process on all batches together. Ranks of a launcher join the
    process group here. Building the engine, lookups, an optimizer's ``step()``, and reading an anchor's ``grad``
    (which clipping does) are then collective: all ranks must do them in the same order.

    Args:
        configs: Configs by feature name, which is the name of the feature's column in the batch.
        optimizer: The optimizer that trains the tables; it determines the optimizer state of rows. A class of
            ``recis_hybrid.optim``, e.g. ``optim.Adam``, or one with hyperparameters, e.g.
            ``optim.SGD.spec(momentum=0.9)``; :meth:`make_optimizer` builds it. A config's ``optimizer`` replaces it for
            one table. None: rows only keep embeddings, which is enough for lookups, evaluation and serving, and for
            optimizers without state, e.g. ``optim.SGD(engine.parameters(), lr=0.1)``.
        seed: Seed of stochastic rounding and of the rows' first values, which depend only on the seed, the table's name
            and the id.
        device: Device of the outputs, and of tables without a ``placement``.
        coalesce: False gives every member table its own HashTable. Results are bitwise the same, except that
            ``clip_grad_norm_`` adds norms in float64 and rounds to float32, which may differ in one of some 10^8 steps.
        group: The process group whose ranks share the tables; None: all ranks; False: only this process.
        reduce: How the ranks' gradients for one row are combined. ``mean``: weighted by each rank's share of all
            samples, for losses that are means over a rank's samples. If all ranks have the same number of samples, this
            is what DistributedDataParallel does with towers (otherwise see :func:`mean_over_samples`). ``sum``: added.
            ``id``: added, and divided by the number of ranks that have a gradient for the row.
        wire_dtype: Dtype in which rows and gradients are sent between ranks; ids are always 64 bits. Each number is
            rounded once. The relative error is at most 2^-8 in bfloat16 and 2^-11 in float16. In float16, numbers below
            2^-14 have an absolute error of at most 2^-25, and numbers beyond 65,504 become infinite.
        deduplicate: Send distinct ids only; False sends the id of every position. Results are the same.
        prefetch_depth: Maximum number of batches that :meth:`prefetch` sends ahead; 0 disables it. None: 2 if there is
            or can be a process group for it, or if records are on disk, otherwise 0.
        staleness: 1 allows :meth:`prefetch_rows`.
        prefetch_group: A second process group of the same ranks, for prefetching alone; None makes one, if ``group`` is
            all ranks.
        rows_in_state_dict: What a model's ``state_dict`` contains of the tables. None: a placeholder key; loading it
            into empty tables fails, because rows are saved by Saver. ``embedding``: ids and embeddings. ``record``:
            also optimizer state, metadata and admission state, so that training resumes bitwise if the optimizer's
            ``state_dict`` is loaded, too. If ranks share the tables, ``state_dict`` is then collective and contains the
            rows of all ranks; any number of ranks can load it.
        pass_through: True if :meth:`forward` also returns the batch's other columns unchanged, i.e. those that are
            neither ids nor weights of a feature.

    Raises:
        RuntimeError: If a launcher has started several processes but they cannot be joined.
        TypeError: If a feature has no EmbeddingConfig, or a setting has the wrong type.
        ValueError: If there is no feature, features that share a table have different settings, an initializer's values
            exceed the dtype, this rank is not in the group, or a setting is not one of its choices.

    Example:
        >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=8), "user": EmbeddingConfig(dim=8)})
        >>> engine({"item": torch.tensor([3, -1]), "user": torch.tensor([7, 7])})["item"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        configs: Mapping[str, EmbeddingConfig],
        *,
        optimizer: type[Any] | OptimizerSpec | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        coalesce: bool = True,
        group: dist.ProcessGroup | Literal[False] | None = None,
        reduce: Literal["mean", "sum", "id"] = "mean",
        wire_dtype: torch.dtype = torch.float32,
        deduplicate: bool = True,
        prefetch_depth: int | None = None,
        staleness: Literal[0, 1] = 0,
        prefetch_group: dist.ProcessGroup | None = None,
        rows_in_state_dict: RowsInStateDict | None = None,
        pass_through: bool = False,
    ) -> None:
        super().__init__()
        check_configs(configs)
        self.optimizer_spec = OptimizerSpec.of("EmbeddingEngine", optimizer)
        """The optimizer whose state rows keep, except in tables with their own; None: rows keep no optimizer state."""
        seed = check_integer("EmbeddingEngine", "seed", seed)
        for name, flag in (("coalesce", coalesce), ("deduplicate", deduplicate), ("pass_through", pass_through)):
            check_flag("EmbeddingEngine", name, flag)
        if prefetch_depth is not None:
            check_integer("EmbeddingEngine", "prefetch_depth", prefetch_depth, low=0)
        check_choice("EmbeddingEngine", "staleness", staleness, (0, 1))
        refuse_settings(wire_dtype, reduce)
        refuse_rows_in_state_dict(rows_in_state_dict)
        self.configs = dict(configs)
        self.pass_through = pass_through
        """True if :meth:`forward` also returns columns that no feature reads."""
        self.rows_in_state_dict = rows_in_state_dict
        """Form of the rows in ``state_dict``; may be changed at any time."""
        self.device = output_device(device)
        self._samples: list[int] = []
        self._warned_of_dtype = self._warned_of_rows = False
        shared = group_of(group)
        self._build_tables(seed, coalesce, shared)
        for table in self.tables:
            # Not an explicit choice of the caller: training raises an error once there are other ranks.
            table.built_alone = group is None and shared is None
        self._sharded: ShardedTables | None = None
        if shared is not None:
            self._sharded = shard(
                self.tables,
                self.plans,
                self._reads,
                [reader.unknown for reader in self._readers],
                Exchange(shared, self.device),
                wire_dtype=wire_dtype,
                reduce=reduce,
                deduplicate=deduplicate,
                seed=seed,
            )
        self._build_prefetcher(prefetch_depth, staleness, prefetch_group)

    def make_optimizer(self, **hyperparameters: Any) -> Any:
        """Build the optimizer that the engine was built for, with the engine's tables as parameters.

        For an engine with ``optimizer=optim.Adam``, it is ``optim.Adam(engine.parameters(), **hyperparameters)``. A
        table whose config has an ``optimizer`` of its own is updated by that one, in its own parameter group, so that
        one ``step()``, one schedule and one part of a checkpoint serve all tables.

        Args:
            **hyperparameters: Arguments of the optimizer, e.g. ``lr=0.01``; they take precedence over those of
                ``optim.Adam.spec(...)``. They do not apply to tables with an optimizer of their own.

        Raises:
            RuntimeError: If the engine was built without an optimizer, and a trained table has none of its own.
            TypeError: If there are hyperparameters, but every trained table has an optimizer of its own.

        Example:
            >>> from recis_hybrid import optim
            >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=8)}, optimizer=optim.Adam)
            >>> engine.make_optimizer(lr=0.01).param_groups[0]["lr"]
            0.01
        """
        trained = [table for table in self.tables if not table.read_only]
        own = [table.optimizer for table in trained if table.optimizer is not None]
        only_own = 0 < len(own) == len(trained)
        spec = own[0] if only_own and self.optimizer_spec is None else self.optimizer_spec
        if spec is None:
            raise RuntimeError(
                "make_optimizer: the engine was built without an optimizer; build it with "
                "EmbeddingEngine(..., optimizer=optim.Adam) or another optimizer of recis_hybrid.optim"
            )
        if only_own and hyperparameters:
            raise TypeError(
                f"make_optimizer: {sorted(hyperparameters)} would apply to no table, because every trained table has "
                f"an optimizer of its own; set them in EmbeddingConfig, e.g. optimizer=optim.Adam.spec(lr=0.1)"
            )
        return spec.make(self.parameters(), **{**spec.hyperparameters, **hyperparameters})

    def _build_tables(self, seed: int, coalesce: bool, group: dist.ProcessGroup | None) -> None:
        rank, ranks = (0, 1) if group is None else (distributed.rank(group), distributed.world_size(group))
        row_state = () if self.optimizer_spec is None else self.optimizer_spec.row_state
        self.plans = plan_tables(self.configs, row_state, coalesce=coalesce, ranks=ranks)
        self._optional = [name for name, config in self.configs.items() if config.optional]
        self.tables = [self._table(plan, seed, rank, ranks) for plan in self.plans]
        self._reads = table_reads(self.plans)
        self._readers = [
            TableReader([FeatureReader(name, member, self.configs[name]) for name, member in read.features.items()])
            for read in self._reads
        ]
        for number, table in enumerate(self.tables):
            self.register_parameter(f"anchor{number}", table.anchor)

    def _build_prefetcher(self, depth: int | None, staleness: Literal[0, 1], group: dist.ProcessGroup | None) -> None:
        sharded = self._sharded
        on_disk = any(table.store.on_disk for table in self.tables)
        if depth is None:
            all_ranks = sharded is not None and sharded.exchange.size == distributed.world_size()
            depth = 2 if group is not None or all_ranks or (on_disk and sharded is None) else 0
        self._reads_ahead = on_disk and depth > 0
        self._last: Batch | None = None
        self.prefetch_depth = 0 if sharded is None and not on_disk else depth
        """Maximum number of batches that :meth:`prefetch` sends ahead; 0 on one process without records on disk."""
        self._prefetcher: Prefetcher | None = None
        if sharded is not None and depth > 0:
            self._prefetcher = Prefetcher(sharded, list(self.configs), depth=depth, staleness=staleness, group=group)

    def _table(self, plan: TablePlan, seed: int, rank: int, ranks: int) -> HashTable:
        config = plan.config
        table = HashTable(
            plan.members,
            layout_on(plan, rank, ranks),
            self.device,
            seed,
            placement=config.placement,
            admission=config.admission,
            buckets=owned_buckets(rank, ranks) if plan.sharding == "row" else (0, BUCKETS),
            read_only=not config.trainable,
        )
        table.optimizer, table.overrides = config.optimizer_spec, dict(config.optimizer_overrides or {})
        return table

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Look up a batch, differentiably.

        Args:
            batch: For each feature, a column of ids: int64 ``[B]``; ``[B, L]``, a bag of L ids per row;
                ``[B, L, K]``, a sequence of L bags per row; or a RaggedTensor, whose innermost lists are the bags. Also
                an array of numpy, pandas, JAX or another library with DLPack, or a list of numbers; arrays are never
                written to, and their memory is shared where possible. uint64 keeps its bits. Without
                ``jax_enable_x64``, JAX has int32 ids only. Columns of optional features may be missing. An engine on a
                GPU takes columns on the CPU too, and does not wait for their copies: memory that is pinned must not be
                overwritten before the GPU has read it.

        Raises:
            ExchangeError: If another rank could not look up its batch, died, or is in another mode.

        Returns:
            The vectors by feature, float32 and 64-byte aligned. ``[B, dim]``; for ids ``[B, L, K]``, ``[B, L, dim]``;
            for a RaggedTensor of two levels, ``[n, dim]``, a vector for each of the n inner lists of all rows, from
            which ``RaggedTensor(vectors, ids.outer[0]).to_padded()`` makes ``[B, L, dim]``. With the combiner
            ``tile``, ``dim`` is ``max_length * dim``. Without a combiner, each id has a vector: ``[B, L, dim]`` for
            ids ``[B, L]``, ``[n, dim]`` for the n ids of a RaggedTensor. Optional features that the batch lacks are
            omitted; with ``pass_through``, the batch's other columns are included.
        """
        results: dict[str, Tensor] = {}
        for read, (table, lookup, outputs) in zip(self._reads, self._look_up(batch), strict=True):
            trained = self.plans[read.table].config.trainable and not read.frozen
            takes_gradient = self.training and trained and torch.is_grad_enabled()
            values = (differentiable if takes_gradient else gather)(table, lookup, outputs)
            results.update(zip(read.features, values, strict=True))
        if len(self._reads) > 1:
            results = {name: results[name] for name in self.configs}
        for name in self._optional:
            if name not in batch:
                del results[name]
        if self.pass_through:
            ours = {*self.configs, *(config.weights for config in self.configs.values())}
            results.update({name: column for name, column in batch.items() if name not in ours})  # type: ignore[misc]
        return results

    @torch.no_grad()
    def lookup(self, batch: Batch) -> tuple[dict[str, Tensor], EngineLookup]:
        """Look up a batch without autograd.

        Returns:
            The values as :meth:`forward` returns them, and the lookup that :meth:`apply_gradients` needs.
        """
        found = list(self._look_up(batch))
        results: dict[str, Tensor] = {}
        for read, (table, lookup, outputs) in zip(self._reads, found, strict=True):
            results.update(zip(read.features, gather(table, lookup, outputs, keep_winners=True), strict=True))
        _, lookups, outputs_of = zip(*found, strict=True)
        present = [name for name in self.configs if name in batch or name not in self._optional]
        return {name: results[name] for name in present}, EngineLookup(lookups, outputs_of)

    def distinct(
        self, batch: Batch, features: Iterable[str], room: Callable[[str, int], int]
    ) -> tuple[Batch, dict[str, Tensor | RaggedTensor]]:
        """Replace columns by their distinct ids, so that a lookup returns each row once.

        The feature's vectors are ``[R, dim]``: a row per distinct id, whatever the combiner and the weights, and then
        zeros, which take no gradient. Admission counts an id once per batch. Waits for the device.

        Args:
            batch: As for :meth:`forward`.
            features: Names of the features; optional ones may be missing from the batch.
            room: (feature, number of distinct ids U) → R, which must be more than U.

        Returns:
            The batch for :meth:`lookup` or :meth:`forward`; and, by feature, the row of each id, int32 in the shape of
            dense ids, or a RaggedTensor of the innermost lists. Ids beyond ``max_length`` are omitted.

        Raises:
            KeyError: If the batch lacks a column, or a name is not a feature.

        Example:
            >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=8)})
            >>> batch, rows = engine.distinct({"item": torch.tensor([5, 7, 5])}, ["item"], lambda _, count: count + 1)
            >>> engine(batch)["item"].shape, rows["item"]
            (torch.Size([3, 8]), tensor([0, 1, 0], dtype=torch.int32))
        """
        columns, rows = distinct_columns(self._readers, batch, features, room, self.device)
        return {**batch, **columns}, rows  # type: ignore[dict-item]

    @torch.no_grad()
    def apply_gradients(self, ctx: EngineLookup, gradients: Mapping[str, Tensor], optimizer: RowOptimizer) -> None:
        """Update the rows of a lookup: one optimizer step.

        Args:
            ctx: Result of :meth:`lookup` in training mode.
            gradients: Gradients by feature, float32, for the values that :meth:`lookup` returned. Frozen features and
                optional features that the batch lacks need none.
            optimizer: An optimizer of ``recis_hybrid.optim``, built for this engine's parameters.

        Raises:
            KeyError: If a feature's gradient is missing, or a gradient belongs to no feature.
            RuntimeError: If rows of the lookup have been removed or moved since, or the lookup was in evaluation mode.
            TypeError: If the optimizer is not one of ``recis_hybrid.optim``.
            ValueError: If the optimizer lacks one of the tables; no row is changed.
        """
        if isinstance(optimizer, type) or not hasattr(optimizer, "update_table"):
            raise TypeError(
                f"apply_gradients: optimizer must be one of recis_hybrid.optim, e.g. optim.Adam(engine.parameters()), "
                f"got {describe_value(optimizer)}"
            )
        spreads = self._spread("apply_gradients", ctx, gradients)
        # Check everything before the first row changes.
        optimizer.check_tables([table.anchor for table, _, _ in spreads])
        ready = [(table.anchor, table.gradients_of(lookup, rows)) for table, lookup, rows in spreads]
        for anchor, summed in ready:
            optimizer.update_table(anchor, summed)

    @torch.no_grad()
    def add_gradients(self, ctx: EngineLookup, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of a lookup to those of the optimizer's next ``step()``, as backward does.

        Collective if ranks share the tables.

        Args:
            ctx: As for :meth:`apply_gradients`.
            gradients: As for :meth:`apply_gradients`. They must not be changed before the step.

        Raises:
            KeyError: As for :meth:`apply_gradients`.
            RuntimeError: As for :meth:`apply_gradients`.
            ValueError: If a gradient has another shape or dtype than the values.
        """
        for table, lookup, rows in self._spread("add_gradients", ctx, gradients):
            if self._sharded is not None:
                table.watch(lookup)
            table.add_gradients(lookup, rows)

    def _spread(
        self, where: str, ctx: EngineLookup, gradients: Mapping[str, Tensor]
    ) -> list[tuple[Any, Any, list[Tensor | None]]]:
        """Return each trained table with its lookup and its gradients, after checking these."""
        trained = [number for number, table in enumerate(self.tables) if not table.read_only]
        gradients = {**{name: self._empty_gradient(name) for name in self._optional}, **gradients}
        missing = [name for number in trained for name in self._reads[number].features if name not in gradients]
        if missing:
            raise KeyError(f"{where}: no gradient for the features {missing}")
        unknown = sorted(gradients.keys() - self.configs.keys())
        if unknown:
            raise KeyError(f"{where}: got gradients for {unknown}, which are not features of this engine")
        if not all(ctx.lookups[number].train for number in trained):
            raise RuntimeError(f"{where}: the lookup ran in evaluation mode; call train() before it")
        spreads = []
        for number in trained:
            table, lookup = self._rank_tables[number], ctx.lookups[number]
            of_features = [gradients[name] for name in self._reads[number].features]
            spreads.append((table, lookup, spread(table, lookup, ctx.outputs[number], of_features)))
        return spreads

    def describe_non_finite(self, batch: Batch, values: Mapping[str, Tensor]) -> list[str]:
        """Describe the features whose vectors or gradients contain NaN or infinities; waits for the device.

        Args:
            batch: The batch that was looked up.
            values: By feature, values in the shape of its output.

        Returns:
            For each such feature, its table, the number of vectors and the first ids, those with the smallest share of
            their vectors first; at most a few features. Empty if all values are finite.

        Example:
            >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=1)})
            >>> batch, gradient = {"item": torch.tensor([5, 7])}, torch.tensor([[0.0], [torch.nan]])
            >>> engine.describe_non_finite(batch, {"item": gradient})
            ["feature 'item' of the table 'item' (1 of 2 vectors, ids [7])"]
        """
        return non_finite_features(self._readers, batch, values)

    def _empty_gradient(self, name: str) -> Tensor:
        """Return the gradient of a feature without vectors."""
        return torch.empty(0, self.configs[name].width, device=self.device)

    @property
    def _rank_tables(self) -> Sequence[Any]:
        """The tables for lookups and gradients of this rank: each a ShardedTable if ranks share them."""
        return self.tables if self._sharded is None else self._sharded.tables[: len(self.tables)]

    def _look_up(self, batch: Batch) -> Iterator[tuple[AnyTable, Any, Outputs]]:
        """Yield the lookups of a batch, in the order of ``_reads``."""
        refuse_recording()
        if self._sharded is None:
            self._last = batch if self._reads_ahead else None
            for read, reader in zip(self._reads, self._readers, strict=True):
                table, train = self.tables[read.table], self.training and not read.frozen
                request, shapes = reader(batch, table.device)
                outputs = Outputs.of(request.bags.vectors, shapes, table, self.device)
                room = outputs.room(table) if train and request.bags.plain else None
                yield table, table.find(request, train=train, out=room, starts=outputs.starts), outputs
            return
        grad = torch.is_grad_enabled()
        lookups = self._look_up_sharded(self._sharded, batch, grad)
        for sharded, lookup in zip(self._sharded.tables, lookups, strict=True):
            if grad and lookup.train:
                sharded.watch(lookup)
            yield sharded, lookup, Outputs.of(lookup.request.bags.vectors, lookup.shapes, sharded, self.device)

    def _look_up_sharded(self, sharded: ShardedTables, batch: Batch, grad: bool) -> list[ShardedLookup]:
        """Look up a batch on all ranks, or take its prefetched lookups."""
        prefetched = None if self._prefetcher is None else self._prefetcher.take(batch, train=self.training, grad=grad)
        if prefetched is None:
            sharded.router.agree()
            prefetched = sharded.router.route(lambda: self._read(batch), train=self.training, grad=grad), None
        routed, lookups = prefetched
        self._samples = routed.samples
        lookups = sharded.lookups(routed) if lookups is None else lookups
        if self._reads_ahead and self._prefetcher is not None:
            self._prefetcher.read_records()
        return lookups

    def _read(self, batch: Batch) -> tuple[list[tuple[Request, list[tuple[int, ...]]]], int]:
        """Return the request of each lookup with the shapes of its outputs, and the number of samples."""
        reads = zip(self._reads, self._readers, strict=True)
        requests = [reader(batch, self.tables[read.table].device) for read, reader in reads]
        return requests, samples_of(batch, self.configs)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group that shares the tables; None if they are not shared."""
        return None if self._sharded is None else self._sharded.exchange.group

    @property
    def share(self) -> float:
        """This rank's share of all ranks' samples in the last batch."""
        if self._sharded is None:
            return 1.0
        return self._samples[self._sharded.exchange.rank] / max(sum(self._samples), 1)

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank has sent to others, by kind of message; all 0 on one process."""
        prefetched = Traffic() if self._prefetcher is None else self._prefetcher.exchange.traffic
        return prefetched if self._sharded is None else prefetched + self._sharded.exchange.traffic

    def watch_exchange(self, context: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Run every wait for other ranks, except those of prefetching, within a context, e.g. to time it.

        Args:
            context: Factory of the context; the default removes it.
        """
        if self._sharded is not None:
            self._sharded.exchange.wait_context = context

    def prefetch(self, batch: Batch) -> None:
        """Start sending the ids of a later batch to the ranks that own them, and return at once.

        Where records are on disk, this starts to read those of the batch. Results are the same as without it. All ranks
        must pass batches to the engine in the order in which they were prefetched, and in the same mode. Lookups of
        other batches may come between. With ``prefetch_depth=0``, and on one process without records on disk, nothing
        is done.

        Args:
            batch: As for :meth:`forward`, which is later called with the same columns.

        Raises:
            RuntimeError: If ``prefetch_depth`` batches are prefetched already.
        """
        if self._sharded is not None and self._prefetcher is not None:
            self._sharded.router.agree()
            self._prefetcher.send(batch, lambda: self._read(batch), train=self.training, grad=torch.is_grad_enabled())
            if self._reads_ahead:
                self._prefetcher.read_records()
        elif self._sharded is None and self._reads_ahead:
            for read, (request, _) in zip(self._reads, self._read(batch)[0], strict=True):
                if not read.frozen:
                    self.tables[read.table].prefetch(request)

    def has_read(self, batch: Batch) -> bool:
        """Return whether the last lookup read the columns of a batch, the same objects, so that prefetching pays.

        False where nothing can be prefetched: with ``prefetch_depth=0``, and on one process without records on disk.
        """
        if (last := self._last) is not None:
            return all(batch.get(name) is last.get(name) for name in self.configs)
        return self._prefetcher is not None and self._prefetcher.has_read(batch)

    def drop_prefetched(self) -> None:
        """Wait for the prefetched batches, and drop them; collective."""
        if self._prefetcher is not None:
            self._prefetcher.drop()

    def prefetch_rows(self) -> None:
        """Look up the first prefetched batch, and start sending its rows.

        Called before ``optimizer.step()``, it hides that exchange too, but the batch is computed with rows that miss
        one update, which changes results. The engine must have ``staleness=1``; without a prefetcher nothing is done.

        Raises:
            RuntimeError: If rows may not be stale, or no batch is prefetched.
        """
        if self._prefetcher is not None:
            self._prefetcher.look_up()

    @overload
    def evict(self, rule: EvictionRule | Mapping[str, EvictionRule]) -> int: ...

    @overload
    def evict(self, rule: EvictionRule | Mapping[str, EvictionRule], *, rows_per_call: int) -> EvictionSweep: ...

    def evict(
        self, rule: EvictionRule | Mapping[str, EvictionRule], *, rows_per_call: int | None = None
    ) -> int | EvictionSweep:
        """Erase the rows that a rule selects, and return their number on this process; collective if ranks share them.

        With ``rows_per_call``, the eviction is spread over calls, between which the training continues::

            eviction = engine.evict(Unused(steps=1000), rows_per_call=50_000)
            for batch in batches:
                train(batch)
                next(eviction, None)

        Args:
            rule: Applied to each member table of each trained table: an object such as :class:`Unused`, or a function
                that takes :class:`Rows` and returns bool ``[n]``. Or rules by name of the table
                (``EmbeddingConfig.table``, or else the feature's name). Tables without a rule keep their rows.
            rows_per_call: Number of rows, of all tables and ranks, to which the rules are applied in a call of the
                returned iterator; functions must decide about each row by itself. None: erase all rows now.

        Raises:
            OtherRankError: If another rank failed; no table is changed.
            RuntimeError: If a table has pending gradients, or a table with a rule of its own is not trained; no table
                is changed.
            TypeError: If a rule is not a rule, or does not return a bool tensor; no table is changed.
            ValueError: If that tensor does not have one element for each row, or there is no such table; no table is
                changed.

        Example:
            >>> from recis_hybrid.embedding import Unused
            >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=2), "user": EmbeddingConfig(dim=2)})
            >>> engine.evict({"item": Unused(steps=1000), "user": lambda rows: rows.frequency < 2})
            0
        """
        rules = self._eviction_rules(rule)
        tables = [(self.tables[number], each, self._shared_rows(number)) for number, each in rules]
        if rows_per_call is not None:
            rows_per_call = check_integer("EmbeddingEngine.evict", "rows_per_call", rows_per_call, low=1)
            rows = self._rows_of_all_ranks([number for number, _ in rules])
            return EvictionSweep(
                self._on_all_ranks(lambda: [(t, t.ranked(each, shared), shared) for t, each, shared in tables]),
                max(1, -(-rows // rows_per_call)),
            )
        # Apply the rules to all tables before the first row is erased.
        evicted = self._on_all_ranks(lambda: [(t, t.evicted_by(each, shared)) for t, each, shared in tables])
        return sum(table.erase_evicted(rows) for table, rows in evicted)

    def _on_all_ranks(self, function: Callable[[], _T]) -> _T:
        """Call a function, and raise on every rank if it raises on one; collective if ranks share tables."""
        if self.group is None:
            return function()
        try:
            result = function()
        except BaseException as error:
            distributed.all_succeed_or_raise(error, group=self.group)
            raise
        distributed.all_succeed_or_raise(None, group=self.group)
        return result

    def _shared_rows(self, number: int) -> SharedRows:
        """Return how ranks share the rows of a logical table."""
        sharding = self.plans[number].sharding
        return SharedRows(self.group, sharding in ("replicated", "column"), sharding == "column")

    def _rows_of_all_ranks(self, numbers: Sequence[int]) -> int:
        """Return the number of rows of logical tables, summed over the ranks; collective if ranks share them."""
        own = [len(self.tables[number]) for number in numbers]
        by_rank = [own] if self.group is None else distributed.exchange(own, self.group)
        return sum(
            max(counts) if self._shared_rows(number).everywhere else sum(counts)
            for number, counts in zip(numbers, zip(*by_rank, strict=True), strict=True)
        )

    def _eviction_rules(
        self, rule: EvictionRule | Mapping[str, EvictionRule]
    ) -> list[tuple[int, EvictionRule | Mapping[int, EvictionRule]]]:
        """Return the logical tables from which rows are evicted, each with its rule, or rules by member table."""
        if not isinstance(rule, Mapping):
            return [(number, rule) for number, table in enumerate(self.tables) if not table.read_only]
        unknown = sorted(rule.keys() - self._places.keys())
        if unknown:
            raise ValueError(f"evict: there are no tables {unknown}; the tables are {sorted(self._places)}")
        by_table: dict[int, dict[int, EvictionRule]] = {}
        for name, each in rule.items():
            number, member = self._places[name]
            by_table.setdefault(number, {})[member] = each
        return sorted(by_table.items())

    @overload
    def compact(self) -> None: ...

    @overload
    def compact(self, *, rows_per_call: int) -> CompactionSweep: ...

    def compact(self, *, rows_per_call: int | None = None) -> CompactionSweep | None:
        """Close the gaps between the rows of every table, and free memory.

        Args:
            rows_per_call: Spread the compaction over calls of ``next`` for the returned iterator, each for about this
                number of rows of this process; the training may continue in between. None: compact now.

        Raises:
            RuntimeError: If a table has pending gradients.
        """
        for table in self.tables:
            table.refuse_pending("compact")
        if rows_per_call is not None:
            rows_per_call = check_integer("EmbeddingEngine.compact", "rows_per_call", rows_per_call, low=1)
            return CompactionSweep(self.tables, rows_per_call)
        for table in self.tables:
            table.compact()
        return None

    def memory(self) -> dict[str, int]:
        """Return the bytes of each part, summed over all tables; see :meth:`HashTable.memory`."""
        reports = [table.memory() for table in self.tables]
        return {part: sum(report[part] for report in reports) for part in reports[0]}

    def track(self, hottest: int | None = 100) -> None:
        """Count the ids of training lookups from now on, for :meth:`stats` and the log of a Trainer.

        Counts start at 0. Lookups do not wait for the device. Counting alone costs next to nothing; frequent ids cost
        another pass over the ids of a lookup, and a few MiB for each logical table. Lookups inside ``jax.jit`` cannot
        be counted and raise an error.

        Args:
            hottest: Number of the most frequent ids to find for each member table; 0: only count; None: stop counting.
        """
        if hottest is not None:
            hottest = check_integer("EmbeddingEngine.track", "hottest", hottest, low=0)
        for table in self.tables:
            table.tracker = None
            if hottest is not None:
                table.tracker = LookupTracker(table.store.row_counts(), hottest, table.device)

    def stats(self, *, norms: bool = False) -> list[TableStatistics]:
        """Return the statistics of each logical table, in the order of ``tables``; waits for the device.

        Collective if ranks share the tables: figures cover the rows of all ranks. Reads the IDMap of tables with
        several member tables.

        Args:
            norms: Also compute the norms of the embeddings, which reads all rows, a few MiB at a time. Not available
                for tables with ``sharding="column"``.

        Raises:
            RuntimeError: If only some ranks track ids.

        Example:
            >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=8)})
            >>> engine.track(hottest=2)
            >>> _ = engine({"item": torch.tensor([5, 7, 5, 9, 5, 7])})
            >>> item = engine.stats()[0].members["item"]
            >>> item.rows, item.ids, item.new_rows, item.hit_rate
            (3, 6, 3, 0.5)
            >>> item.hottest
            (HotId(id=5, frequency=3, error=0), HotId(id=7, frequency=2, error=0))
        """
        return statistics_of(self.tables, self.plans, self.group, norms=norms)

    def describe(self) -> str:
        """Return a text table with one line per logical table: width, record, rows, memory, place, features, cache."""
        sizes = [(len(table), table.memory()["total"]) for table in self.tables]
        uses = [table.cache_statistics() for table in self.tables]
        hit_rates = [None if use is None else use.hit_rate for use in uses]
        return describe_plans(self.plans, sizes, hit_rates, self.device, sharded=self._sharded is not None)

    def extra_repr(self) -> str:
        """Return :meth:`describe`, for the module's repr."""
        return self.describe()

    def __prepare_scriptable__(self) -> EmbeddingEngine:
        """Refuse ``torch.jit.script`` for the engine and for models that contain one."""
        raise not_recorded("torch.jit.script")

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingEngine:
        """Apply a function to the module's tensors; tables keep their device and dtypes."""
        probe = fn(torch.empty(0, dtype=torch.float32, device=self.device))
        if probe.device.type == "meta":
            raise RuntimeError(
                "EmbeddingEngine: tables cannot be on the meta device, because they have no fixed size; move only "
                "the towers, e.g. model.tower.to('meta')"
            )
        if probe.is_cpu and probe.is_shared():
            raise RuntimeError(
                "EmbeddingEngine: tables cannot be shared with other processes by share_memory(); start ranks with "
                "torchrun, which share tables through torch.distributed"
            )
        if probe.device != self.device:
            raise RuntimeError(
                f"EmbeddingEngine: tables cannot be moved from {self.device} to {probe.device}; "
                f"build the engine with device={str(probe.device)!r}, and load a checkpoint into it"
            )
        stored = {table.layout.dtype for table in self.tables}
        converted = {dtype for dtype in stored if fn(torch.empty(0, dtype=dtype, device=self.device)).dtype != dtype}
        if (converted or probe.dtype != torch.float32) and not self._warned_of_dtype:
            self._warned_of_dtype = True
            names = ", ".join(sorted(str(dtype) for dtype in stored))
            warnings.warn(
                f"EmbeddingEngine: tables keep the dtypes of their configs ({names}) and return float32, but the "
                f"rest of the model becomes {probe.dtype}. Set EmbeddingConfig(dtype=) for tables; cast the outputs "
                f"for a tower in another dtype, or run it under torch.autocast",
                stacklevel=3,
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for number in range(len(self.tables)):
            destination.pop(f"{prefix}anchor{number}", None)
        if are_tables_apart():
            return
        refuse_rows_in_state_dict(self.rows_in_state_dict)
        if self.rows_in_state_dict is not None:
            exchange = None if self._sharded is None else self._sharded.exchange
            state = self.checkpoint_state()
            save_rows(self.tables, state, self.rows_in_state_dict, destination, prefix, exchange)
            return
        save_key(self.tables, destination, prefix)
        if not self._warned_of_rows and any(len(table) for table in self.tables):
            self._warned_of_rows = True
            warn_of_rows_left_out()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Anchors have no state, so they are neither loaded nor reported as missing.
        rest = {key: value for key, value in state_dict.items() if not belongs_to_tables(key, prefix)}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if not belongs_to_tables(key, prefix))
        if not are_tables_apart():
            load_rows(self.tables, state_dict, prefix, self.checkpoint_buckets, missing_keys, error_msgs)


def dense_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that are not embedding tables, for torch.optim."""
    check_type("dense_parameters", "module", module, nn.Module, "a torch.nn.Module")
    return [parameter for parameter in module.parameters() if not isinstance(parameter, Anchor)]
