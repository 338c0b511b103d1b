"""Ranks of a job as threads of this process, connected by Gloo groups."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def in_ranks(size: int, work: Callable[[int, dist.ProcessGroup], Any], seconds: float = 60) -> list[Any]:
    """Call ``work(rank, group)`` in one thread per rank and return the results or exceptions.

    Raises:
        TimeoutError: A rank has not finished within ``seconds``.
    """
    store = dist.HashStore()
    results: list[Any] = [TimeoutError(f"a rank of {size} hangs")] * size

    def run(rank: int) -> None:
        try:
            # The ranks share an interpreter, so a waiting rank must not hold its lock.
            group = dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=seconds))
            results[rank] = work(rank, group)
        except BaseException as error:  # includes failed assertions
            results[rank] = error.with_traceback(None)  # the frames would keep their objects alive
            error.__context__ = error.__cause__ = None

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    hanging = [result for result in results if isinstance(result, TimeoutError)]
    if hanging:
        raise hanging[0]
    return results


def all_of(size: int, work: Callable[[int, dist.ProcessGroup], Any], seconds: float = 60) -> list[Any]:
    """Return the results of ``in_ranks``, or raise the first exception of a rank."""
    results = in_ranks(size, work, seconds)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
