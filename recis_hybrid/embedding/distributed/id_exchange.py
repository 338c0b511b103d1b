"""Exchange of ids: sends ids to the ranks that own them, without access to tables.

Letters: N positions, U distinct ids of this rank's batch, R ids requested from this rank, W ranks, K kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from recis_hybrid.accelerator import copied, is_accelerator, numbers_on
from recis_hybrid.embedding.distributed.dedup import Kind, distinct_ids
from recis_hybrid.embedding.distributed.exchange import Exchange, ExchangeError, Transfer
from recis_hybrid.embedding.table.lookup import Request
from recis_hybrid.ops.gather import Distinct, RowGroups

Shapes: TypeAlias = list[tuple[int, ...]]
Read: TypeAlias = tuple[list[tuple[Request, Shapes]], int]
"""Requests to all tables, each with the shapes of its features' outputs; and the number of samples."""


@dataclass(eq=False)
class Route:
    """The ids of a batch in one table, sent and received, but not looked up yet."""

    request: Request
    """This rank's positions."""
    shapes: Shapes
    """Shapes of its features' outputs."""
    places: Tensor
    """int64 ``[N]``: the distinct id of each position."""
    groups: RowGroups | None
    """The positions grouped by distinct id, in the order in which ids were sent; None if not grouped."""
    send: list[int]
    """For each rank, the number of ids sent to it."""
    receive: list[int]
    """For each rank, the number of ids received from it."""
    lengths: list[int]
    """``[W * K]``: number of ids received from each rank and of each kind."""
    ids: Tensor
    """int64 ``[R]``: the received ids."""
    counts: Tensor | None
    """int64 ``[R]``: how often each id occurs in the batch of its sender; None in evaluation."""


@dataclass(eq=False)
class RoutedBatch:
    """A batch whose ids are on the ranks that look them up."""

    routes: list[Route]
    samples: list[int]
    """Number of samples of each rank."""
    train: bool


@dataclass(frozen=True)
class TableRouting:
    """Routing of a table's ids, the same for every batch."""

    kinds: list[Kind]
    kind_of: list[int]
    """For each feature, the number of its kind."""
    everywhere: bool
    """True if all ids are sent to all ranks, each of which has every row, or some columns of every row."""
    columns: list[int] | None
    """For each rank, the number of its elements of every row; None: rows are whole."""
    counted: bool
    """True if the occurrences of each id are counted in training."""
    device: torch.device
    """Device of the ids."""


class Router:
    """Sends the ids of batches, of all tables together, to the ranks that look them up.

    Args:
        routings: Routing of each table.
        exchange: Collectives of the ranks that share the tables.
        deduplicate: Send distinct ids only; False sends the id of every position.
        settings: Numbers that must be equal on all ranks.
    """

    def __init__(
        self, routings: list[TableRouting], exchange: Exchange, *, deduplicate: bool, settings: list[int]
    ) -> None:
        self._routings = routings
        self._exchange = exchange
        self._deduplicate = deduplicate
        self._settings = settings
        self._agreed = False

    def agree(self) -> None:
        """Check once that all ranks have the same settings.

        Raises:
            ExchangeError: If they differ.
        """
        if self._agreed:
            return
        all_settings = self._exchange.all(self._settings)
        others = [rank for rank, settings in enumerate(all_settings) if settings != self._settings]
        if others:
            raise ExchangeError(
                f"rank {self._exchange.rank}: the engines of ranks {others} have different features, tables, seeds or "
                f"settings; build the same engine on all ranks"
            )
        self._agreed = True

    def route(
        self, read: Callable[[], Read], *, train: bool, grad: bool, exchange: Exchange | None = None
    ) -> RoutedBatch:
        """Send the ids of a batch to the ranks that look them up; accesses no table.

        Args:
            read: Returns the requests to all tables, and the number of samples.
            train: Whether it is a training lookup.
            grad: Whether gradients may follow.
            exchange: Collectives to use; None: those of the tables.

        Raises:
            ExchangeError: If another rank has failed, or is in another mode. An exception of ``read`` is re-raised
                after the other ranks have been notified.
        """
        exchange = exchange or self._exchange
        kinds = [len(routing.kinds) for routing in self._routings]
        failure: BaseException | None = None
        found: list[Distinct] = []
        requests: list[tuple[Request, Shapes]] = []
        samples = 0
        try:
            requests, samples = read()
            if train:
                requests = [(request.with_own_bags(), shapes) for request, shapes in requests]
            for routing, (request, _) in zip(self._routings, requests, strict=True):
                ranks, deduplicate = exchange.size, self._deduplicate
                found.append(distinct_ids(request, routing.kind_of, routing.kinds, ranks, deduplicate=deduplicate))
        except Exception as error:
            failure = error
        status = [int(failure is not None), int(train) + int(train and grad), samples]
        if failure is not None:
            header = torch.tensor(status + [0] * (len(kinds) + sum(kinds))).expand(exchange.size, -1)
        else:
            header = self._header(status, found)
        sent, received = exchange.sizes(header)
        self._check(received, failure)
        routes = self._send_ids(exchange, requests, found, sent, received, train=train)
        return RoutedBatch(routes, [line[2] for line in received], train)

    def _header(self, status: list[int], found: Sequence[Distinct]) -> Tensor:
        """Return int64 [W, 3 + tables + kinds]: status, the highest count of each table, the sizes of all kinds.

        It is on an accelerator if a table's ids are, so that the host waits once for the numbers of all tables.
        """
        ranks = self._exchange.size
        devices = [each.sizes.device for each in found]
        device = next((one for one in devices if is_accelerator(one)), devices[0])
        highest = [each.counts.max() if each.counts.numel() else each.counts.sum() for each in found]
        same = torch.cat([numbers_on(device, status), *(copied(count.view(1), device) for count in highest)])
        sizes = [
            copied(each.sizes.sum(0).expand(ranks, -1) if routing.everywhere else each.sizes, device)
            for routing, each in zip(self._routings, found, strict=True)
        ]
        return torch.cat([same.expand(ranks, -1), *sizes], dim=1)

    def _check(self, received: list[list[int]], failure: BaseException | None) -> None:
        if failure is not None:
            raise failure
        rank = self._exchange.rank
        failed = [other for other, line in enumerate(received) if line[0]]
        if failed:
            raise ExchangeError(
                f"rank {rank}: ranks {failed} failed to look up the batch, so that no rank has looked it up; "
                f"see their errors"
            )
        differ = [other for other, line in enumerate(received) if line[1] != received[rank][1]]
        if differ:
            modes = {other: _MODES[line[1]] for other, line in enumerate(received)}
            raise ExchangeError(
                f"rank {rank}: all ranks must look up in the same mode, got {modes}; use the same train(), eval() and "
                f"no_grad() on all ranks"
            )

    def _send_ids(
        self,
        exchange: Exchange,
        requests: Sequence[tuple[Request, Shapes]],
        found: Sequence[Distinct],
        sent: list[list[int]],
        received: list[list[int]],
        *,
        train: bool,
    ) -> list[Route]:
        at = 3 + len(self._routings)
        transfers: list[tuple[list[int], list[int], list[int], Transfer, Transfer | None]] = []
        for number, (routing, each) in enumerate(zip(self._routings, found, strict=True)):
            end = at + len(routing.kinds)
            send, receive = ([sum(line[at:end]) for line in lines] for lines in (sent, received))
            lengths = [size for line in received for size in line[at:end]]
            at = end
            distinct = send[0] if routing.everywhere else sum(send)
            copies = exchange.size if routing.everywhere else 1
            ids = exchange.start("ids", each.ids[:distinct].repeat(copies), send, receive)
            counts = None
            if train and routing.counted:
                mine, theirs = sent[0][3 + number], [line[3 + number] for line in received]
                narrow = each.counts[:distinct].to(_count_dtype(mine)).repeat(copies).view(torch.uint8)
                width = _count_dtype(mine).itemsize
                counts = exchange.start(
                    "counts",
                    narrow,
                    [width * n for n in send],
                    [_count_dtype(highest).itemsize * n for highest, n in zip(theirs, receive, strict=True)],
                )
            transfers.append((send, receive, lengths, ids, counts))
        routes = []
        for number, (send, receive, lengths, ids, counts) in enumerate(transfers):
            request, shapes = requests[number]
            device = self._routings[number].device
            received_counts = None
            if counts is not None:
                highest_counts = [line[3 + number] for line in received]
                received_counts = copied(_widened(counts.wait(), receive, highest_counts), device)
            each, received_ids = found[number], copied(ids.wait(), device)
            routes.append(
                Route(request, shapes, each.places, each.groups, send, receive, lengths, received_ids, received_counts)
            )
        return routes


_MODES = ["evaluation", "training without gradients", "training"]


def _count_dtype(highest: int) -> torch.dtype:
    return torch.uint8 if highest < 256 else torch.int16 if highest < 1 << 15 else torch.int64


def _widened(counts: Tensor, receive: Sequence[int], highest: Sequence[int]) -> Tensor:
    """Return received counts as int64; each rank sends them in the narrowest dtype that holds its highest count."""
    widths = [_count_dtype(number).itemsize * n for number, n in zip(highest, receive, strict=True)]
    parts = zip(counts.split(widths), highest, strict=True)
    # Copy each part, because it may not be aligned to its element size.
    return torch.cat([part.clone().view(_count_dtype(number)).to(torch.int64) for part, number in parts])
