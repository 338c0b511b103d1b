"""Tables whose rows lie on several ranks.

The id space is cut into 65,536 buckets, of which each rank owns a contiguous range (``distinct.rank_of``); a rank's
HashTable holds the rows of its own. One batch goes like this, all features of a logical table at once:

1. Each rank finds the distinct (member table, id) of its batch and sorts them by owner (``distinct``).
2. ``Exchange.sizes``: how many ids go where, of every table; with them samples, and whether a rank has failed.
3. ids → owners. Each owner looks up what came in, in rank order: it inserts in training, never in evaluation.
4. rows → back. Each rank pools its bags from them, with the kernel that pools from blocks.
5. Backward leaves gradients at the rank. When an optimizer steps, or a norm is asked for, each rank sums those of each
   distinct id, and the sums → owners (``collecting``): they enter the owner's table as gradients of one lookup whose
   features are the ranks, so that the update adds them in rank order. It is the update of one process.

1 to 3 touch no table: they may run ahead of the batch (``prefetch``). A replicated table is the same with every rank
as owner of every id, without 4; of a table that lies on one rank, all ids have that owner. Of a table that is split by
column every rank owns every id, too, but has only some elements of each row: 4 brings them together, 5 parts them.

Every rank takes part in every exchange, with nothing to send where its batch has nothing.

Letters: N positions, U distinct ids of this rank's batch, R ids asked of this rank, W ranks, K kinds, D dim.
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
from recis_hybrid.embedding.distributed.column_split import columns_of, side_by_side
from recis_hybrid.embedding.distributed.dedup import Kind
from recis_hybrid.embedding.distributed.exchange import WIRE_DTYPES, Exchange, Sending
from recis_hybrid.embedding.distributed.gradient_exchange import Asked, Collector, Reduce
from recis_hybrid.embedding.distributed.id_exchange import Asks, Route, RoutedBatch, Router, Shapes
from recis_hybrid.embedding.planner.coalesce import TablePlan
from recis_hybrid.embedding.planner.sharding import deal
from recis_hybrid.embedding.table.gradients import part_of
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.lookup import Lookup, Request, gradient_bags
from recis_hybrid.ops.blocks import ELEMENTS, Blocks
from recis_hybrid.ops.gather import Bags
from recis_hybrid.ops.update import Gradients


@dataclass(eq=False)
class Begun:
    """What a rank was asked for, looked up."""

    route: Route
    asked: Asked
    rows: Tensor | None
    """``[R, D]`` of the wire's dtype; None where every rank has them."""


@dataclass(eq=False)
class ShardedLookup:
    """What a rank's batch met in a table that others share: as a Lookup to what gathers and takes gradients."""

    request: Request
    shapes: Shapes
    """Of its features' outputs."""
    places: Tensor
    """int64 ``[N]``: which of this rank's distinct ids each position is."""
    asked: Asked
    """What this rank was asked for."""
    received: Tensor
    """``[U, D]`` of the wire's dtype: the rows of its distinct ids, padded as ``_padded`` says."""
    own: Lookup | None
    """In place of ``received``: this rank's positions, where the table is replicated."""
    gathered: Tensor | None = None
    """As of a Lookup; here vectors are gathered later."""

    @property
    def train(self) -> bool:
        """Whether it was a training lookup: one whose rows may take gradients."""
        return self.asked.owned.train


class ShardedTable:
    """A logical table as this rank's features see it: this rank's HashTable and those of the other ranks.

    Args:
        table: This rank's part.
        kinds: Of ids that are looked up in it.
        kind_of: For each feature, the number of its kind.
        everywhere: Whether all ids go to all ranks.
        columns: For each rank, how many elements of every row it has; None: rows are whole.
        exchange: With the other ranks.
        wire_dtype: In which rows and gradients travel.
        reduce: How ranks' gradients of a row become one.
    """

    def __init__(
        self,
        table: HashTable,
        kinds: list[Kind],
        kind_of: list[int],
        *,
        everywhere: bool,
        columns: list[int] | None,
        exchange: Exchange,
        wire_dtype: torch.dtype,
        reduce: Reduce,
    ) -> None:
        self.table = table
        self.asks = Asks(kinds, kind_of, everywhere, columns, not table.read_only, table.device)
        self.replicated = everywhere and columns is None
        self.exchange = exchange
        self.wire_dtype = wire_dtype
        self.layout = table.layout.whole
        self.device = table.device
        self.read_only = table.read_only
        self.anchor = table.anchor
        self.collector = Collector(
            table, exchange, wire_dtype=wire_dtype, reduce=reduce, asks=self.asks, dim=self.layout.dim
        )
        table.remote = self.collector

    def look_up(self, route: Route, weight: float, *, train: bool) -> Begun:
        """Look up what came in, and read its rows, unless the table is replicated."""
        ranks, lengths = self.exchange.size, route.lengths
        members, unknown = [kind.member for kind in self.asks.kinds], [kind.unknown for kind in self.asks.kinds]
        request = Request(
            list(route.ids.split(lengths)),
            members * ranks,
            Bags.single(lengths),
            unknown * ranks,
            counts=route.counts,
        )
        owned = self.table.find(request, train=train)
        asked = Asked(owned, route.send, route.receive, weight, route.groups)
        if self.replicated:
            return Begun(route, asked, None)
        dim = self.table.layout.dim
        rows = ops.memory.empty((route.ids.numel(), dim), torch.float32, self.device)
        self.table.gather(owned, rows.view(-1), [dim * start for start in accumulate(lengths[:-1], initial=0)])
        return Begun(route, asked, rows.to(self.wire_dtype))

    def send_rows(self, begun: Begun, exchange: Exchange) -> Sending | None:
        """Begins to send the rows that other ranks asked for, and those of this rank's ids back."""
        if begun.rows is None:
            return None
        receive, send, columns = begun.route.receive, begun.route.send, self.asks.columns
        if columns is None:
            return exchange.start("rows", begun.rows, receive, send)
        mine = columns[exchange.rank]
        return exchange.start(
            "rows",
            begun.rows.view(-1),
            [n * mine for n in receive],
            [n * width for n, width in zip(send, columns, strict=True)],
        )

    def lookup(self, begun: Begun, rows: Sending | None) -> ShardedLookup:
        """Return the lookup of this rank's positions, once its rows are here."""
        route, asked = begun.route, begun.asked
        if rows is not None:
            received = rows.wait().to(self.device)
            if self.asks.columns is not None:
                received = side_by_side(received, route.send[0], self.asks.columns)
            received = _padded(received)
            return ShardedLookup(route.request, route.shapes, route.places, asked, received, None)
        rank, owned = self.exchange.rank, asked.owned
        first = sum(route.receive[:rank])
        # One row more, which stands for no id: places are -1 there.
        mine = torch.cat([owned.rows[first : first + route.receive[rank]], owned.rows.new_tensor([-1])])
        own = Lookup(route.request, mine[route.places], owned.row_bound, owned.generation, owned.complete, owned.step)
        return ShardedLookup(route.request, route.shapes, route.places, asked, mine, own)

    def gather(self, lookup: ShardedLookup, out: Tensor, starts: Sequence[int], winners: Tensor | None = None) -> None:
        """Write each feature's vectors, as :meth:`HashTable.gather`."""
        if lookup.own is not None:
            self.table.gather(lookup.own, out, starts, winners)
            return
        _, _, bags, unknown, *_ = lookup.request
        received, dim = lookup.received, self.layout.dim
        address = torch.tensor([received.data_ptr()], dtype=torch.int64, device=self.device)
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
        lookup.received = received.new_empty(0)  # the outputs hold what it was needed for

    def watch(self, lookup: ShardedLookup) -> None:
        """Expect gradients of a lookup, from this rank or others, as long as it lives somewhere."""
        self.collector.watch(lookup.asked, lookup)

    def add_gradients(self, lookup: ShardedLookup, gradients: Sequence[Tensor | None]) -> None:
        """Keep the gradients of a training lookup until they are exchanged; None for a feature without one."""
        part = part_of(
            self.table.name,
            lookup.places,
            self.asks.kind_of,
            lookup.asked.distinct(self.asks.everywhere),
            gradient_bags(lookup.request.bags),
            lookup.asked.groups,
            gradients,
            self.layout.dim,
        )
        if part is not None:
            lookup.asked.add(part, full=all(gradient is not None for gradient in gradients))

    def gradients_of(self, lookup: ShardedLookup, gradients: Sequence[Tensor | None]) -> Gradients:
        """Exchanges the gradients of a training lookup, and returns those of this rank's rows, after checking them."""
        if any(gradient is None for gradient in gradients):
            raise ValueError(
                f"table {self.table.name}: apply_gradients takes a gradient for each feature; give zeros for None"
            )
        self.add_gradients(lookup, gradients)
        received = self.collector.exchanged(lookup.asked)
        return self.table.gradients_of(lookup.asked.owned, received)


@dataclass
class ShardedTables:
    """The tables of an engine, and the way of a batch through all of them."""

    tables: list[ShardedTable]
    router: Router
    exchange: Exchange
    reduce: Reduce

    def lookups(self, routed: RoutedBatch) -> list[ShardedLookup]:
        """Look up what came in, in every table, and brings the rows of this rank's ids."""
        begun, sending = [], []
        for number, table in enumerate(self.tables):
            begun.append(self._begin(routed, number))
            sending.append(table.send_rows(begun[-1], self.exchange))  # while the next table is looked up in
        return self._finish(begun, sending)

    def begin(self, routed: RoutedBatch) -> list[Begun]:
        """Look up what came in, in every table."""
        return [self._begin(routed, number) for number in range(len(self.tables))]

    def finish(self, begun: Sequence[Begun], exchange: Exchange) -> list[ShardedLookup]:
        """Brings the rows of this rank's ids; touches no table."""
        sending = [table.send_rows(each, exchange) for table, each in zip(self.tables, begun, strict=True)]
        return self._finish(begun, sending)

    def _begin(self, routed: RoutedBatch, number: int) -> Begun:
        samples = routed.samples
        weight = samples[self.exchange.rank] / max(sum(samples), 1) if self.reduce == "mean" else 1.0
        return self.tables[number].look_up(routed.routes[number], weight, train=routed.train)

    def _finish(self, begun: Sequence[Begun], sending: Sequence[Sending | None]) -> list[ShardedLookup]:
        return [table.lookup(each, rows) for table, each, rows in zip(self.tables, begun, sending, strict=True)]

    @property
    def step(self) -> int:
        """Steps done."""
        return self.tables[0].table.step


def _padded(rows: Tensor) -> Tensor:
    """Return rows so that each starts at a multiple of 16 bytes and take at least 32: what kernels ask of records."""
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
    """Raise ValueError for what is none of the choices."""
    if wire_dtype not in WIRE_DTYPES:
        raise ValueError(f"EmbeddingEngine: wire_dtype must be one of {list(WIRE_DTYPES)}, got {wire_dtype}")
    if reduce not in get_args(Reduce):
        raise ValueError(f"EmbeddingEngine: reduce must be one of {list(get_args(Reduce))}, got {reduce!r}")


def shard(
    tables: Sequence[HashTable],
    plans: Sequence[TablePlan],
    unknown: Sequence[Sequence[int]],
    exchange: Exchange,
    *,
    wire_dtype: torch.dtype,
    reduce: Reduce,
    deduplicate: bool,
    seed: int,
) -> ShardedTables:
    """Put tables on the ranks of a group.

    Args:
        tables: This rank's.
        plans: Of the tables.
        unknown: For each table and feature, the member table whose first values stand for unknown ids; -1: zeros.
        exchange: With the other ranks.
        wire_dtype: In which rows and gradients travel.
        reduce: How ranks' gradients of a row become one.
        deduplicate: False sends the id of every position.
        seed: Of the tables.
    """
    whole = [
        (number, k) for number, plan in enumerate(plans) if plan.sharding == "table" for k in range(len(plan.members))
    ]
    loads = [plans[number].layout.dim * list(plans[number].features.values()).count(k) for number, k in whole]
    owners: dict[tuple[int, int], int | None] = dict(zip(whole, deal(loads, exchange.size), strict=True))
    sharded = []
    for number, (table, plan) in enumerate(zip(tables, plans, strict=True)):
        everywhere = plan.sharding in ("replicated", "column")
        each = [
            Kind(member, zeros, exchange.rank if everywhere else owners.get((number, member)))
            for member, zeros in zip(plan.features.values(), unknown[number], strict=True)
        ]
        kinds = list(dict.fromkeys(each))
        sharded.append(
            ShardedTable(
                table,
                kinds,
                [kinds.index(kind) for kind in each],
                everywhere=everywhere,
                columns=columns_of(plan.layout.dim, exchange.size) if plan.sharding == "column" else None,
                exchange=exchange,
                wire_dtype=wire_dtype,
                reduce=reduce,
            )
        )
    told = [
        (
            [(member.name, _told(member.initializer)) for member in plan.members],
            plan.layout,
            plan.features,
            plan.sharding,
            _told(plan.config.admission),
            plan.config.trainable,
        )
        for plan in plans
    ]
    digest = hashlib.sha256(repr((told, seed, wire_dtype, reduce, deduplicate)).encode()).digest()
    settings = [int.from_bytes(digest[:8], "little", signed=True)]
    router = Router([table.asks for table in sharded], exchange, deduplicate=deduplicate, settings=settings)
    return ShardedTables(sharded, router, exchange, reduce)


def _told(rule: object) -> str:
    """Return a rule as text that is the same on all ranks."""
    return repr(rule) if rule is None or dataclasses.is_dataclass(rule) else type(rule).__qualname__
