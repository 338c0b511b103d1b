"""A small pool of threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """Threads for the duration of a ``with`` block, at whose end all work is done.

    Pools of ``concurrent.futures`` refuse work during the exit of the process, when a background save may still be
    running.

    Args:
        count: Number of threads.
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
        """Queue work.

        Args:
            work: Called in one of the threads.

        Returns:
            A future for its result; work that is cancelled before it starts is skipped.
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
            except BaseException as error:  # raised by Future.result()
                future.set_exception(error)
            del item, future, work  # free them before waiting for the next
