"""EmbeddingEngine: a Batch in, vectors by feature out; gradients back into the tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recis_hybrid.checkpointing import are_tables_apart
from recis_hybrid.embedding.checkpoint.mixin import CheckpointedTables
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
from recis_hybrid.embedding.config import EmbeddingConfig
from recis_hybrid.embedding.distributed.exchange import Exchange, Traffic, group_of
from recis_hybrid.embedding.distributed.prefetch import Prefetcher
from recis_hybrid.embedding.distributed.sharded_table import ShardedLookup, ShardedTables, refuse_settings, shard
from recis_hybrid.embedding.eviction import Eviction
from recis_hybrid.embedding.inputs import FeatureReader, TableReader, samples_of
from recis_hybrid.embedding.optimizer import OptimizerSpec, RowOptimizer
from recis_hybrid.embedding.placement import device_of
from recis_hybrid.embedding.planner.coalesce import TablePlan, describe_plans, layout_on, plan_tables
from recis_hybrid.embedding.pooling import AnyTable, Outputs, differentiable, gather, spread
from recis_hybrid.embedding.table.hash_table import Anchor, HashTable
from recis_hybrid.embedding.table.lookup import Lookup, Request
from recis_hybrid.ragged import Batch
from recis_hybrid.validation import check_choice, check_flag, check_integer, check_type, describe_value


@dataclass(frozen=True)
class EngineLookup:
    """Which rows a batch met, and what the gradients need: one of each for each logical table."""

    lookups: tuple[Lookup | ShardedLookup, ...]
    outputs: tuple[Outputs, ...]


@outside_graphs(
    "forward",
    "lookup",
    "apply_gradients",
    "prefetch",
    "prefetch_rows",
    "drop_prefetched",
    "evict",
    "compact",
    "memory",
    "describe",
)
class EmbeddingEngine(CheckpointedTables, nn.Module):
    """Growing hash tables behind named features.

    Member tables that agree in width, dtypes, record layout, placement and rules are coalesced into one logical table:
    one lookup, one gather and one update serve all of their features. In training mode (``train()``) an id that is met
    for the first time gets a row, if it is admitted; in evaluation mode (``eval()``) nothing is changed, and an unknown
    id counts with the first value it would have.

    Backward leaves gradients at the tables, batch after batch, until an optimizer's ``step()`` uses them or a
    ``zero_grad()`` forgets them; until then each batch's take memory. Where only a tower is to be trained, call the
    engine under ``torch.no_grad()``, or give its configs ``trainable=False``.

    Where torch.distributed is initialised with several ranks, or a launcher such as torchrun has started several, which
    then join here, they share the tables (``docs/distributed.md``): each rank gives its own batch, rows lie where their
    configs' ``sharding`` says, and a step is that of one process on all batches together. Building, lookups, an
    optimizer's ``step()``, and reading an anchor's ``grad``, as clipping does, are then for all ranks together, in the
    same order.

    Args:
        configs: By feature name, the name of its column in the batch.
        optimizer: The optimizer that trains the tables, which decides what state their rows keep: a class of
            ``recis_hybrid.optim``, as ``optim.Adam``, or one with hyperparameters, as ``optim.SGD.spec(momentum=0.9)``;
            :meth:`make_optimizer` makes it. None: rows keep embeddings alone, which is enough for lookups, evaluation
            and serving, and for optimizers without state, as ``optim.SGD(engine.parameters(), lr=0.1)``.
        seed: Of the rows' first values, which depend on it, the table's name and the id alone, and of rounding.
        device: Where the outputs are, and the tables whose config does not say.
        coalesce: False gives every member table a HashTable of its own. The numbers are the same, bit for bit. Where
            ``clip_grad_norm_`` clips, that rests on norms that are added up in float64 and rounded to float32: in one
            step of some 10^8 they may round otherwise.
        group: The ranks that share the tables; None: all; False: this process has tables of its own.
        reduce: How the gradients that ranks have for a row become one. ``mean``: each rank's counts by its share of all
            ranks' samples, which fits losses that are means over a rank's samples, and where all have equally many is
            what DistributedDataParallel does with towers (else see :func:`mean_over_samples`). ``sum``: they are added.
            ``id``: their sum over the number of ranks that have one for the row.
        wire_dtype: In which rows and gradients travel between ranks; ids are 64 bits always. Each number is rounded to
            it once: by at most 2^-8 of itself in bfloat16; in float16 by 2^-11, but by 2^-25 below 2^-14, and beyond
            65,504 it becomes infinite.
        deduplicate: False sends the id of every position, and not only distinct ones; the numbers are the same.
        prefetch_depth: The most batches that :meth:`prefetch` sends ahead; 0: it does nothing. None: 2 where there is
            or can be made a group for it, else 0; and a batch that then comes with other columns, which a model has
            made, ends the prefetching in the place of an error.
        staleness: 1 allows :meth:`prefetch_rows`.
        prefetch_group: The ranks of ``group`` once more, in a process group for prefetching alone; None makes one,
            where the group is all ranks.
        rows_in_state_dict: What a model's ``state_dict`` has of the tables. None: a key that stands for them; loading
            it into empty tables fails, as Saver is how rows are saved. ``embedding``: ids and embeddings. ``record``:
            also optimizer state, metadata and what admission knows, so that with the optimizer's ``state_dict``
            training goes on bitwise. Where ranks share the tables, ``state_dict`` then gathers the rows of all on
            each, and is for all ranks together; any number of ranks can load it.
        pass_through: Whether :meth:`forward` hands on the batch's other columns, too, as they are: those that are
            neither ids nor weights of a feature.

    Raises:
        RuntimeError: If a launcher has started several processes and they cannot be joined.
        TypeError: If a feature has no EmbeddingConfig, or a setting is of another kind.
        ValueError: If there is no feature, features that share a table disagree about it, an initializer's values are
            beyond the dtype, this rank is not in the group, or a setting is none of the choices.

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
        _check_configs(configs)
        self.optimizer_spec = OptimizerSpec.of(optimizer)
        """The optimizer that the rows keep state for; None: they keep none."""
        seed = check_integer("EmbeddingEngine", "seed", seed)
        for name, flag in (("coalesce", coalesce), ("deduplicate", deduplicate), ("pass_through", pass_through)):
            check_flag("EmbeddingEngine", name, flag)
        if prefetch_depth is not None:
            check_integer("EmbeddingEngine", "prefetch_depth", prefetch_depth, low=0)
        check_choice("EmbeddingEngine", "staleness", staleness, (0, 1))
        self.configs = dict(configs)
        self.pass_through = pass_through
        """Whether :meth:`forward` returns columns that no feature reads."""
        self.device = device_of(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"EmbeddingEngine: device must be 'cpu' or 'cuda', got {str(self.device)!r}")
        refuse_settings(wire_dtype, reduce)
        shared = group_of(group)
        # By nobody's choice: it is an error once there are other ranks.
        alone = group is None and shared is None
        rank, ranks = (0, 1) if shared is None else (dist.get_rank(shared), dist.get_world_size(shared))
        row_state = () if self.optimizer_spec is None else self.optimizer_spec.row_state
        self.plans = plan_tables(self.configs, row_state, coalesce=coalesce, ranks=ranks)
        self._optional = [name for name, config in self.configs.items() if config.optional]
        self.tables = [self._table(plan, seed, rank, ranks) for plan in self.plans]
        for table in self.tables:
            table.built_alone = alone
        self._readers = [
            TableReader([FeatureReader(name, member, self.configs[name]) for name, member in plan.features.items()])
            for plan in self.plans
        ]
        self._sharded: ShardedTables | None = None
        if shared is not None:
            self._sharded = shard(
                self.tables,
                self.plans,
                [reader.unknown for reader in self._readers],
                Exchange(shared, self.device),
                wire_dtype=wire_dtype,
                reduce=reduce,
                deduplicate=deduplicate,
                seed=seed,
            )
        self._samples: list[int] = []
        self._warned_of_dtype = self._warned_of_rows = False
        refuse_rows_in_state_dict(rows_in_state_dict)
        self.rows_in_state_dict = rows_in_state_dict
        """Form of the rows in ``state_dict``; it may be set at any time."""
        explicit = prefetch_depth is not None
        if prefetch_depth is None:
            prefetch_depth = 2 if prefetch_group is not None or (ranks > 1 and ranks == dist.get_world_size()) else 0
        self.prefetch_depth = prefetch_depth if self._sharded is not None else 0
        """The most batches that :meth:`prefetch` sends ahead; 0 on one process."""
        self._prefetcher: Prefetcher | None = None
        if self._sharded is not None and self.prefetch_depth > 0:
            self._prefetcher = Prefetcher(
                self._sharded,
                list(configs),
                depth=self.prefetch_depth,
                staleness=staleness,
                group=prefetch_group,
                strict=explicit,
                optional=self._optional,
            )
        for number, table in enumerate(self.tables):
            self.register_parameter(f"anchor{number}", table.anchor)

    def make_optimizer(self, **hyperparameters: Any) -> Any:
        """Return the optimizer that the engine was built for, over its tables.

        The same as ``optim.Adam(engine.parameters(), **hyperparameters)`` for an engine with ``optimizer=optim.Adam``.

        Args:
            **hyperparameters: Arguments of the optimizer, as ``lr=0.01``; they take precedence over those of
                ``optim.Adam.spec(...)``.

        Raises:
            RuntimeError: If the engine was built without an optimizer.

        Example:
            >>> from recis_hybrid import optim
            >>> engine = EmbeddingEngine({"item": EmbeddingConfig(dim=8)}, optimizer=optim.Adam)
            >>> engine.make_optimizer(lr=0.01).param_groups[0]["lr"]
            0.01
        """
        spec = self.optimizer_spec
        if spec is None:
            raise RuntimeError(
                "make_optimizer: the engine was built without an optimizer; build it with "
                "EmbeddingEngine(..., optimizer=optim.Adam), or one of the others of recis_hybrid.optim"
            )
        return spec.make(self.parameters(), **{**spec.hyperparameters, **hyperparameters})

    def _table(self, plan: TablePlan, seed: int, rank: int, ranks: int) -> HashTable:
        config = plan.config
        table = HashTable(
            plan.members,
            layout_on(plan, rank, ranks),
            self.device,
            seed,
            placement=config.placement,
            admission=config.admission,
            read_only=not config.trainable,
        )
        table.overrides = dict(config.optimizer_overrides or {})
        return table

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Look a batch up, differentiably.

        Args:
            batch: For each feature a column of ids: int64 ``[B]``; ``[B, L]``, a bag of L ids a row; ``[B, L, K]``, a
                sequence of L bags a row; or a RaggedTensor, whose innermost lists are the bags. Also an array of numpy,
                pandas, JAX or another library that speaks DLPack, or a list of numbers, of which none is written to,
                and whose memory is shared where it can be. uint64 keeps its bits. While ``jax_enable_x64`` is off, JAX
                has int32 ids alone. Columns of features that are optional may be missing.

        Raises:
            ExchangeError: If another rank could not look its batch up, died, or is in another mode.

        Returns:
            By feature, float32; each starts at a multiple of 64 bytes. ``[B, dim]``; for ids ``[B, L, K]``
            ``[B, L, dim]``; for a RaggedTensor of two levels ``[n, dim]``, a vector for each of the n inner lists of
            all rows, which ``RaggedTensor(vectors, ids.outer[0]).to_padded()`` makes ``[B, L, dim]``. Where the
            combiner is ``tile``, ``max_length * dim`` stands for ``dim``. Where it is None, each id has a vector:
            ``[B, L, dim]`` for ids ``[B, L]``, ``[n, dim]`` for the n ids of a RaggedTensor. Nothing for an optional
            feature that the batch lacks, and with ``pass_through`` the batch's other columns.
        """
        results: dict[str, Tensor] = {}
        for plan, (table, lookup, outputs) in zip(self.plans, self._found(batch), strict=True):
            takes_gradient = self.training and plan.config.trainable and torch.is_grad_enabled()
            values = (differentiable if takes_gradient else gather)(table, lookup, outputs)
            results.update(zip(plan.features, values, strict=True))
        made = results if len(self.tables) == 1 else {name: results[name] for name in self.configs}
        for name in self._optional:
            if name not in batch:
                del made[name]
        if self.pass_through:
            read = {*self.configs, *(config.weights for config in self.configs.values())}
            made.update({name: column for name, column in batch.items() if name not in read})  # type: ignore[misc]
        return made

    @torch.no_grad()
    def lookup(self, batch: Batch) -> tuple[dict[str, Tensor], EngineLookup]:
        """Look a batch up without autograd.

        Returns:
            The values as :meth:`forward` gives them, and what :meth:`apply_gradients` needs.
        """
        found = list(self._found(batch))
        results: dict[str, Tensor] = {}
        for plan, (table, lookup, outputs) in zip(self.plans, found, strict=True):
            results.update(zip(plan.features, gather(table, lookup, outputs, keep_winners=True), strict=True))
        _, lookups, outputs_of = zip(*found, strict=True)
        there = [name for name in self.configs if name in batch or name not in self._optional]
        return {name: results[name] for name in there}, EngineLookup(lookups, outputs_of)

    @torch.no_grad()
    def apply_gradients(self, ctx: EngineLookup, gradients: Mapping[str, Tensor], optimizer: RowOptimizer) -> None:
        """Update the rows of a lookup: one optimizer step.

        Args:
            ctx: From :meth:`lookup` in training mode.
            gradients: By feature, float32: of what :meth:`lookup` returned. Those of read-only tables are not needed,
                nor those of optional features that the batch lacked.
            optimizer: One of ``recis_hybrid.optim``, built over this engine's parameters.

        Raises:
            KeyError: If a feature's gradient is missing, or one is of no feature.
            RuntimeError: If rows of the lookup have been cleared or moved since, or it was made in evaluation mode.
            TypeError: If the optimizer is none of ``recis_hybrid.optim``.
            ValueError: If it was built over other tables, or some of these; no row is changed.
        """
        if isinstance(optimizer, type) or not hasattr(optimizer, "update_table"):
            raise TypeError(
                f"apply_gradients: optimizer must be one of recis_hybrid.optim, as optim.Adam(engine.parameters()), "
                f"got {describe_value(optimizer)}"
            )
        trained = [number for number, table in enumerate(self.tables) if not table.read_only]
        gradients = {**{name: self._nothing(name) for name in self._optional}, **gradients}
        missing = [name for number in trained for name in self.plans[number].features if name not in gradients]
        if missing:
            raise KeyError(f"apply_gradients: no gradient for the features {missing}")
        unknown = sorted(gradients.keys() - self.configs.keys())
        if unknown:
            raise KeyError(f"apply_gradients: there are gradients of {unknown}, which are no features of this engine")
        if not all(ctx.lookups[number].train for number in trained):
            raise RuntimeError("apply_gradients: the lookup was made in evaluation mode; call train() before it")
        # All of it is checked before the first row changes.
        optimizer.check_tables([self._faces[number].anchor for number in trained])
        ready = []
        for number in trained:
            table, lookup = self._faces[number], ctx.lookups[number]
            rows = spread(table, lookup, ctx.outputs[number], [gradients[name] for name in self.plans[number].features])
            ready.append((table.anchor, table.gradients_of(lookup, rows)))
        for anchor, summed in ready:
            optimizer.update_table(anchor, summed)

    def _nothing(self, name: str) -> Tensor:
        """Return the gradient of a feature without vectors."""
        return torch.empty(0, self.configs[name].width, device=self.device)

    @property
    def _faces(self) -> Sequence[Any]:
        """The tables as lookups and gradients of this rank see them."""
        return self.tables if self._sharded is None else self._sharded.tables

    def _found(self, batch: Batch) -> Iterator[tuple[AnyTable, Any, Outputs]]:
        """Look a batch up in one table after another."""
        refuse_recording()
        if self._sharded is None:
            for table, reader in zip(self.tables, self._readers, strict=True):
                request, shapes = reader(batch, table.device)
                outputs = Outputs.of(request.bags.vectors, shapes, table, self.device)
                room = outputs.room(table) if self.training and request.bags.plain else None
                yield table, table.find(request, train=self.training, out=room, starts=outputs.starts), outputs
            return
        grad = torch.is_grad_enabled()
        for face, own in zip(self._sharded.tables, self._met(self._sharded, batch, grad), strict=True):
            if grad and own.train:
                face.watch(own)
            yield face, own, Outputs.of(own.request.bags.vectors, own.shapes, face, self.device)

    def _met(self, sharded: ShardedTables, batch: Batch, grad: bool) -> list[ShardedLookup]:
        """Look a batch up on all ranks, or take what was prefetched of it."""
        ahead = None if self._prefetcher is None else self._prefetcher.take(batch, train=self.training, grad=grad)
        if ahead is None:
            sharded.router.agree()
            ahead = sharded.router.route(lambda: self._read(batch), train=self.training, grad=grad), None
        routed, lookups = ahead
        self._samples = routed.samples
        return sharded.lookups(routed) if lookups is None else lookups

    def _read(self, batch: Batch) -> tuple[list[tuple[Request, list[tuple[int, ...]]]], int]:
        """Return the ids of all features by table, and how many samples there are."""
        requests = [reader(batch, table.device) for table, reader in zip(self.tables, self._readers, strict=True)]
        return requests, samples_of(batch, self.configs)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that have the tables together; None where this process has them all."""
        return None if self._sharded is None else self._sharded.exchange.group

    @property
    def share(self) -> float:
        """This rank's share of the samples that all ranks had in the last batch."""
        if self._sharded is None:
            return 1.0
        return self._samples[self._sharded.exchange.rank] / max(sum(self._samples), 1)

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank has sent to others, by what they were; all 0 on one process."""
        ahead = Traffic() if self._prefetcher is None else self._prefetcher.exchange.traffic
        return ahead if self._sharded is None else ahead + self._sharded.exchange.traffic

    def watch_exchange(self, watched: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Has every wait for other ranks, but for those of prefetching, happen within a context, which may time it.

        Args:
            watched: Makes the context; nothing ends it.
        """
        if self._sharded is not None:
            self._sharded.exchange.watched = watched

    def prefetch(self, batch: Batch) -> None:
        """Begins to send the ids of a batch that comes later to where they are looked up, and returns at once.

        The numbers are the same as without it. Batches have to come to the engine in the order of their prefetches, in
        the same mode, all ranks alike. Where ``prefetch_depth`` is 0, and on one process, it does nothing.

        Args:
            batch: As for :meth:`forward`, which is later given the same columns.

        Raises:
            RuntimeError: If ``prefetch_depth`` batches are on their way.
        """
        if self._sharded is not None and self._prefetcher is not None:
            self._sharded.router.agree()
            self._prefetcher.send(batch, lambda: self._read(batch), train=self.training, grad=torch.is_grad_enabled())

    def drop_prefetched(self) -> None:
        """Wait for the batches that are on their way, and forgets them; all ranks call it together."""
        if self._prefetcher is not None:
            self._prefetcher.drop()

    def prefetch_rows(self) -> None:
        """Look up the first batch that is on its way, and begins to send its rows.

        Called before ``optimizer.step()`` it hides that, too, and the batch is computed with rows that miss one update:
        the numbers are others. It is allowed where the engine was built with ``staleness=1``; where nothing is
        prefetched it does nothing.

        Raises:
            RuntimeError: If rows may not be stale, or no batch is on its way.
        """
        if self._prefetcher is not None:
            self._prefetcher.look_up()

    def evict(self, rule: Eviction) -> int:
        """Give up the rows that a rule names, in every table that is trained. Returns how many this process had.

        Args:
            rule: Asked about each table.

        Raises:
            RuntimeError: If gradients wait for rows of a table; none is changed.
            TypeError: If it is no rule, or does not return a tensor of bool; none is changed.
            ValueError: If that does not have as many elements as the table has rows; none is changed.
        """
        # The rule is applied to all tables before the first row is erased.
        evicted = [(table, table.evicted_by(rule)) for table in self.tables if not table.read_only]
        return sum(table.erase_evicted(rows) for table, rows in evicted)

    def compact(self) -> None:
        """Move the rows of every table together and give memory back."""
        for table in self.tables:
            table.refuse_pending("compact")
        for table in self.tables:
            table.compact()

    def memory(self) -> dict[str, int]:
        """Return the bytes that each part of the tables holds, over all tables; see :meth:`HashTable.memory`."""
        reports = [table.memory() for table in self.tables]
        return {part: sum(report[part] for report in reports) for part in reports[0]}

    def describe(self) -> str:
        """Return a text table with a line for each logical table: width, records, rows, memory, place and features."""
        sizes = [(len(table), table.memory()["total"]) for table in self.tables]
        return describe_plans(self.plans, sizes, self.device, sharded=self._sharded is not None)

    def extra_repr(self) -> str:
        """Return :meth:`describe`, for the module's repr."""
        return self.describe()

    def __prepare_scriptable__(self) -> EmbeddingEngine:
        """Refuses ``torch.jit.script``, of the engine and of a model that has one."""
        raise not_recorded("torch.jit.script")

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingEngine:
        """Apply a function to the module's tensors; tables keep their device and dtypes."""
        probe = fn(torch.empty(0, dtype=torch.float32, device=self.device))
        if probe.device.type == "meta":
            raise RuntimeError(
                "EmbeddingEngine: tables have no form on the meta device, and no sizes to be known before; move the "
                "towers alone, as model.tower.to('meta')"
            )
        if probe.is_cpu and probe.is_shared():
            raise RuntimeError(
                "EmbeddingEngine: tables cannot be shared with other processes by share_memory(); start ranks with "
                "torchrun, which share tables by torch.distributed"
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
                f"EmbeddingEngine: tables keep the dtypes of their configs ({names}), and their outputs stay float32, "
                f"where the rest of the model becomes {probe.dtype}. Set EmbeddingConfig(dtype=) for tables; cast the "
                f"outputs for a tower in another dtype, or run it under torch.autocast",
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
        # Anchors mean nothing: neither is one that is there loaded, nor one that is not there missed.
        rest = {key: value for key, value in state_dict.items() if not belongs_to_tables(key, prefix)}
        missed: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missed, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missed if not belongs_to_tables(key, prefix))
        if not are_tables_apart():
            load_rows(self.tables, state_dict, prefix, self.checkpoint_buckets, missing_keys, error_msgs)


def _check_configs(configs: object) -> None:
    """Raise TypeError or ValueError unless configs are given by feature name, at least one."""
    if not isinstance(configs, Mapping):
        raise TypeError(
            f"EmbeddingEngine: configs must be a mapping from features to configs, as "
            f"{{'item': EmbeddingConfig(dim=16)}}, got {describe_value(configs)}"
        )
    for name in configs:
        if not isinstance(name, str):
            raise TypeError(f"EmbeddingEngine: the names of features must be strings, got {name!r}")
    if not configs:
        raise ValueError("EmbeddingEngine: configs must have at least one feature, got none")


def dense_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module that are not embedding tables: what to give to torch.optim."""
    check_type("dense_parameters", "module", module, nn.Module, "a torch.nn.Module")
    return [parameter for parameter in module.parameters() if not isinstance(parameter, Anchor)]
