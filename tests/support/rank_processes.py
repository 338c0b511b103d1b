"""Processes that are ranks of a Gloo group, shared by all tests that need them."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import emulated
from tests.support.programs import server

RANKS = 4
TIMEOUT_S = 20.0


class Ranks:
    """Processes of which the first one, two, three, four or eight can form a group.

    Args:
        timeout_s: Seconds until a collective raises if not all ranks join.
        ranks: Number of processes.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S, ranks: int = RANKS) -> None:
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="recis-ranks-")
        context = server()  # forks the ranks from a process that has already imported their modules
        pipes = [context.Pipe() for _ in range(ranks)]
        self.connections: list[Connection] = [ours for ours, _ in pipes]
        store = Path(self._folder.name) / "store"
        self.processes = [
            context.Process(target=serve, args=(rank, ranks, str(store), timeout_s, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def start(self, ranks: int, function: Callable[..., Any], *args: Any) -> None:
        """Start ``function(group, *args)`` on the first ranks."""
        for connection in self.connections[:ranks]:
            connection.send((ranks, function, args))

    def results(self, ranks: int, timeout_s: float | None = None) -> list[Any]:
        """Return the result of each rank's call, or an exception with the text of its error."""
        found = []
        timeout_s = 3 * self._timeout_s if timeout_s is None else timeout_s
        for rank, connection in enumerate(self.connections[:ranks]):
            if not connection.poll(timeout_s):
                raise TimeoutError(f"rank {rank} has not answered within {timeout_s} s")
            try:
                found.append(connection.recv())
            except EOFError:
                found.append(RuntimeError(f"rank {rank} has died"))
        return found

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(group, *args)`` on the first ranks and return their results."""
        self.start(ranks, function, *args)
        results = self.results(ranks)
        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            raise failures[0]
        return results

    def close(self) -> None:
        """Kill the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._folder.cleanup()


AHEAD: dict[int, dist.ProcessGroup] = {}
"""Groups for prefetching by number of ranks; set in each rank."""
SAVING: dict[int, dist.ProcessGroup] = {}
"""Groups for savers by number of ranks; set in each rank."""


def serve(rank: int, ranks: int, store: str, timeout_s: float, connection: Connection) -> None:
    """Run the calls that a rank receives, sequentially."""
    torch.set_num_threads(1)
    if emulated.is_usable():
        emulated.load()  # before the first backward pass, at which autograd counts the devices
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    sizes = [size for size in (1, 2, 3, 4, 8) if size <= ranks]
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in sizes}
    SAVING.update({size: dist.new_group(list(range(size)), timeout=timeout) for size in sizes})
    AHEAD.update({size: dist.new_group(list(range(size)), timeout=timeout) for size in (2, 3) if size < ranks})
    while True:
        try:
            size, function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(groups[size], *args))
        except Exception as error:
            connection.send(RuntimeError(f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))
