"""Runs an iterator ahead of its consumer, in threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
_THREAD = "recis-columnio"
_DECODER = "recis-columnio-decode"


def prefetched(
    source: Generator[S, None, None], work: Callable[[S], T], depth: int, threads: int = 1
) -> Generator[T, None, None]:
    """Yields what `work` makes of the items of `source`, up to `depth` items ahead, in their order.

    The consumer orders items one by one and threads never have more than `depth` of them to make, so that none waits
    with an item in its hands: nothing has to be woken when the consumer leaves early, nor when the interpreter ends.
    One thread at a time takes an item from the source, while others work on theirs. An error is raised here, as itself,
    after the items before it. When this iterator is closed, or is no longer referenced, the threads end after at most
    the items in work, and `source` is closed.

    Args:
        source: Whatever makes the items; it is touched only by the threads until they have ended.
        work: Called with each item, by several threads at once where there are several.
        depth: How many items to be ahead; 0 makes them in the consumer's thread.
        threads: How many threads; no more than `depth` are used.
    """
    if depth == 0:
        for item in source:
            yield work(item)
        return
    end = object()
    ordered: deque[Future[T | object]] = deque()
    taking = threading.Lock()
    # Shared by the threads without keeping this generator, which ends when its consumer drops it.
    task = _task(source, work, ordered, taking, end)
    pool = ThreadPoolExecutor(min(threads, depth), thread_name_prefix=_THREAD)
    try:
        pending: deque[Future[T | object]] = deque()
        for _ in range(depth):
            _order(pool, task, ordered, pending)
        while (made := pending.popleft().result()) is not end:
            _order(pool, task, ordered, pending)
            yield made  # type: ignore[misc]
            # The consumer is done with it, and keeping it while the next is awaited would keep one more in memory.
            del made
    finally:
        # The garbage collector may close this in one of the very threads that it would wait for; then they, and with
        # them the source, end by themselves.
        elsewhere = not threading.current_thread().name.startswith(_THREAD)
        pool.shutdown(wait=elsewhere, cancel_futures=True)
        if elsewhere:
            source.close()


def _order(
    pool: ThreadPoolExecutor,
    task: Callable[[], None],
    ordered: deque[Future[T | object]],
    pending: deque[Future[T | object]],
) -> None:
    future: Future[T | object] = Future()
    ordered.append(future)
    pending.append(future)
    pool.submit(task)


def _task(
    source: Generator[S, None, None],
    work: Callable[[S], T],
    ordered: deque[Future[T | object]],
    taking: threading.Lock,
    end: object,
) -> Callable[[], None]:
    def task() -> None:
        # The next item goes to the next order, whichever thread comes first.
        with taking:
            future = ordered.popleft()
            try:
                item = next(source, end)
            except BaseException as error:
                future.set_exception(error)
                return
        if item is end:
            future.set_result(end)
            return
        try:
            future.set_result(work(item))  # type: ignore[arg-type]
        except BaseException as error:
            future.set_exception(error)

    return task


def chained(sources: Iterator[Generator[T, None, None]], threads: int) -> Generator[T, None, None]:
    """Yields the items of each source, one source after the other, while threads work at the following ones.

    As many sources as there are threads are open at a time, and of each at most one item waits.

    Args:
        sources: Makers of items; each is touched by one thread at a time.
        threads: How many threads; 1 makes all items in the consumer's.
    """
    if threads == 1:
        for source in sources:
            yield from source
        return
    end = object()
    pool = ThreadPoolExecutor(threads, thread_name_prefix=_DECODER)
    active: deque[tuple[Generator[T, None, None], Future[T | object]]] = deque()

    def begin(count: int) -> None:
        active.extend((source, pool.submit(next, source, end)) for source in islice(sources, count))

    try:
        begin(threads)
        while active:
            source, future = active[0]
            while (made := future.result()) is not end:
                future = pool.submit(next, source, end)
                active[0] = source, future
                yield made  # type: ignore[misc]
                del made
            active.popleft()
            begin(1)
    finally:
        elsewhere = threading.current_thread().name.rpartition("_")[0] != _DECODER
        pool.shutdown(wait=elsewhere, cancel_futures=True)
        if elsewhere:
            for source, _ in active:
                source.close()
