"""Processes that are ranks of a Gloo group, kept for all tests that ask for them."""

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
import torch.multiprocessing as mp

RANKS = 4
TIMEOUT_S = 20.0


class Ranks:
    """Processes, of which the first one, two, three, four or eight work together.

    Args:
        timeout_s: After which a collective that others do not join raises.
        ranks: How many.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S, ranks: int = RANKS) -> None:
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="recis-ranks-")
        # Forked off a process that has imported what they need, and what optimizers import when they are first made,
        # and has no threads: a few seconds for all of them.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "tests.support.sharded", "tests.support.sharded_saves"])
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
        """Has the first ranks call ``function(group, *args)``."""
        for connection in self.connections[:ranks]:
            connection.send((ranks, function, args))

    def results(self, ranks: int, timeout_s: float | None = None) -> list[Any]:
        """Return what each rank's call returned, or the text of what it raised as an exception."""
        found = []
        timeout_s = 3 * self._timeout_s if timeout_s is None else timeout_s
        for rank, connection in enumerate(self.connections[:ranks]):
            if not connection.poll(timeout_s):
                raise TimeoutError(f"rank {rank} has not answered in {timeout_s} s")
            try:
                found.append(connection.recv())
            except EOFError:
                found.append(RuntimeError(f"rank {rank} has died"))
        return found

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what ``function(group, *args)`` returned on each of the first ranks."""
        self.start(ranks, function, *args)
        results = self.results(ranks)
        failures = [result for result in results if isinstance(result, Exception)]
        if failures:
            raise failures[0]
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._folder.cleanup()


AHEAD: dict[int, dist.ProcessGroup] = {}
"""Further groups of the first so many ranks, within a rank."""
SAVING: dict[int, dist.ProcessGroup] = {}
"""And others, for savers."""


def serve(rank: int, ranks: int, store: str, timeout_s: float, connection: Connection) -> None:
    """What a rank runs: one call after another."""
    torch.set_num_threads(1)
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
