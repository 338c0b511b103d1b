"""Runs an iterator ahead of its consumer, in threads."""

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
    """Yield what `work` makes of the items of `source`, up to `depth` items ahead, in their order.

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
    pool = ThreadPoolExecutor(min(threads, depth), thread_name_prefix=_THREAD)
    # Shared by the threads without keeping this generator, which ends when its consumer drops it.
    line = _Line(source, work, min(threads, depth))
    interrupted = False
    try:
        pending = deque(line.order(pool) for _ in range(depth))
        while (made := pending.popleft().get()) is not line.end:
            if isinstance(made, _Failed):
                # Its traceback has this frame, which is not to keep what was made after it.
                pending.clear()
                error = made.error
                del made
                try:
                    raise error
                finally:
                    del error
            pending.append(line.order(pool))
            yield made
            # The consumer is done with it, and keeping it while the next is awaited would keep one more in memory.
            del made
    except KeyboardInterrupt:
        interrupted = True  # whoever ends a wait for a slow store is not to wait for it here
        raise
    finally:
        line.orders.clear()
        # The garbage collector may close this in one of the very threads that it would wait for; then they, and with
        # them the source, end by themselves.
        elsewhere = not interrupted and not threading.current_thread().name.startswith(_THREAD)
        pool.shutdown(wait=elsewhere, cancel_futures=True)
        if elsewhere:
            source.close()


class _Failed(NamedTuple):
    """Takes the place of an item."""

    error: BaseException


class _Line(Generic[S, T]):
    """Items that are ordered, and the threads that make them.

    A thread goes on as long as there are orders, and an order begins a thread only where one stands still: to hand each
    item to a thread anew, and a Future with it, takes longer than to cut a small batch.
    """

    def __init__(self, source: Generator[S, None, None], work: Callable[[S], T], threads: int) -> None:
        self.end = object()
        self.orders: deque[SimpleQueue[Any]] = deque()
        self._source, self._work = source, work
        self._idle = threads
        self._taking, self._counting = threading.Lock(), threading.Lock()

    def order(self, pool: ThreadPoolExecutor) -> SimpleQueue[Any]:
        """Return where the next item will be put, or a _Failed, or `end`."""
        # As the pool says by itself where an order begins a thread; without it the end of the interpreter, which waits
        # for the threads, would wait for a consumer that is a thread, too.
        if getattr(futures, "_shutdown", False):
            raise RuntimeError("columnio: nothing more is read, for the interpreter is shutting down")
        place: SimpleQueue[Any] = SimpleQueue()
        with self._counting:
            self.orders.append(place)
            begins = self._idle > 0
            self._idle -= begins
        if begins:
            pool.submit(self._run)
        return place

    def _run(self) -> None:
        while self._make():
            pass

    def _make(self) -> bool:
        # The next item goes to the next order, whichever thread comes first.
        with self._taking:
            with self._counting:
                if not self.orders:
                    self._idle += 1
                    return False
                place = self.orders.popleft()
            try:
                item = next(self._source, self.end)
            except BaseException as error:
                place.put(_Failed(error))
                del place  # or the traceback would keep what keeps it
                return True
        try:
            place.put(item if item is self.end else self._work(item))  # type: ignore[arg-type]
        except BaseException as error:
            place.put(_Failed(error))
            del place, item
        return True


def chained(sources: Iterator[Generator[T, None, None]], threads: int) -> Generator[T, None, None]:
    """Yield the items of each source, one source after the other, while threads work at the following ones.

    As many sources as there are threads are open at a time, and of each at most one item waits. A thread that comes to
    the end of a source begins the next one by itself: were that left to the consumer, which has the source's last items
    to work at first, the thread would stand still as long.

    Args:
        sources: Makers of items; it and each of them is touched by one thread at a time.
        threads: How many threads; 1 makes all items in the consumer's.
    """
    if threads == 1:
        for source in sources:
            yield from source
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix=_DECODER)
    chain = _Chain(sources)
    try:
        for source, place in [begun for _ in range(threads) if (begun := chain.begin()) is not None]:
            pool.submit(chain.make, source, place)
        while chain.active:
            source, place = chain.active[0]
            while (made := place.get()) is not chain.end:
                if isinstance(made, _Failed):
                    raise made.error
                place = SimpleQueue()
                chain.active[0] = source, place
                pool.submit(chain.make, source, place)
                yield made
                del made
            chain.active.popleft()
    finally:
        # Without a lock: the garbage collector may close this in a thread that holds it.
        chain.closed = True
        elsewhere = threading.current_thread().name.rpartition("_")[0] != _DECODER
        pool.shutdown(wait=elsewhere, cancel_futures=True)
        if elsewhere:
            for source, _ in chain.active:
                source.close()
        chain.active.clear()  # or an error's traceback would keep the items that wait there


class _Chain(Generic[T]):
    """Sources one after another, those that are open, and the threads that make their items.

    Threads hand nothing to the pool, whose locks a generator that is collected in one of them would need.
    """

    def __init__(self, sources: Iterator[Generator[T, None, None]]) -> None:
        self.end = object()
        self.closed = False
        self.active: deque[tuple[Generator[T, None, None], SimpleQueue[Any]]] = deque()
        """The sources that are open, in order, and where the next item of each will be put, or a _Failed, or `end`."""
        self._sources, self._beginning = sources, threading.Lock()

    def begin(self) -> tuple[Generator[T, None, None], SimpleQueue[Any]] | None:
        """Open the next source, whose first item is still to be made; None where there is none, or no more wanted."""
        with self._beginning:
            if self.closed or (source := next(self._sources, None)) is None:
                return None
            begun: tuple[Generator[T, None, None], SimpleQueue[Any]] = (source, SimpleQueue())
            self.active.append(begun)
            return begun

    def make(self, source: Generator[T, None, None], place: SimpleQueue[Any]) -> None:
        """Make the next item of a source; where it has ended, the first of the next source."""
        begun: tuple[Generator[T, None, None], SimpleQueue[Any]] | None = (source, place)
        while begun is not None:
            source, place = begun
            try:
                item = next(source, self.end)
                begun = self.begin() if item is self.end else None
            except BaseException as error:
                place.put(_Failed(error))
                return
            place.put(item)
