from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Generator

import pytest

from recis_hybrid.columnio.read.prefetch import chained, prefetched


def same(item: int) -> int:
    return item


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("recis-columnio")]


def gone() -> bool:
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not readers()


class Source:
    """Numbers up to ``stop``; records the threads and the end of the iterator."""

    def __init__(self, stop: int, error: BaseException | None = None) -> None:
        self.produced, self.closed = 0, False
        self.threads: set[int] = set()
        self.items = self._items(stop, error)

    def _items(self, stop: int, error: BaseException | None) -> Generator[int, None, None]:
        try:
            for number in range(stop):
                self.threads.add(threading.get_ident())
                self.produced += 1
                yield number
            if error is not None:
                raise error
        finally:
            self.closed = True


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 100])
def test_items_are_in_order_and_the_thread_ends(depth: int) -> None:
    source = Source(20)
    assert list(prefetched(source.items, same, depth)) == list(range(20))
    assert source.closed
    assert gone()
    assert (source.threads == {threading.get_ident()}) == (depth == 0)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_thread_is_at_most_depth_items_ahead(depth: int) -> None:
    source = Source(50)
    for taken, _ in enumerate(prefetched(source.items, same, depth), start=1):
        time.sleep(0.002)
        assert source.produced <= taken + depth
    assert source.produced == 50


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_is_raised_unchanged_after_the_preceding_items(depth: int) -> None:
    error = LookupError("mine")
    source = Source(3, error)
    seen: list[int] = []

    def consume() -> None:
        for item in prefetched(source.items, same, depth):
            seen.append(item)

    with pytest.raises(LookupError) as caught:
        consume()
    assert caught.value is error
    assert seen == [0, 1, 2]
    assert gone()


@pytest.mark.parametrize("depth", [1, 4])
def test_closing_early_ends_the_thread_and_closes_the_source(depth: int) -> None:
    source = Source(1000)
    ahead = prefetched(source.items, same, depth)
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert source.closed
    assert not readers()
    assert source.produced <= 2 + depth


def test_dropping_the_iterator_ends_the_thread() -> None:
    source = Source(1000)
    ahead = prefetched(source.items, same, 2)
    next(ahead)
    del ahead
    gc.collect()
    assert gone()
    assert source.closed


def test_an_error_in_the_consumer_ends_the_thread() -> None:
    source = Source(1000)

    def consume() -> None:
        for _ in prefetched(source.items, same, 2):
            raise KeyError("the consumer's")

    with pytest.raises(KeyError, match="the consumer's"):
        consume()
    gc.collect()
    assert gone()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_several_threads_keep_the_order(threads: int) -> None:
    working: set[int] = set()

    def slowly(item: int) -> int:
        working.add(threading.get_ident())
        time.sleep(0.005 * (item % 3))
        return -item

    source = Source(30)
    assert list(prefetched(source.items, slowly, 8, threads)) == [-item for item in range(30)]
    assert 1 < len(working) <= threads
    assert source.closed
    assert gone()


def test_an_error_in_the_work_is_raised_in_order() -> None:
    error = LookupError("mine")

    def work(item: int) -> int:
        if item == 4:
            raise error
        return item

    source, seen = Source(1000), []

    def consume() -> None:
        for item in prefetched(source.items, work, 6, 3):
            seen.append(item)

    with pytest.raises(LookupError) as caught:
        consume()
    assert caught.value is error
    assert seen == [0, 1, 2, 3]
    assert gone()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_chained_sources_are_read_in_sequence(threads: int) -> None:
    sources = [Source(size) for size in (3, 0, 1, 7, 2)]
    assert list(chained((source.items for source in sources), threads)) == [0, 1, 2, 0, *range(7), 0, 1]
    assert all(source.closed for source in sources)
    assert gone()


@pytest.mark.parametrize("threads", [1, 2])
def test_one_chained_source_per_thread_is_open(threads: int) -> None:
    sources = [Source(5) for _ in range(6)]
    items = chained((source.items for source in sources), threads)
    assert [next(items) for _ in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    time.sleep(0.05)
    assert [source.produced > 0 for source in sources] == [number < 1 + threads for number in range(6)]
    # At most one item of each is waiting.
    assert [source.produced for source in sources[2:3]] == [1] * (threads - 1) + [0] * (2 - threads)
    items.close()
    assert all(source.closed == (source.produced > 0) for source in sources)
    assert gone()


def test_a_thread_opens_the_next_source_while_the_consumer_works() -> None:
    sources = [Source(1) for _ in range(5)]
    items = chained((source.items for source in sources), 2)
    next(items)
    deadline = time.monotonic() + 10
    while not (sources[1].produced and sources[2].produced) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [source.produced for source in sources] == [1, 1, 1, 0, 0]
    items.close()
    assert all(source.closed == (source.produced > 0) for source in sources)
    assert gone()


def test_idle_threads_continue_with_the_next_request() -> None:
    source = Source(30)
    got = []
    for item in prefetched(source.items, same, 3, 2):
        got.append(item)
        if item % 5 == 0:
            # All requests are served, and the threads are idle.
            time.sleep(0.01)
    assert got == list(range(30))
    assert gone()


def test_an_error_in_a_chained_source_is_raised_after_the_preceding_items() -> None:
    sources = [Source(2), Source(1, LookupError("mine")), Source(3)]
    seen = []

    def consume() -> None:
        for item in chained((source.items for source in sources), 3):
            seen.append(item)

    with pytest.raises(LookupError, match="mine"):
        consume()
    assert seen == [0, 1, 0]
    assert gone()


def test_a_generator_that_is_collected_in_one_of_its_threads_ends() -> None:
    collected = threading.Event()
    produced = []

    def sources() -> Generator[Generator[int, None, None], None, None]:
        for number in range(4):
            if number == 2:
                # In a thread at the end of its source, which opens the next one.
                assert waiting.wait(10)
                gc.collect()
                collected.set()
            produced.append(Source(1))
            yield produced[-1].items

    waiting = threading.Event()
    items = chained(sources(), 2)
    next(items)
    garbage: list[object] = [items]
    garbage.append(garbage)
    del items, garbage
    waiting.set()
    assert collected.wait(10)
    assert gone()


SHUTDOWN = """
import threading, time
from recis_hybrid.columnio.read.prefetch import prefetched

def numbers():
    for number in range(10**9):
        yield number

def consume():
    for _ in prefetched(numbers(), lambda item: time.sleep(0.01), 4):
        pass

threading.Thread(target=consume, daemon=True).start()
time.sleep(0.2)
"""


def test_the_interpreter_does_not_wait_for_a_consumer_in_a_daemon_thread() -> None:
    subprocess.run([sys.executable, "-c", SHUTDOWN], check=True, timeout=20, capture_output=True)


def test_a_dropped_error_keeps_no_items_alive() -> None:
    class Item:
        pass

    alive: list[weakref.ref[Item]] = []

    def items() -> Generator[Item, None, None]:
        for _ in range(8):
            item = Item()
            alive.append(weakref.ref(item))
            yield item

    def work(item: Item) -> Item:
        if len(alive) == 4:
            raise LookupError("mine")
        return item

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(LookupError):
            for item in prefetched(items(), work, 4):
                del item
        assert gone()
        assert [each() for each in alive] == [None] * len(alive)
    finally:
        gc.enable()
