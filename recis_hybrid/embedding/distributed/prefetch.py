"""Ids that are sent to their owners while an earlier batch is worked on.

One thread sends, one batch after another, in a process group of its own: so its collectives come in one order on all
ranks, whatever the training thread does meanwhile in the tables' own group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch.distributed as dist

from recis_hybrid.embedding.distributed.exchange import Exchange, timeout_of
from recis_hybrid.embedding.distributed.id_exchange import Read, RoutedBatch
from recis_hybrid.embedding.distributed.sharded_table import ShardedLookup, ShardedTables
from recis_hybrid.ragged import Batch


@dataclass(eq=False)
class Ahead:
    """A batch on its way."""

    batch: Batch
    mode: tuple[bool, bool]
    """Whether in training, and whether gradients may follow."""
    routed: Future[RoutedBatch]
    lookups: Future[list[ShardedLookup]] | None = None
    """Where it was looked up before its turn."""
    step: int = 0
    """The step after which that was."""


class Prefetcher:
    """Sends the ids of batches ahead.

    Args:
        tables: Whose ids they are.
        features: Their columns; a batch is known again by them.
        depth: The most batches that may be on their way.
        staleness: How many steps old the rows may be that a batch is computed with: 0 or 1.
        group: Of the same ranks as the tables' own, for this alone; None makes one.
        strict: False takes a batch that comes otherwise than it was prefetched, as where a model makes columns of
            others, for a sign that there is nothing to prefetch: no error, and no prefetching from there on.
        optional: Features that a batch may lack.

    Raises:
        ValueError: If there is no group, and only all ranks together could make one.
    """

    def __init__(
        self,
        tables: ShardedTables,
        features: Sequence[str],
        *,
        depth: int,
        staleness: int,
        group: dist.ProcessGroup | None = None,
        strict: bool = True,
        optional: Collection[str] = (),
    ) -> None:
        self._tables = tables
        self._features = list(features)
        self._needed = [name for name in features if name not in optional]
        self._depth = depth
        self._staleness = staleness
        self._strict, self._ended = strict, False
        self.exchange = Exchange(group or _twin(tables.exchange.group), tables.exchange.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recis-prefetch")
        self._ahead: deque[Ahead] = deque()

    def __len__(self) -> int:
        """Batches on their way."""
        return len(self._ahead)

    def send(self, batch: Batch, read: Callable[[], Read], *, train: bool, grad: bool) -> None:
        """Begins to send the ids of a batch; all ranks call it together.

        Raises:
            RuntimeError: If ``depth`` batches are on their way.
        """
        if not self._strict and (self._ended or any(name not in batch for name in self._needed)):
            return
        if len(self._ahead) >= self._depth:
            raise RuntimeError(
                f"prefetch: {len(self._ahead)} batches are on their way, and prefetch_depth={self._depth}; give the "
                f"first of them to the engine before the next is prefetched"
            )

        def route() -> RoutedBatch:
            return self._tables.router.route(read, train=train, grad=grad, exchange=self.exchange)

        self._ahead.append(Ahead(batch, (train, grad), self._thread.submit(route)))

    def look_up(self) -> None:
        """Look the next batch up now, and begins to send its rows; all ranks call it together.

        Raises:
            RuntimeError: If no batch is on its way, or rows may not be stale.
        """
        if self._staleness == 0:
            raise RuntimeError(
                "prefetch_rows: its rows miss the update that follows; build the engine with staleness=1"
            )
        if not self._ahead:
            raise RuntimeError("prefetch_rows: no batch is on its way; call prefetch first")
        first = self._ahead[0]
        if first.lookups is None:
            # The tables are this thread's alone; what goes over the wire is the other's.
            begun = self._tables.begin(first.routed.result())
            first.step = self._tables.step
            first.lookups = self._thread.submit(lambda: self._tables.finish(begun, self.exchange))

    def take(self, batch: Batch, *, train: bool, grad: bool) -> tuple[RoutedBatch, list[ShardedLookup] | None] | None:
        """Return what was done for a batch, after waiting for it; None if no batch is on its way.

        Raises:
            RuntimeError: If it is not the batch whose turn it is, or was prefetched in another mode, or its rows are
                too old.
        """
        if not self._ahead:
            return None
        first = self._ahead[0]
        other = any(batch.get(name) is not first.batch.get(name) for name in self._features)
        if not self._strict and (other or first.mode != (train, grad)):
            self.drop()
            self._ended = True
            return None
        if other:
            raise RuntimeError("prefetch: batches must come to the engine in the order in which they were prefetched")
        if first.mode != (train, grad):
            raise RuntimeError(
                f"prefetch: the batch was prefetched with (training, gradients) = {first.mode} and comes with "
                f"{(train, grad)}; let what was prefetched come before train(), eval() or no_grad"
            )
        self._ahead.popleft()
        if first.lookups is None:
            return first.routed.result(), None
        old = self._tables.step - first.step
        if old > self._staleness:
            raise RuntimeError(
                f"prefetch: the rows of the batch are {old} steps old, and staleness={self._staleness}; call "
                f"prefetch_rows no earlier than before the last step"
            )
        return first.routed.result(), first.lookups.result()

    def drop(self) -> None:
        """Wait for what is on its way, and forgets it; all ranks call it together."""
        while self._ahead:
            first = self._ahead.popleft()
            for waiting in (first.routed, first.lookups):
                if waiting is not None:
                    waiting.exception()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _twin(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return another group of the same ranks."""
    if dist.get_world_size(group) < dist.get_world_size():
        raise ValueError(
            "EmbeddingEngine: prefetch needs a process group of its own, and torch makes one of some ranks only where "
            "all ranks ask for it; call dist.new_group(ranks) on all of them, and give it as prefetch_group"
        )
    twin: dist.ProcessGroup = dist.new_group(
        timeout=timeout_of(group), backend=dist.get_backend(group), group_desc="recis_hybrid prefetch"
    )
    return twin
