"""A few threads that work through what they are handed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """Threads for the time of a `with` block, at whose end all work is done.

    Those of `concurrent.futures` take no work once the process is ending, when a save in the background still does.

    Args:
        count: how many threads.
    """

    def __init__(self, count: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work) for _ in range(count)]

    def __enter__(self) -> Workers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for _end in range(len(self._threads)):
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Hand out work.

        Args:
            work: called in one of the threads.

        Returns:
            Waits for its result, or raises what it raised; work that is cancelled before it has begun is left out.
        """
        future: Future[T] = Future()
        self._queue.put((future, work))
        return future

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # raised where the result is waited for
                future.set_exception(error)
            del item, future, work  # so that nothing of it lives until the next
