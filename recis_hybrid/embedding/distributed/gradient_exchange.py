"""Row gradients on their way from the ranks that have them to the ranks that own the rows.

Backward runs on each rank as it likes: a rank may have no gradient for a lookup, or only for some of its ids. So what
is exchanged, and when, is decided where all ranks come together, in an optimizer's step or where a norm is asked for:
each rank says for each lookup that is still known what it has.

Letters: U distinct ids of this rank's batch, R ids asked of this rank, W ranks, D dim.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding.distributed.exchange import Exchange
from recis_hybrid.embedding.distributed.id_exchange import Asks
from recis_hybrid.embedding.table.gradients import Part, PendingGradients
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.lookup import Lookup
from recis_hybrid.ops.gather import Bags, RowGroups

Reduce: TypeAlias = Literal["mean", "sum", "id"]
_NONE, _FULL, _SOME = range(3)
_MANY = 64
"""Lookups without a step between them after which those that nobody can come back to are dropped."""


@dataclass(eq=False)
class Asked:
    """What this rank was asked for in one lookup of all ranks, and the gradients that it has for what it asked for."""

    owned: Lookup
    """Of what all ranks asked for, rank after rank: its rows are this rank's."""
    send: list[int]
    """For each rank, how many ids it was sent, and gradients it is to get."""
    receive: list[int]
    """For each rank, how many ids came from it."""
    weight: float
    """What this rank's gradients are multiplied by."""
    groups: RowGroups | None
    """This rank's positions grouped by distinct id, in the order in which these were sent, if they were."""
    local: PendingGradients = field(default_factory=PendingGradients)
    """Gradients of this rank, their rows numbers of its distinct ids."""
    full: bool = False
    """Whether every one of its distinct ids has one."""
    user: weakref.ref[object] | None = None
    """What backward would find it by."""

    def distinct(self, everywhere: bool) -> int:
        """Return U."""
        return self.send[0] if everywhere else sum(self.send)

    def add(self, part: Part, *, full: bool) -> None:
        """Keep gradients."""
        self.local.add(part)
        self.full = self.full or full

    def clear(self) -> None:
        """Forgets them."""
        self.local.clear()
        self.full = False

    @property
    def state(self) -> int:
        """Whether it has none, all or some, as ranks tell each other."""
        return _NONE if not self.local else _FULL if self.full else _SOME


@dataclass(frozen=True)
class Sums:
    """Gradients that a rank sends."""

    values: Tensor
    """float32 ``[U, D]``, or fewer: by the rank that they go to."""
    places: Tensor | None
    """int64: which of its distinct ids they are of, ascending; None: all, or none."""
    counts: list[int]
    """For each rank, how many it gets."""


class Collector:
    """Brings the gradients of a table's rows to their owners; a ``pending.Remote``.

    Args:
        table: This rank's rows.
        exchange: With the other ranks.
        wire_dtype: In which gradients travel.
        reduce: How ranks' gradients of a row become one.
        asks: On which ranks the rows are.
        dim: Elements of a whole row.
    """

    def __init__(
        self, table: HashTable, exchange: Exchange, *, wire_dtype: torch.dtype, reduce: Reduce, asks: Asks, dim: int
    ) -> None:
        self.table = table
        self.exchange = exchange
        self.wire_dtype = wire_dtype
        self.reduce = reduce
        self.everywhere = asks.everywhere
        self.columns = asks.columns
        self.dim = dim
        self._asked: list[Asked] = []

    def __bool__(self) -> bool:
        return any(asked.local for asked in self._asked)

    def clear(self) -> None:
        """Forgets gradients that were not exchanged; what comes later of the same lookups counts."""
        for asked in self._asked:
            asked.clear()

    def norm(self, own: Tensor) -> Tensor:
        """Return the norm over all rows of the table, from that over this rank's."""
        return own if self.everywhere and self.columns is None else self.exchange.sum(own.square()).sqrt()

    def watch(self, asked: Asked, user: object) -> None:
        """Expect gradients of a lookup until no rank has ``user`` any more; all ranks call it together."""
        if len(self._asked) >= _MANY:
            self.table.fetch_gradients()  # finds out which of them are gone everywhere
        asked.user = weakref.ref(user)
        self._asked.append(asked)

    def fetch(self) -> list[tuple[Lookup, Part]]:
        """Exchange the gradients of all lookups, and return those of this rank's rows; collective."""
        if not self._asked:
            return []
        told, own = [], []
        for asked in self._asked:
            alive = asked.user is not None and asked.user() is not None
            sums = self._sums(asked)
            own.append(sums)
            told += [[int(alive)] * self.exchange.size, [asked.state] * self.exchange.size, sums.counts]
            asked.clear()
        _, came = self.exchange.sizes(torch.tensor(told).t())
        left, received = [], []
        for number, (asked, sums) in enumerate(zip(self._asked, own, strict=True)):
            alive_at, states, counts = ([line[3 * number + k] for line in came] for k in range(3))
            if any(states):
                received.append((asked.owned, self._received(asked, sums, states, counts)))
            if any(alive_at):
                left.append(asked)
        self._asked = left
        return received

    def exchanged(self, asked: Asked) -> list[Tensor]:
        """Exchanges gradients that every rank has in full; for each rank and kind, float32 ``[n, D]``."""
        sums = self._sums(asked)
        asked.clear()
        values = self._send(sums, asked.receive)
        if self.reduce == "id":
            values = self._by_id(asked.owned.rows, values, asked.receive)
        return list(values.split(asked.owned.request.bags.lengths))

    def _received(self, asked: Asked, own: Sums, states: list[int], counts: list[int]) -> Part:
        """Exchange the gradients of one lookup, and return those of this rank's rows."""
        values, owned = self._send(own, counts), asked.owned
        if all(state == _FULL for state in states):
            if self.reduce == "id":
                values = self._by_id(owned.rows, values, counts)
            request = owned.request
            parts = list(values.split(request.bags.lengths))
            return Part(owned.rows, request.members, owned.row_bound, request.bags, parts, owned.groups)
        rows = owned.rows[self._positions(asked, own, states, counts)]
        if self.reduce == "id":
            values = self._by_id(rows, values, counts)
        return Part(rows, [0], owned.row_bound, Bags.single([rows.numel()]), [values], None)

    def _positions(self, asked: Asked, own: Sums, states: list[int], counts: list[int]) -> Tensor:
        """Return int64: of each gradient that came in, which of the R ids asked of this rank it belongs to."""
        ranks, device = self.exchange.size, self.table.device
        told = [torch.arange(n, device=device) for n in counts]
        if states.count(_SOME):
            # Ranks that have gradients for some of their ids say for which.
            send, which = [0] * ranks, asked.owned.rows[:0]
            if own.places is not None:
                send = own.counts
                starts = [0] * ranks if self.everywhere else list(accumulate(asked.send[:-1], initial=0))
                places = own.places.repeat(ranks) if self.everywhere else own.places
                which = torch.cat([part - start for part, start in zip(places.split(send), starts, strict=True)])
            receive = [n if state == _SOME else 0 for n, state in zip(counts, states, strict=True)]
            came = self.exchange.start("ids", which, send, receive).wait().to(device).split(receive)
            told = [some if state == _SOME else all_ for some, all_, state in zip(came, told, states, strict=True)]
        firsts = accumulate(asked.receive[:-1], initial=0)
        return torch.cat([first + part for first, part in zip(firsts, told, strict=True)])

    def _sums(self, asked: Asked) -> Sums:
        """Sum this rank's gradients, in the order in which ids were sent."""
        dim, ranks = self.dim, self.exchange.size
        n, state = asked.distinct(self.everywhere), asked.state
        sums = ops.memory.empty((n if state != _NONE else 0, dim), torch.float32, self.table.device)
        if state == _NONE or n == 0:
            return Sums(sums, None, asked.send if state == _FULL else [0] * ranks)
        gradients = asked.local.gradients()
        if asked.weight != 1.0:
            gradients = gradients._replace(factor=torch.full((1,), asked.weight, device=sums.device))
        ops.update.reduce_rows(gradients, sums)
        groups = gradients.groups
        if groups is asked.groups:
            return Sums(sums, None, asked.send)
        if state == _FULL:
            return Sums(torch.empty_like(sums).index_copy_(0, groups.unique[:n], sums), None, asked.send)
        places, order = groups.unique[: int(groups.count)].sort()
        if self.everywhere:
            counts = [places.numel()] * ranks
        else:
            ends = torch.tensor(list(accumulate(asked.send)), device=places.device)
            counts = torch.searchsorted(places, ends).diff(prepend=ends.new_zeros(1)).tolist()
        return Sums(sums[order], places, counts)

    def _send(self, own: Sums, receive: list[int]) -> Tensor:
        values, send = own.values.to(self.wire_dtype), own.counts
        dim = self.table.layout.dim
        if self.columns is not None:
            values = torch.cat([part.reshape(-1) for part in values.split(self.columns, 1)])
            send = [n * width for n, width in zip(send, self.columns, strict=True)]
            receive = [n * dim for n in receive]
        elif self.everywhere and len(values):
            values = values.repeat(self.exchange.size, 1)
        came = self.exchange.start("gradients", values, send, receive).wait().view(-1, dim)
        return came.to(device=self.table.device, dtype=torch.float32)

    def _by_id(self, rows: Tensor, values: Tensor, counts: list[int]) -> Tensor:
        """Divides the gradient of each row by the number of ranks that have one for it."""
        ranks = torch.arange(len(counts), device=rows.device).repeat_interleave(
            torch.tensor(counts, device=rows.device)
        )
        pairs = torch.unique(rows * self.exchange.size + ranks)
        each, met = torch.unique(pairs.div(self.exchange.size, rounding_mode="floor"), return_counts=True)
        times: Tensor = met[torch.searchsorted(each, rows)]
        return values / times.unsqueeze(1)
