"""Ids on their way to the ranks that own them: what comes before any table is touched.

Letters: N positions, U distinct ids of this rank's batch, R ids asked of this rank, W ranks, K kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from recis_hybrid.embedding.distributed.dedup import Kind, distinct_ids
from recis_hybrid.embedding.distributed.exchange import Exchange, ExchangeError, Sending
from recis_hybrid.embedding.table.lookup import Request
from recis_hybrid.ops.gather import Distinct, RowGroups

Shapes: TypeAlias = list[tuple[int, ...]]
Read: TypeAlias = tuple[list[tuple[Request, Shapes]], int]
"""What a batch asks of each table, the shapes of what its features give, and how many samples it has."""


@dataclass(eq=False)
class Route:
    """Where the ids of a batch went, and which came in: of one table, before anything was looked up."""

    request: Request
    """This rank's positions."""
    shapes: Shapes
    """Of its features' outputs."""
    places: Tensor
    """int64 ``[N]``: which of its distinct ids each position is."""
    groups: RowGroups | None
    """The positions grouped by distinct id, in the order in which these were sent, if they were."""
    send: list[int]
    """For each rank, how many ids it was sent."""
    receive: list[int]
    """For each rank, how many came from it."""
    lengths: list[int]
    """How many came from each rank and of each kind, ``[W * K]``."""
    ids: Tensor
    """int64 ``[R]``: what came in."""
    counts: Tensor | None
    """int64 ``[R]``: how often each was met there; None in evaluation."""


@dataclass(eq=False)
class RoutedBatch:
    """A batch whose ids are where they are to be looked up."""

    routes: list[Route]
    samples: list[int]
    """Of each rank."""
    train: bool


@dataclass(frozen=True)
class Asks:
    """What a table's features ask it for, batch after batch."""

    kinds: list[Kind]
    """Of ids."""
    kind_of: list[int]
    """For each feature, the number of its kind."""
    everywhere: bool
    """Whether all ids go to all ranks: each has every row, whole or some columns of it."""
    columns: list[int] | None
    """For each rank, how many elements of every row it has; None: rows are whole."""
    counted: bool
    """Whether training counts how often an id was met."""
    device: torch.device
    """Of the ids."""


class Router:
    """Sends the ids of batches to where they are to be looked up, those of all tables together.

    Args:
        asks: Of each table.
        exchange: With the other ranks.
        deduplicate: False sends the id of every position.
        settings: What all ranks must agree on, as numbers.
    """

    def __init__(self, asks: list[Asks], exchange: Exchange, *, deduplicate: bool, settings: list[int]) -> None:
        self._asks = asks
        self._exchange = exchange
        self._deduplicate = deduplicate
        self._settings = settings
        self._agreed = False

    def agree(self) -> None:
        """Find out, once, whether all ranks were told the same.

        Raises:
            ExchangeError: If not.
        """
        if self._agreed:
            return
        others = [rank for rank, told in enumerate(self._exchange.all(self._settings)) if told != self._settings]
        if others:
            raise ExchangeError(
                f"rank {self._exchange.rank}: the engines of the ranks {others} have other features, tables, seeds or "
                f"settings than this one's; build it alike on all ranks"
            )
        self._agreed = True

    def route(
        self, read: Callable[[], Read], *, train: bool, grad: bool, exchange: Exchange | None = None
    ) -> RoutedBatch:
        """Send the ids of a batch to where they are to be looked up; touches no table.

        Args:
            read: Returns the requests to all tables, and how many samples the batch has.
            train: Whether they are looked up in training.
            grad: Whether gradients may follow.
            exchange: Through which; None, that of the tables.

        Raises:
            ExchangeError: If another rank has failed, or looks up in another mode. What ``read`` raises goes on, after
                the other ranks were told.
        """
        exchange = exchange or self._exchange
        kinds = [len(table.kinds) for table in self._asks]
        failure: BaseException | None = None
        found: list[Distinct] = []
        requests: list[tuple[Request, Shapes]] = []
        samples = 0
        try:
            requests, samples = read()
            if train:
                requests = [(request.kept(), shapes) for request, shapes in requests]
            for table, (request, _) in zip(self._asks, requests, strict=True):
                ranks = exchange.size
                found.append(distinct_ids(request, table.kind_of, table.kinds, ranks, deduplicate=self._deduplicate))
        except Exception as error:
            failure = error
        told = torch.tensor([int(failure is not None), int(train) + int(train and grad), samples])
        if failure is not None:
            ours = [told, torch.zeros(len(kinds) + sum(kinds), dtype=torch.int64)]
            header = torch.cat(ours).expand(exchange.size, -1)
        else:
            header = self._header(told, found)
        sent, came = exchange.sizes(header)
        self._check(came, failure)
        return RoutedBatch(
            self._send_ids(exchange, requests, found, sent, came, train=train), [line[2] for line in came], train
        )

    def _header(self, told: Tensor, found: Sequence[Distinct]) -> Tensor:
        """int64 [W, 3 + tables + kinds]: see _check; the most that an id was met; sizes of each table's kinds."""
        ranks, device = self._exchange.size, self._exchange.device
        most = [(each.counts.max() if each.counts.numel() else each.counts.sum()).to(device) for each in found]
        same = torch.cat([told.to(device), torch.stack(most)])
        sizes = [
            (each.sizes.sum(0).expand(ranks, -1) if table.everywhere else each.sizes).to(device)
            for table, each in zip(self._asks, found, strict=True)
        ]
        return torch.cat([same.expand(ranks, -1), *sizes], dim=1)

    def _check(self, came: list[list[int]], failure: BaseException | None) -> None:
        if failure is not None:
            raise failure
        rank = self._exchange.rank
        failed = [other for other, line in enumerate(came) if line[0]]
        if failed:
            raise ExchangeError(
                f"rank {rank}: the ranks {failed} could not look up their batch, and no rank has looked up this one; "
                f"see what they say"
            )
        differ = [other for other, line in enumerate(came) if line[1] != came[rank][1]]
        if differ:
            modes = {other: _MODES[line[1]] for other, line in enumerate(came)}
            raise ExchangeError(
                f"rank {rank}: all ranks must look up in one mode, got {modes}; call train() or eval(), and no_grad, "
                f"on all of them alike"
            )

    def _send_ids(
        self,
        exchange: Exchange,
        requests: Sequence[tuple[Request, Shapes]],
        found: Sequence[Distinct],
        sent: list[list[int]],
        came: list[list[int]],
        *,
        train: bool,
    ) -> list[Route]:
        at = 3 + len(self._asks)
        waiting: list[tuple[list[int], list[int], list[int], Sending, Sending | None]] = []
        for number, (table, each) in enumerate(zip(self._asks, found, strict=True)):
            end = at + len(table.kinds)
            send, receive = ([sum(line[at:end]) for line in lines] for lines in (sent, came))
            lengths = [size for line in came for size in line[at:end]]
            at = end
            distinct = send[0] if table.everywhere else sum(send)
            copies = exchange.size if table.everywhere else 1
            ids = exchange.start("ids", each.ids[:distinct].repeat(copies), send, receive)
            counts = None
            if train and table.counted:
                mine, theirs = sent[0][3 + number], [line[3 + number] for line in came]
                narrow = each.counts[:distinct].to(_count_dtype(mine)).repeat(copies).view(torch.uint8)
                width = _count_dtype(mine).itemsize
                counts = exchange.start(
                    "counts",
                    narrow,
                    [width * n for n in send],
                    [_count_dtype(most).itemsize * n for most, n in zip(theirs, receive, strict=True)],
                )
            waiting.append((send, receive, lengths, ids, counts))
        routes = []
        for number, (send, receive, lengths, ids, counts) in enumerate(waiting):
            request, shapes = requests[number]
            device = self._asks[number].device
            often = None
            if counts is not None:
                often = _wide(counts.wait(), receive, [line[3 + number] for line in came]).to(device)
            each, here = found[number], ids.wait().to(device)
            routes.append(Route(request, shapes, each.places, each.groups, send, receive, lengths, here, often))
        return routes


_MODES = ["evaluation", "training without gradients", "training"]


def _count_dtype(most: int) -> torch.dtype:
    return torch.uint8 if most < 256 else torch.int16 if most < 1 << 15 else torch.int64


def _wide(counts: Tensor, receive: Sequence[int], most: Sequence[int]) -> Tensor:
    """Return the counts that came in, int64, from bytes as wide as each rank's need."""
    widths = [_count_dtype(number).itemsize * n for number, n in zip(most, receive, strict=True)]
    parts = zip(counts.split(widths), most, strict=True)
    # A copy of each, since it may not start at a multiple of its width.
    return torch.cat([part.clone().view(_count_dtype(number)).to(torch.int64) for part, number in parts])
