"""Iterators that run ahead of their consumer in threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, thread as futures
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

S = TypeVar("S")
T = TypeVar("T")
_THREAD = "recis-columnio"
_DECODER = "recis-columnio-decode"


def prefetched(
    source: Generator[S, None, None], work: Callable[[S], T], depth: int, threads: int = 1
) -> Generator[T, None, None]:
    """Yield the results of ``work`` for the items of ``source`` in order, up to ``depth`` items ahead.

    The consumer requests items one by one, and at most ``depth`` requests are open, so a thread never waits to deliver
    an item, and none needs to be woken when the consumer stops early or the interpreter exits. One thread at a time
    takes an item from the source, while the others work on theirs. An error is raised here unchanged, after the items
    before it. When this iterator is closed or no longer referenced, the threads finish their current items, and
    ``source`` is closed.

    Args:
        source: The items; used only by the threads until they end.
        work: Called with each item, concurrently if there are several threads.
        depth: Number of items to prefetch; 0 works in the consumer's thread.
        threads: Number of threads; at most ``depth`` are used.
    """
    if depth == 0:
        for item in source:
            yield work(item)
        return
    pool = ThreadPoolExecutor(min(threads, depth), thread_name_prefix=_THREAD)
    # The threads share this object. It does not refer to this generator, which must end when its consumer drops it.
    requests = _Requests(source, work, min(threads, depth))
    interrupted = False
    try:
        pending = deque(requests.add(pool) for _ in range(depth))
        while (result := pending.popleft().get()) is not requests.end:
            if isinstance(result, _Failure):
                # The traceback refers to this frame, which must not keep later results alive.
                pending.clear()
                error = result.error
                del result
                try:
                    raise error
                finally:
                    del error
            pending.append(requests.add(pool))
            yield result
            # A reference here would keep one more item in memory while waiting for the next.
            del result
    except KeyboardInterrupt:
        interrupted = True  # a user who interrupts a slow read should not wait for it to finish
        raise
    finally:
        requests.queues.clear()
        # The garbage collector may close this generator in one of its own threads, which cannot wait for itself. The
        # threads, and with them the source, then end on their own.
        outside = not interrupted and not threading.current_thread().name.startswith(_THREAD)
        pool.shutdown(wait=outside, cancel_futures=True)
        if outside:
            source.close()


class _Failure(NamedTuple):
    """An error instead of an item."""

    error: BaseException


class _Requests(Generic[S, T]):
    """Requested items, and the threads that produce them.

    A thread continues as long as there are requests, and a request starts a thread only if one is idle: submitting each
    item to the pool, with a Future, takes longer than cutting a small batch.
    """

    def __init__(self, source: Generator[S, None, None], work: Callable[[S], T], threads: int) -> None:
        self.end = object()
        self.queues: deque[SimpleQueue[Any]] = deque()
        self._source, self._work = source, work
        self._idle = threads
        self._taking, self._counting = threading.Lock(), threading.Lock()

    def add(self, pool: ThreadPoolExecutor) -> SimpleQueue[Any]:
        """Request the next item; return the queue for it, for a _Failure, or for ``end``."""
        # The pool itself raises this only when a request starts a thread. Without this check, the interpreter, which
        # waits for the threads on exit, would also wait for a consumer in a daemon thread.
        if getattr(futures, "_shutdown", False):
            raise RuntimeError("columnio: reading stops because the interpreter is shutting down")
        queue: SimpleQueue[Any] = SimpleQueue()
        with self._counting:
            self.queues.append(queue)
            start = self._idle > 0
            self._idle -= start
        if start:
            pool.submit(self._run)
        return queue

    def _run(self) -> None:
        while self._produce():
            pass

    def _produce(self) -> bool:
        # The next item goes to the next request, whichever thread takes it.
        with self._taking:
            with self._counting:
                if not self.queues:
                    self._idle += 1
                    return False
                queue = self.queues.popleft()
            try:
                item = next(self._source, self.end)
            except BaseException as error:
                queue.put(_Failure(error))
                del queue  # it refers to the error, whose traceback refers to this frame
                return True
        try:
            queue.put(item if item is self.end else self._work(item))  # type: ignore[arg-type]
        except BaseException as error:
            queue.put(_Failure(error))
            del queue, item
        return True


def chained(sources: Iterator[Generator[T, None, None]], threads: int) -> Generator[T, None, None]:
    """Yield the items of the sources in sequence, while threads work on the following sources.

    One source per thread is open at a time, with at most one waiting item each. A thread at the end of a source opens
    the next one itself. Otherwise it would be idle until the consumer is done with the last items.

    Args:
        sources: Iterators of items; ``sources``, and each iterator, is used by one thread at a time.
        threads: Number of threads; 1 produces all items in the consumer's thread.
    """
    if threads == 1:
        for source in sources:
            yield from source
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix=_DECODER)
    chain = _Chain(sources)
    try:
        for source, queue in [opened for _ in range(threads) if (opened := chain.open_next()) is not None]:
            pool.submit(chain.produce, source, queue)
        while chain.active:
            source, queue = chain.active[0]
            while (result := queue.get()) is not chain.end:
                if isinstance(result, _Failure):
                    raise result.error
                queue = SimpleQueue()
                chain.active[0] = source, queue
                pool.submit(chain.produce, source, queue)
                yield result
                del result
            chain.active.popleft()
    finally:
        # Without the lock: the garbage collector may close this in a thread that holds it.
        chain.closed = True
        outside = threading.current_thread().name.rpartition("_")[0] != _DECODER
        pool.shutdown(wait=outside, cancel_futures=True)
        if outside:
            for source, _ in chain.active:
                source.close()
        chain.active.clear()  # else the traceback of an error would keep waiting items alive


class _Chain(Generic[T]):
    """Successive sources, some of them open, and the threads that produce their items.

    Threads submit nothing to the pool: a generator garbage-collected in one of them would need the pool's locks.
    """

    def __init__(self, sources: Iterator[Generator[T, None, None]]) -> None:
        self.end = object()
        self.closed = False
        self.active: deque[tuple[Generator[T, None, None], SimpleQueue[Any]]] = deque()
        """Open sources in order, each with the queue for its next item, for a _Failure, or for ``end``."""
        self._sources, self._opening = sources, threading.Lock()

    def open_next(self) -> tuple[Generator[T, None, None], SimpleQueue[Any]] | None:
        """Open the next source without producing an item; None if there is none, or the chain is closed."""
        with self._opening:
            if self.closed or (source := next(self._sources, None)) is None:
                return None
            opened: tuple[Generator[T, None, None], SimpleQueue[Any]] = (source, SimpleQueue())
            self.active.append(opened)
            return opened

    def produce(self, source: Generator[T, None, None], queue: SimpleQueue[Any]) -> None:
        """Produce the next item of a source or, at its end, the first item of the next source."""
        opened: tuple[Generator[T, None, None], SimpleQueue[Any]] | None = (source, queue)
        while opened is not None:
            source, queue = opened
            try:
                item = next(source, self.end)
                opened = self.open_next() if item is self.end else None
            except BaseException as error:
                queue.put(_Failure(error))
                return
            queue.put(item)
