"""Sends the ids of later batches to their owners while an earlier batch is computed.

One thread sends, one batch after another, in a process group of its own: so its collectives have the same order on all
ranks, whatever the training thread does meanwhile in the tables' own group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid.accelerator import is_accelerator, record_event
from recis_hybrid.embedding.distributed.exchange import Exchange, timeout_of
from recis_hybrid.embedding.distributed.id_exchange import Read, RoutedBatch
from recis_hybrid.embedding.distributed.sharded_table import ShardedLookup, ShardedTables
from recis_hybrid.ragged import Batch

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Work(Generic[T]):
    """Work of the thread; on an accelerator, with the event that ends what it has queued there."""

    future: Future[tuple[T, torch.Event | None]]
    device: torch.device

    def result(self) -> T:
        """Wait for the thread; what the caller queues next runs after what the thread has queued."""
        value, queued = self.future.result()
        if queued is not None:
            stream = torch.accelerator.current_stream(self.device)
            stream.wait_event(queued)
            for tensor in _tensors_of(value):
                if tensor.device == self.device:
                    tensor.record_stream(stream)
        return value

    def has_succeeded(self) -> bool:
        """Return whether the result is there, without waiting."""
        return self.future.done() and self.future.exception() is None

    def finish(self) -> None:
        """Wait for the thread, and for what it has queued; its failure is dropped with its result."""
        if self.future.exception() is None:
            self.result()


class _Thread:
    """A thread that runs one function after another, on a stream of its own where the tables are on an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="recis-prefetch")
        self._device = device
        self._stream = torch.Stream(device) if is_accelerator(device) else None

    def submit(self, function: Callable[[], T]) -> _Work[T]:
        """Run a function after what the calling thread has queued."""
        stream = self._stream
        before = None if stream is None else record_event(self._device)

        def run() -> tuple[T, torch.Event | None]:
            if stream is None or before is None:
                return function(), None
            torch.accelerator.set_device_index(self._device)
            torch.accelerator.set_stream(stream)
            stream.wait_event(before)
            return function(), record_event(self._device)

        return _Work(self._pool.submit(run), self._device)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class PrefetchedBatch:
    """A batch whose ids are being sent."""

    batch: Batch
    mode: tuple[bool, bool]
    """``(train, grad)``, as for :meth:`Prefetcher.send`."""
    routed: _Work[RoutedBatch]
    lookups: _Work[list[ShardedLookup]] | None = None
    """Its lookups, if :meth:`Prefetcher.look_up` made them early."""
    step: int = 0
    """Steps of the tables when they were made."""
    is_read: bool = False
    """True if the records of its ids are being read from disk."""


class Prefetcher:
    """Sends the ids of batches ahead.

    Args:
        tables: The tables.
        features: Columns of ids; a batch is identified by them.
        depth: Maximum number of prefetched batches.
        staleness: Maximum age in steps of the rows that a batch is computed with: 0 or 1.
        group: A process group of the tables' ranks for prefetching alone; None makes one.

    Raises:
        ValueError: If ``group`` is None and the tables' ranks are not all ranks, so that no group can be made here.
    """

    def __init__(
        self,
        tables: ShardedTables,
        features: Sequence[str],
        *,
        depth: int,
        staleness: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._tables = tables
        self._features = list(features)
        self._depth = depth
        self._staleness = staleness
        self.exchange = Exchange(group or _twin(tables.exchange.group), tables.exchange.device)
        self._thread = _Thread(tables.tables[0].table.device)
        self._queue: deque[PrefetchedBatch] = deque()
        self._last: Batch = {}

    def __len__(self) -> int:
        """Return the number of prefetched batches."""
        return len(self._queue)

    def send(self, batch: Batch, read: Callable[[], Read], *, train: bool, grad: bool) -> None:
        """Start sending the ids of a batch; collective.

        Args:
            batch: The batch.
            read: Reads its columns, as ``Router.route`` takes it.
            train: Whether it is a training lookup.
            grad: Whether gradients may follow.

        Raises:
            RuntimeError: If ``depth`` batches are prefetched already.
        """
        if len(self._queue) >= self._depth:
            raise RuntimeError(
                f"prefetch: {len(self._queue)} batches are on their way, and prefetch_depth={self._depth}; call the "
                f"engine with the first of them before the next is prefetched"
            )

        def route() -> RoutedBatch:
            return self._tables.router.route(read, train=train, grad=grad, exchange=self.exchange)

        self._queue.append(PrefetchedBatch(batch, (train, grad), self._thread.submit(route)))

    def read_records(self) -> None:
        """Start to read the records of prefetched batches from disk, as far as their ids have arrived."""
        for each in self._queue:
            if not each.is_read and each.lookups is None and each.routed.has_succeeded():
                each.is_read = True
                self._tables.prefetch(each.routed.result())

    def look_up(self) -> None:
        """Look up the next batch early, and start sending its rows; collective.

        Raises:
            RuntimeError: If no batch is prefetched, or rows may not be stale.
        """
        if self._staleness == 0:
            raise RuntimeError(
                "prefetch_rows: its rows miss the update that follows; build the engine with staleness=1"
            )
        if not self._queue:
            raise RuntimeError("prefetch_rows: no batch is on its way; call prefetch first")
        first = self._queue[0]
        if first.lookups is None:
            # Only the calling thread touches tables; the other one only communicates.
            replies = self._tables.look_up(first.routed.result())
            first.step = self._tables.step
            first.lookups = self._thread.submit(lambda: self._tables.fetch(replies, self.exchange))

    def take(self, batch: Batch, *, train: bool, grad: bool) -> tuple[RoutedBatch, list[ShardedLookup] | None] | None:
        """Return the routed batch, and its lookups if made early, after waiting; None if it was not prefetched.

        Raises:
            RuntimeError: If another batch was prefetched before it, it was prefetched in another mode, or its rows are
                too old.
        """
        self._last = batch
        if not any(self._same(batch, each.batch) for each in self._queue):
            return None
        first = self._queue[0]
        if not self._same(batch, first.batch):
            raise RuntimeError("prefetch: batches must come to the engine in the order in which they were prefetched")
        if first.mode != (train, grad):
            raise RuntimeError(
                f"prefetch: the batch was prefetched with (training, gradients) = {first.mode} and comes with "
                f"{(train, grad)}; use up the prefetched batches before train(), eval() or no_grad"
            )
        self._queue.popleft()
        if first.lookups is None:
            return first.routed.result(), None
        old = self._tables.step - first.step
        if old > self._staleness:
            raise RuntimeError(
                f"prefetch: the rows of the batch are {old} steps old, and staleness={self._staleness}; call "
                f"prefetch_rows no earlier than before the last step"
            )
        return first.routed.result(), first.lookups.result()

    def has_read(self, batch: Batch) -> bool:
        """Return whether the last lookup read the columns of a batch, the same objects."""
        return self._same(batch, self._last)

    def _same(self, one: Batch, other: Batch) -> bool:
        return all(one.get(name) is other.get(name) for name in self._features)

    def drop(self) -> None:
        """Wait for the prefetched batches, and drop them; collective."""
        while self._queue:
            first = self._queue.popleft()
            for work in (first.routed, first.lookups):
                if work is not None:
                    work.finish()

    def close(self) -> None:
        """End the thread."""
        self._thread.close()


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, through dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_of(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_of(part)


def _twin(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return a new group of the same ranks."""
    if dist.get_world_size(group) < dist.get_world_size():
        raise ValueError(
            "EmbeddingEngine: prefetch needs a process group of its own, and torch makes a group of some ranks only if "
            "all ranks call for it; call dist.new_group(ranks) on all of them, and pass it as prefetch_group"
        )
    twin: dist.ProcessGroup = dist.new_group(
        timeout=timeout_of(group), backend=dist.get_backend(group), group_desc="recis_hybrid prefetch"
    )
    return twin
