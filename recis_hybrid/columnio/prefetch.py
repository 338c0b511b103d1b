"""Runs an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_THREAD = "recis-columnio"


def prefetched(source: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yields the items of `source`, which a thread of its own works out up to `depth` items ahead.

    The consumer orders items one by one and the thread never has more than `depth` of them to make, so it never waits
    with an item in its hands: nothing has to be woken when the consumer leaves early, nor when the interpreter ends.
    An error in `source` is raised here, as itself, after the items before it. When this iterator is closed, or is no
    longer referenced, the thread ends after at most the one item in work, and `source` is closed.

    Args:
        source: Whatever makes the items; it is touched only by the thread until that has ended.
        depth: How many items to be ahead; 0 makes them in the consumer's thread.
    """
    if depth == 0:
        yield from source
        return
    end = object()
    thread = ThreadPoolExecutor(1, thread_name_prefix=_THREAD)
    try:
        pending: deque[Future[T | object]] = deque(thread.submit(next, source, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, source, end))
            yield item  # type: ignore[misc]
            # The consumer is done with it, and keeping it while the next is awaited would keep one more in memory.
            del item
    finally:
        # The garbage collector may close this in the very thread that it would wait for; then the thread, and with it
        # the source, ends by itself.
        elsewhere = not threading.current_thread().name.startswith(_THREAD)
        thread.shutdown(wait=elsewhere, cancel_futures=True)
        if elsewhere:
            source.close()
