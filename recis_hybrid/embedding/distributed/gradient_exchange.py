"""Exchange of row gradients: from the ranks that computed them to the ranks that own the rows.

Backward runs independently on each rank: a rank may have no gradient for a lookup, or only for some of its ids. The
exchange therefore happens where all ranks meet, in an optimizer's step or when a norm is read. There, each rank
announces the gradients that it has for each lookup that is still referenced.

Letters: U distinct ids of this rank's batch, R ids requested from this rank, W ranks, D dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import copied, numbers_on
from recis_hybrid.embedding.distributed.exchange import Exchange
from recis_hybrid.embedding.distributed.id_exchange import TableRouting
from recis_hybrid.embedding.table.gradients import Part, PendingGradients, RemoteGradients
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.embedding.table.lookup import Lookup
from recis_hybrid.ops.gather import Bags, RowGroups
from recis_hybrid.ops.update import Gradients

Reduce: TypeAlias = Literal["mean", "sum", "id"]
_NO_GRADIENTS, _ALL_GRADIENTS, _SOME_GRADIENTS = range(3)
_MAX_LOOKUPS = 64
"""Number of lookups without a step after which lookups that autograd has dropped are removed."""


@dataclass(eq=False)
class SharedLookup:
    """One lookup of all ranks: the rows that this rank found for all, and its gradients for the ids that it sent."""

    owned: Lookup
    """Lookup of the ids that all ranks requested from this rank, ordered by rank; its rows are on this rank."""
    send: list[int]
    """For each rank, the number of ids, and thus of gradients, sent to it."""
    receive: list[int]
    """For each rank, the number of ids received from it."""
    weight: float
    """Factor of this rank's gradients."""
    groups: RowGroups | None
    """This rank's positions grouped by distinct id, in the order in which ids were sent; None if not grouped."""
    local: PendingGradients = field(default_factory=PendingGradients)
    """Gradients of this rank; their rows are the numbers of its distinct ids."""
    full: bool = False
    """True if each of its distinct ids has a gradient."""
    user: weakref.ref[object] | None = None
    """Weak reference to the lookup that autograd holds."""

    def distinct(self, everywhere: bool) -> int:
        """Return U."""
        return self.send[0] if everywhere else sum(self.send)

    def add(self, part: Part, *, full: bool) -> None:
        """Add gradients."""
        self.local.add(part)
        self.full = self.full or full

    def clear(self) -> None:
        """Drop the gradients."""
        self.local.clear()
        self.full = False

    @property
    def state(self) -> int:
        """Code sent to the other ranks: no, all or some gradients."""
        return _NO_GRADIENTS if not self.local else _ALL_GRADIENTS if self.full else _SOME_GRADIENTS


@dataclass
class Sending:
    """Gradients of one lookup that a rank is about to send, ordered by the ranks that receive them."""

    state: int
    alive: bool
    """True if autograd holds the lookup on this rank."""
    gradients: Gradients | None
    """None if there are none."""
    counts: list[int]
    """For each rank, the number of gradients that it receives."""
    places: Tensor | None = None
    """int64: the numbers of their distinct ids, ascending; None: all ids, or no ids."""
    order: Tensor | None = None
    """int64: their places among the summed gradients; None: in order already."""
    on_device: Tensor | None = None
    """int64 ``[W]``: the counts that the host has not read yet."""


class GradientExchange:
    """Sends the gradients of a table's rows to their owners; the ``RemoteGradients`` of a HashTable.

    Args:
        table: This rank's rows.
        exchange: Collectives of the ranks that share the table.
        wire_dtype: Dtype in which gradients are sent.
        reduce: How the ranks' gradients for one row are combined.
        routing: Ranks of the rows.
        dim: Elements of a whole row.
    """

    def __init__(
        self,
        table: HashTable,
        exchange: Exchange,
        *,
        wire_dtype: torch.dtype,
        reduce: Reduce,
        routing: TableRouting,
        dim: int,
    ) -> None:
        self.table = table
        self.exchange = exchange
        self.wire_dtype = wire_dtype
        self.reduce = reduce
        self.everywhere = routing.everywhere
        self.columns = routing.columns
        self.dim = dim
        self.exchanged = False
        self._lookups: list[SharedLookup] = []
        self._announced: tuple[list[Sending], list[list[int]]] | None = None

    def __bool__(self) -> bool:
        return any(lookup.local for lookup in self._lookups)

    def clear(self) -> None:
        """Drop gradients that were not exchanged; the same lookups may get new ones."""
        self._announced = None
        for lookup in self._lookups:
            lookup.clear()

    def sum_squares(self, own: Tensor) -> Tensor:
        """Return the sum of squares over all rows of the table, given that over this rank's rows."""
        return own if self.everywhere and self.columns is None else self.exchange.sum(own)

    def watch(self, lookup: SharedLookup, user: object) -> None:
        """Expect gradients of a lookup until ``user`` is dropped on all ranks; collective."""
        if len(self._lookups) >= _MAX_LOOKUPS:
            self.table.fetch_gradients()  # removes the lookups that all ranks have dropped
        lookup.user = weakref.ref(user)
        self._lookups.append(lookup)

    def announce(self, tables: Sequence[RemoteGradients]) -> None:
        """Exchange the numbers of gradients of several tables at once; collective.

        So the host waits for the device once, not once for each table. The next :meth:`fetch` of each table uses them.
        """
        shared = [each for each in tables if isinstance(each, GradientExchange) and not each.exchanged]
        for exchange in dict.fromkeys(each.exchange for each in shared):
            _announce(exchange, [each for each in shared if each.exchange is exchange])

    def fetch(self) -> list[tuple[Lookup, Part]]:
        """Exchange the gradients of all lookups, and return those of this rank's rows; collective."""
        if not self._lookups or self.exchanged:
            return []
        if self._announced is None:
            _announce(self.exchange, [self])
        assert self._announced is not None
        (sending, headers), self._announced = self._announced, None
        remaining, parts = [], []
        for number, (lookup, own) in enumerate(zip(self._lookups, sending, strict=True)):
            lookup.clear()
            alive_on, states, counts = ([header[3 * number + k] for header in headers] for k in range(3))
            if any(states):
                parts.append((lookup.owned, self._exchange(lookup, own, states, counts)))
            if any(alive_on):
                remaining.append(lookup)
        self._lookups = remaining
        return parts

    def exchange_full(self, lookup: SharedLookup) -> list[Tensor]:
        """Exchange the gradients of a lookup, of which all ranks have all; return ``[n, D]`` for each rank and kind."""
        sending = self._sending(lookup)
        lookup.clear()
        values = self._send(lookup, sending, lookup.receive)
        if self.reduce == "id":
            values = self._mean_over_ranks(lookup.owned.rows, values, lookup.receive)
        return list(values.split(lookup.owned.request.bags.lengths))

    def _exchange(self, lookup: SharedLookup, own: Sending, states: list[int], counts: list[int]) -> Part:
        """Exchange the gradients of one lookup, and return those of this rank's rows."""
        values, owned = self._send(lookup, own, counts), lookup.owned
        if all(state == _ALL_GRADIENTS for state in states):
            if self.reduce == "id":
                values = self._mean_over_ranks(owned.rows, values, counts)
            request = owned.request
            parts = list(values.split(request.bags.lengths))
            return Part(owned.rows, request.members, owned.row_bound, request.bags, parts, owned.groups)
        rows = owned.rows[self._positions(lookup, own, states, counts)]
        if self.reduce == "id":
            values = self._mean_over_ranks(rows, values, counts)
        return Part(rows, [0], owned.row_bound, Bags.single([rows.numel()]), [values], None)

    def _positions(self, lookup: SharedLookup, own: Sending, states: list[int], counts: list[int]) -> Tensor:
        """Return the position of each received gradient's id among the R ids requested from this rank, int64."""
        ranks, device = self.exchange.size, self.table.device
        places = [torch.arange(n, device=device) for n in counts]
        if states.count(_SOME_GRADIENTS):
            # Ranks with gradients for some of their ids also send the places of these ids.
            send, own_places = [0] * ranks, lookup.owned.rows[:0]
            if own.places is not None:
                send = own.counts
                places_sent = own.places[: self._sent(own)]
                starts = [0] * ranks if self.everywhere else list(accumulate(lookup.send[:-1], initial=0))
                copies = places_sent.repeat(ranks) if self.everywhere else places_sent
                own_places = torch.cat([part - start for part, start in zip(copies.split(send), starts, strict=True)])
            receive = [n if state == _SOME_GRADIENTS else 0 for n, state in zip(counts, states, strict=True)]
            received = copied(self.exchange.start("ids", own_places, send, receive).wait(), device).split(receive)
            places = [
                received_places if state == _SOME_GRADIENTS else all_places
                for received_places, all_places, state in zip(received, places, states, strict=True)
            ]
        starts_of_ranks = accumulate(lookup.receive[:-1], initial=0)
        return torch.cat([start + part for start, part in zip(starts_of_ranks, places, strict=True)])

    def _sending(self, lookup: SharedLookup) -> Sending:
        """Return this rank's gradients, not summed yet; the host may not know yet how many there are."""
        n, state, ranks = lookup.distinct(self.everywhere), lookup.state, self.exchange.size
        alive = lookup.user is not None and lookup.user() is not None
        if state == _NO_GRADIENTS or n == 0:
            return Sending(state, alive, None, lookup.send if state == _ALL_GRADIENTS else [0] * ranks)
        gradients = lookup.local.gradients()
        if lookup.weight != 1.0:
            factor = torch.full((1,), lookup.weight, device=self.table.device)
            gradients = gradients._replace(factor=factor)
        groups = gradients.groups
        if groups is lookup.groups:
            return Sending(state, alive, gradients, lookup.send)
        # Beyond the valid groups, an accelerator leaves the numbers undefined.
        unique = groups.unique[: int(groups.count)] if groups.unique.is_cpu else groups.unique
        numbers = torch.arange(unique.numel(), device=unique.device)
        places, order = torch.where(numbers < groups.count, unique, n).sort()
        if state == _ALL_GRADIENTS:
            return Sending(state, alive, gradients, lookup.send, order=order)
        ends = [n] * ranks if self.everywhere else list(accumulate(lookup.send))
        upto = torch.searchsorted(places, numbers_on(places.device, ends))
        counts = upto if self.everywhere else upto.diff(prepend=upto.new_zeros(1))
        if counts.is_cpu:
            return Sending(state, alive, gradients, counts.tolist(), places, order)
        return Sending(state, alive, gradients, [], places, order, counts)

    def _summed(self, lookup: SharedLookup, own: Sending) -> Tensor:
        """Return the sums of this rank's gradients, float32 ``[U, D]`` or fewer rows."""
        n = lookup.distinct(self.everywhere) if own.gradients is not None else 0
        sums = ops.memory.empty((n, self.dim), torch.float32, self.table.device)
        if own.gradients is None:
            return sums
        ops.update.reduce_rows(own.gradients, sums)
        return sums if own.order is None else sums[own.order[: self._sent(own)]]

    def _sent(self, own: Sending) -> int:
        return own.counts[0] if self.everywhere else sum(own.counts)

    def _send(self, lookup: SharedLookup, own: Sending, receive: list[int]) -> Tensor:
        values, send = self._summed(lookup, own).to(self.wire_dtype), own.counts
        dim = self.table.layout.dim
        if self.columns is not None:
            values = torch.cat([part.reshape(-1) for part in values.split(self.columns, 1)])
            send = [n * width for n, width in zip(send, self.columns, strict=True)]
            receive = [n * dim for n in receive]
        elif self.everywhere and len(values):
            values = values.repeat(self.exchange.size, 1)
        received = self.exchange.start("gradients", values, send, receive).wait().view(-1, dim)
        return copied(received, self.table.device).to(torch.float32)

    def _mean_over_ranks(self, rows: Tensor, values: Tensor, counts: list[int]) -> Tensor:
        """Divide the gradient of each row by the number of ranks that have a gradient for it."""
        size, n = self.exchange.size, rows.numel()
        ranks = numbers_on(rows.device, range(len(counts))).repeat_interleave(
            numbers_on(rows.device, counts), output_size=n
        )
        pairs, order = (rows * size + ranks).sort()
        sorted_rows = pairs.div(size, rounding_mode="floor")
        is_new = torch.ones(2, n, dtype=torch.int64, device=rows.device)
        is_new[0, 1:] = sorted_rows[1:] != sorted_rows[:-1]
        is_new[1, 1:] = pairs[1:] != pairs[:-1]
        row = is_new[0].cumsum(0) - 1
        counted = torch.zeros_like(row).scatter_add_(0, row, is_new[1])
        divisors = torch.empty_like(row).scatter_(0, order, counted[row])
        return values / divisors.unsqueeze(1)


def _announce(exchange: Exchange, tables: Sequence[GradientExchange]) -> None:
    """Exchange the numbers of gradients of all lookups of tables; collective."""
    sending = [[table._sending(lookup) for lookup in table._lookups] for table in tables]
    flat = [one for lookups in sending for one in lookups]
    if not flat:
        return
    unread = [(one, one.on_device) for one in flat if one.on_device is not None]
    if unread:
        for (one, _), counts in zip(unread, torch.stack([counts for _, counts in unread]).tolist(), strict=True):
            one.counts = counts
    lines = [
        line for one in flat for line in ([int(one.alive)] * exchange.size, [one.state] * exchange.size, one.counts)
    ]
    _, headers = exchange.sizes(torch.tensor(lines).t())
    at = 0
    for table, lookups in zip(tables, sending, strict=True):
        end = at + 3 * len(lookups)
        table._announced = lookups, [header[at:end] for header in headers]
        at = end
