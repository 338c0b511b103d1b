import gc
import threading
import time
from collections.abc import Generator

import pytest

from recis_hybrid.columnio.prefetch import prefetched


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
    """Counts to `stop`, and remembers what happened to it."""

    def __init__(self, stop: int, error: BaseException | None = None) -> None:
        self.made, self.closed = 0, False
        self.threads: set[int] = set()
        self.items = self._items(stop, error)

    def _items(self, stop: int, error: BaseException | None) -> Generator[int, None, None]:
        try:
            for number in range(stop):
                self.threads.add(threading.get_ident())
                self.made += 1
                yield number
            if error is not None:
                raise error
        finally:
            self.closed = True


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 100])
def test_items_come_in_order_and_the_thread_ends(depth: int) -> None:
    source = Source(20)
    assert list(prefetched(source.items, same, depth)) == list(range(20))
    assert source.closed
    assert gone()
    assert (source.threads == {threading.get_ident()}) == (depth == 0)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_thread_is_never_further_ahead_than_depth(depth: int) -> None:
    source = Source(50)
    for taken, _ in enumerate(prefetched(source.items, same, depth), start=1):
        time.sleep(0.002)
        assert source.made <= taken + depth
    assert source.made == 50


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_arrives_as_itself_after_the_items_before_it(depth: int) -> None:
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
def test_leaving_early_ends_the_thread_and_closes_the_source(depth: int) -> None:
    source = Source(1000)
    ahead = prefetched(source.items, same, depth)
    assert [next(ahead), next(ahead)] == [0, 1]
    ahead.close()
    assert source.closed
    assert not readers()
    assert source.made <= 2 + depth


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
