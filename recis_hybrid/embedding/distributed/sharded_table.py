"""Tables whose rows are distributed over several ranks.

The id space is divided into 65,536 buckets. Each rank owns a contiguous range of them (``dedup.rank_of``), and its
HashTable holds their rows. A batch takes these steps, with all features of a logical table together:

1. Each rank finds the distinct (member table, id) of its batch and sorts them by owner (``dedup``).
2. ``Exchange.sizes``: ranks exchange the number of ids for every table, the number of samples, and whether they failed.
3. Ids are sent to their owners.
4. Each owner looks up the received ids in rank order (inserting them in training only) and sends the rows back. Each
   rank pools its bags from the received rows, with the kernel that pools from blocks.
5. Backward leaves gradients on the rank. When an optimizer steps, or a norm is read, each rank sums the gradients of
   each distinct id and sends the sums to the owners (``gradient_exchange``). They enter the owner's table as gradients
   of one lookup whose features are the ranks, so that the update adds them in rank order, as one process would.

Steps 1 to 3 access no table, so they may run ahead of the batch (``prefetch``). In a replicated table, every rank owns
every id, and no rows are sent back. If a table is on one rank, that rank owns all its ids. If a table is split by
column, every rank owns every id, but has only some elements of each row: step 4 joins them, step 5 splits them.

Every rank takes part in every exchange, even with nothing to send.

Letters: N positions, U distinct ids of this rank's batch, R ids requested from this rank, W ranks, K kinds, D dim.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import get_args

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import copied, numbers_on
from recis_hybrid.embedding.distributed.column_split import side_by_side
from recis_hybrid.embedding.distributed.dedup import Kind
from recis_hybrid.embedding.distributed.exchange import WIRE_DTYPES, Exchange, Transfer
from recis_hybrid.embedding.distributed.gradient_exchange import GradientExchange, Reduce, SharedLookup
from recis_hybrid.embedding.distributed.id_exchange import Route, RoutedBatch, Router, Shapes, TableRouting
from recis_hybrid.embedding.planner.coalesce import TablePlan, TableRead, owners_of
from recis_hybrid.embedding.planner.sharding import columns_of
from recis_hybrid.embedding.table.gradients import gradient_part
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.lookup import Lookup, Request, gradient_bags
from recis_hybrid.ops.blocks import ELEMENTS, Blocks
from recis_hybrid.ops.gather import Bags
from recis_hybrid.ops.update import Gradients


@dataclass(eq=False)
class Reply:
    """Rows of the received ids, looked up but not sent back yet."""

    route: Route
    shared: SharedLookup
    rows: Tensor | None
    """``[R, D]`` in the wire dtype; None if every rank has the rows."""


@dataclass(eq=False)
class ShardedLookup:
    """A lookup of this rank's batch in a shared table; pooling uses it like a Lookup."""

    request: Request
    shapes: Shapes
    """Shapes of its features' outputs."""
    places: Tensor
    """int64 ``[N]``: the distinct id of each position."""
    shared: SharedLookup
    """The lookup of all ranks that this one is part of."""
    received: Tensor
    """``[U, D]`` in the wire dtype: the rows of its distinct ids, padded by ``_padded``."""
    own: Lookup | None
    """Lookup in this rank's rows, used instead of ``received`` if the table is replicated."""
    gathered: Tensor | None = None
    """As in a Lookup; None, because vectors are always gathered later."""

    @property
    def train(self) -> bool:
        """True for a training lookup, whose rows may take gradients."""
        return self.shared.owned.train


class ShardedTable:
    """A logical table shared by ranks: this rank's HashTable together with those of the other ranks.

    Args:
        table: This rank's part.
        kinds: Kinds of ids looked up in the table.
        kind_of: For each feature, the number of its kind.
        frozen: Look up as in evaluation, and take no gradients: the frozen features of a table that others train.
        everywhere: Send all ids to all ranks.
        columns: For each rank, the number of its elements of every row; None: rows are whole.
        exchange: Collectives of the ranks that share the table.
        wire_dtype: Dtype in which rows and gradients are sent.
        reduce: How the ranks' gradients for one row are combined.
    """

    def __init__(
        self,
        table: HashTable,
        kinds: list[Kind],
        kind_of: list[int],
        *,
        frozen: bool,
        everywhere: bool,
        columns: list[int] | None,
        exchange: Exchange,
        wire_dtype: torch.dtype,
        reduce: Reduce,
    ) -> None:
        self.table = table
        self.frozen = frozen
        counted = not (table.read_only or frozen)
        self.routing = TableRouting(kinds, kind_of, everywhere, columns, counted, table.device)
        self.replicated = everywhere and columns is None
        self.exchange = exchange
        self.wire_dtype = wire_dtype
        self.layout = table.layout.whole
        self.device = table.device
        self.read_only = table.read_only
        self.anchor = table.anchor
        self.gradients = GradientExchange(
            table, exchange, wire_dtype=wire_dtype, reduce=reduce, routing=self.routing, dim=self.layout.dim
        )
        if not frozen:
            table.remote = self.gradients

    def look_up(self, route: Route, weight: float, *, train: bool) -> Reply:
        """Look up the received ids, and read their rows unless the table is replicated."""
        lengths = route.lengths
        owned = self.table.find(self._request(route), train=train and not self.frozen)
        shared = SharedLookup(owned, route.send, route.receive, weight, route.groups)
        if self.replicated:
            return Reply(route, shared, None)
        dim = self.table.layout.dim
        rows = ops.memory.empty((route.ids.numel(), dim), torch.float32, self.device)
        self.table.gather(owned, rows.view(-1), [dim * start for start in accumulate(lengths[:-1], initial=0)])
        return Reply(route, shared, rows.to(self.wire_dtype))

    def prefetch(self, route: Route) -> None:
        """Start to read the records of the received ids, if they are on disk."""
        if not self.frozen:
            self.table.prefetch(self._request(route))

    def _request(self, route: Route) -> Request:
        ranks, kinds = self.exchange.size, self.routing.kinds
        return Request(
            list(route.ids.split(route.lengths)),
            [kind.member for kind in kinds] * ranks,
            Bags.single(route.lengths),
            [kind.unknown for kind in kinds] * ranks,
            counts=route.counts,
        )

    def send_rows(self, reply: Reply, exchange: Exchange) -> Transfer | None:
        """Start sending the rows to the ranks that requested them, and receiving the rows of this rank's ids."""
        if reply.rows is None:
            return None
        receive, send, columns = reply.route.receive, reply.route.send, self.routing.columns
        if columns is None:
            return exchange.start("rows", reply.rows, receive, send)
        width = columns[exchange.rank]
        return exchange.start(
            "rows",
            reply.rows.view(-1),
            [n * width for n in receive],
            [n * other for n, other in zip(send, columns, strict=True)],
        )

    def lookup(self, reply: Reply, rows: Transfer | None) -> ShardedLookup:
        """Return the lookup of this rank's positions, after waiting for its rows."""
        route, shared = reply.route, reply.shared
        if rows is not None:
            received = copied(rows.wait(), self.device)
            if self.routing.columns is not None:
                received = side_by_side(received, route.send[0], self.routing.columns)
            received = _padded(received)
            return ShardedLookup(route.request, route.shapes, route.places, shared, received, None)
        rank, owned = self.exchange.rank, shared.owned
        first = sum(route.receive[:rank])
        # Places of -1 have no id and index the additional last row.
        own_rows = torch.nn.functional.pad(owned.rows[first : first + route.receive[rank]], (0, 1), value=-1)
        own = Lookup(
            route.request, own_rows[route.places], owned.row_bound, owned.generation, owned.complete, owned.step
        )
        return ShardedLookup(route.request, route.shapes, route.places, shared, own_rows, own)

    def gather(self, lookup: ShardedLookup, out: Tensor, starts: Sequence[int], winners: Tensor | None = None) -> None:
        """Write each feature's vectors, like :meth:`HashTable.gather`."""
        if lookup.own is not None:
            self.table.gather(lookup.own, out, starts, winners)
            return
        _, _, bags, unknown, *_ = lookup.request
        received, dim = lookup.received, self.layout.dim
        address = numbers_on(self.device, [received.data_ptr()])
        blocks = Blocks(address, 40, 16, received.stride(0) * received.element_size())
        ops.gather.gather_bags(
            blocks,
            ELEMENTS[self.wire_dtype],
            dim,
            lookup.places,
            bags,
            [],
            unknown,
            _unused_initializers(self.device),
            out,
            starts,
            winners,
        )
        lookup.received = received.new_empty(0)  # no longer needed

    def watch(self, lookup: ShardedLookup) -> None:
        """Expect gradients of a lookup until all ranks have dropped it; collective unless it is expected already."""
        if lookup.shared.user is None:
            self.gradients.watch(lookup.shared, lookup)

    def add_gradients(self, lookup: ShardedLookup, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of a training lookup, which are exchanged later; None for a feature without one."""
        if self.gradients.exchanged:
            raise RuntimeError(
                f"table {self.table.name}: backward ran within exchange_gradients(), where no gradients are exchanged; "
                f"run it before the block"
            )
        part = gradient_part(
            self.table.name,
            lookup.places,
            self.routing.kind_of,
            lookup.shared.distinct(self.routing.everywhere),
            gradient_bags(lookup.request.bags),
            lookup.shared.groups,
            gradients,
            self.layout.dim,
        )
        if part is not None:
            lookup.shared.add(part, full=all(gradient is not None for gradient in gradients))

    def gradients_of(self, lookup: ShardedLookup, gradients: Sequence[Tensor | None]) -> Gradients:
        """Check and exchange the gradients of a training lookup, and return those of this rank's rows."""
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                f"table {self.table.name}: apply_gradients needs a gradient for each feature; "
                f"pass zeros instead of None"
            )
        self.add_gradients(lookup, gradients)
        received = self.gradients.exchange_full(lookup.shared)
        return self.table.gradients_of(lookup.shared.owned, received)


@dataclass
class ShardedTables:
    """All tables of an engine, and the path of a batch through them."""

    tables: list[ShardedTable]
    """One for each of :func:`table_reads`, and thus first one for each logical table."""
    router: Router
    exchange: Exchange
    reduce: Reduce

    def lookups(self, routed: RoutedBatch) -> list[ShardedLookup]:
        """Look up a batch's ids in every table, and fetch the rows of this rank's ids."""
        replies, transfers = [], []
        for number, table in enumerate(self.tables):
            replies.append(self._look_up(routed, number))
            transfers.append(table.send_rows(replies[-1], self.exchange))  # overlaps with the next table's lookup
        return self._finish(replies, transfers)

    def prefetch(self, routed: RoutedBatch) -> None:
        """Start to read the records of the received ids of a later batch, if they are on disk."""
        for table, route in zip(self.tables, routed.routes, strict=True):
            table.prefetch(route)

    def look_up(self, routed: RoutedBatch) -> list[Reply]:
        """Look up the received ids in every table; :meth:`fetch` continues."""
        return [self._look_up(routed, number) for number in range(len(self.tables))]

    def fetch(self, replies: Sequence[Reply], exchange: Exchange) -> list[ShardedLookup]:
        """Fetch the rows of this rank's ids; accesses no table."""
        transfers = [table.send_rows(reply, exchange) for table, reply in zip(self.tables, replies, strict=True)]
        return self._finish(replies, transfers)

    def _look_up(self, routed: RoutedBatch, number: int) -> Reply:
        samples = routed.samples
        weight = samples[self.exchange.rank] / max(sum(samples), 1) if self.reduce == "mean" else 1.0
        return self.tables[number].look_up(routed.routes[number], weight, train=routed.train)

    def _finish(self, replies: Sequence[Reply], transfers: Sequence[Transfer | None]) -> list[ShardedLookup]:
        return [table.lookup(reply, rows) for table, reply, rows in zip(self.tables, replies, transfers, strict=True)]

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.tables[0].table.step


def _padded(rows: Tensor) -> Tensor:
    """Return rows padded to a multiple of 16 bytes, at least 32, which kernels require of records."""
    width, size = rows.size(1), rows.element_size()
    record = max(-(-width * size // 16) * 16, 32)
    if record == width * size:
        return rows
    padded = rows.new_empty(rows.size(0), record // size)
    padded[:, :width] = rows
    return padded


@cache
def _unused_initializers(device: torch.device) -> Tensor:
    """Return initializers to pass to a kernel that draws no first values."""
    return torch.zeros(1, 5, dtype=torch.int64, device=device)


def refuse_settings(wire_dtype: torch.dtype, reduce: str) -> None:
    """Raise ValueError if a setting is not one of its choices."""
    if wire_dtype not in WIRE_DTYPES:
        raise ValueError(f"EmbeddingEngine: wire_dtype must be one of {list(WIRE_DTYPES)}, got {wire_dtype}")
    if reduce not in get_args(Reduce):
        raise ValueError(f"EmbeddingEngine: reduce must be one of {list(get_args(Reduce))}, got {reduce!r}")


def shard(
    tables: Sequence[HashTable],
    plans: Sequence[TablePlan],
    reads: Sequence[TableRead],
    unknown: Sequence[Sequence[int]],
    exchange: Exchange,
    *,
    wire_dtype: torch.dtype,
    reduce: Reduce,
    deduplicate: bool,
    seed: int,
) -> ShardedTables:
    """Distribute tables over the ranks of a group.

    Args:
        tables: This rank's tables.
        plans: Their plans.
        reads: Lookups of a batch.
        unknown: For each lookup and feature, the member table whose first values unknown ids get; -1: zeros.
        exchange: Collectives of the group.
        wire_dtype: Dtype in which rows and gradients are sent.
        reduce: How the ranks' gradients for one row are combined.
        deduplicate: Send distinct ids only; False sends the id of every position.
        seed: Seed of the tables.
    """
    owners = owners_of(plans, exchange.size)
    sharded = []
    for read, zeros_of in zip(reads, unknown, strict=True):
        number, table, plan = read.table, tables[read.table], plans[read.table]
        everywhere = plan.sharding in ("replicated", "column")
        kind_of_feature = [
            Kind(member, zeros, exchange.rank if everywhere else owners.get((number, member)))
            for member, zeros in zip(read.features.values(), zeros_of, strict=True)
        ]
        kinds = list(dict.fromkeys(kind_of_feature))
        sharded.append(
            ShardedTable(
                table,
                kinds,
                [kinds.index(kind) for kind in kind_of_feature],
                frozen=read.frozen,
                everywhere=everywhere,
                columns=columns_of(plan.layout.dim, exchange.size) if plan.sharding == "column" else None,
                exchange=exchange,
                wire_dtype=wire_dtype,
                reduce=reduce,
            )
        )
    settings = [
        (
            [(member.name, _rule_text(member.initializer)) for member in plan.members],
            plan.layout,
            plan.features,
            plan.sharding,
            _rule_text(plan.config.admission),
            plan.config.trainable,
            plan.frozen,
        )
        for plan in plans
    ]
    digest = hashlib.sha256(repr((settings, seed, wire_dtype, reduce, deduplicate)).encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    routings = [table.routing for table in sharded]
    router = Router(routings, exchange, deduplicate=deduplicate, settings=[number])
    return ShardedTables(sharded, router, exchange, reduce)


def _rule_text(rule: object) -> str:
    """Return a text of a rule that is the same on all ranks."""
    return repr(rule) if rule is None or dataclasses.is_dataclass(rule) else type(rule).__qualname__
