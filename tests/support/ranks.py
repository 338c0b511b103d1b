"""Ranks of a job as threads of this process, joined by real gloo groups."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def in_ranks(size: int, work: Callable[[int, dist.ProcessGroup], Any], seconds: float = 60) -> list[Any]:
    """Call `work(rank, group)` in a thread a rank; returns what each returned or raised.

    Raises:
        TimeoutError: If one of them has not ended by then.
    """
    store = dist.HashStore()
    results: list[Any] = [TimeoutError(f"a rank of {size} hangs")] * size

    def run(rank: int) -> None:
        try:
            # In one interpreter a rank waits for others that want to run Python: no wait may hold its lock.
            group = dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=seconds))
            results[rank] = work(rank, group)
        except BaseException as error:  # an assertion too is for the caller
            results[rank] = error.with_traceback(None)  # or its frames would keep what they made alive
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
    """As `in_ranks`; what a rank raised is raised here."""
    results = in_ranks(size, work, seconds)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
