"""Loss of a rank at random times, many times, while ranks share tables; print a table of trials.

    python -m tests.embedding.faults [--times 20] [--seed 0] [--only killed_in_exchange] [--json]

Three ranks train together. One of them is killed within a collective (before or after starting it), killed from outside
at any time, or stopped, so that it neither answers nor closes its connections. All others must raise ExchangeError
within the timeout of their group.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, ExchangeError, MinFrequency
from tests.support import rank_processes
from tests.support.rank_processes import Ranks

RANKS, TIMEOUT_S, SLACK_S = 3, 3.0, 3.0


def train(
    group: dist.ProcessGroup, victim: int, call: int, after: bool, prefetch: int, trained: str
) -> tuple[str, float]:
    """Train until another rank is lost; return the error and its time.

    Args:
        group: All ranks.
        victim: The rank that kills itself.
        call: Number of the collective in which it does so; -1: none.
        after: Whether it does so after starting the collective instead of before.
        prefetch: Number of batches sent ahead.
        trained: Folder in which each rank creates a file after its first steps.
    """
    rank, steps = dist.get_rank(group), 0
    configs = {
        "user": EmbeddingConfig(dim=8),
        "item": EmbeddingConfig(dim=16, admission=MinFrequency(2)),
        "page": EmbeddingConfig(dim=12, sharding="column"),
        "day": EmbeddingConfig(dim=4, sharding="replicated"),
    }
    engine = EmbeddingEngine(configs, optimizer=optim.Adam, group=group, prefetch_depth=prefetch)
    optimizer = optim.Adam(engine.parameters(), lr=0.01)
    exchanges = [engine._sharded.exchange]  # type: ignore[union-attr]
    if engine._prefetcher is not None:
        exchanges.append(engine._prefetcher.exchange)
    calls = 0
    for exchange in exchanges:

        def start(what: Any, *args: Any, original: Callable[..., Any] = exchange.start) -> Any:
            nonlocal calls
            calls += 1
            dies = rank == victim and calls == call
            if dies and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            transfer = original(what, *args)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return transfer

        exchange.start = start  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(rank)
    batches = [{name: torch.randint(0, 500, (300,), generator=generator) for name in configs} for _ in range(8)]
    try:
        engine.prefetch(batches[0])
        while True:
            values = engine(batches[steps % 8])
            engine.prefetch(batches[(steps + 1) % 8])
            torch.cat(list(values.values()), 1).square().mean().backward()
            optimizer.step()
            steps += 1
            if steps == 3:
                Path(trained, str(rank)).touch()
    except ExchangeError as error:
        return str(error), time.monotonic()


def lose(draw: random.Random, how: str, folder: str) -> None:
    """Run one trial in an empty folder; raise AssertionError if it fails."""
    ranks = Ranks(TIMEOUT_S, ranks=RANKS)
    victim, prefetch = draw.randrange(RANKS), draw.choice([0, 1])
    call = draw.randint(2, 120) if how == "killed_in_exchange" else -1
    try:
        ranks.start(RANKS, train, victim, call, draw.random() < 0.5, prefetch, folder)
        process = ranks.processes[victim]
        if how != "killed_in_exchange":
            begin = time.monotonic()
            while len(list(Path(folder).iterdir())) < RANKS:
                assert time.monotonic() - begin < 60, "the ranks do not train"
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.5))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        if how != "stopped":
            assert wait([process.sentinel], 30), "the rank was not killed"
        lost = time.monotonic()
        for rank, connection in enumerate(ranks.connections):
            if rank != victim:
                assert connection.poll(TIMEOUT_S + SLACK_S), f"rank {rank} hangs"
                found = connection.recv()
                assert not isinstance(found, Exception), found
                message, time_of_error = found
                assert "another rank has died, raised an error, or does not take part" in message
                assert time_of_error - lost < TIMEOUT_S + SLACK_S
    finally:
        if how == "stopped" and ranks.processes[victim].pid is not None:
            os.kill(ranks.processes[victim].pid, signal.SIGCONT)  # type: ignore[arg-type]
        ranks.close()


FAULTS = ("killed_in_exchange", "killed_at_any_time", "stopped")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="trials of each fault")
    parser.add_argument("--seed", default="0", help="seed of the random times")
    parser.add_argument("--only", choices=FAULTS, help="one fault")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for fault in FAULTS:
        if args.only not in (None, fault):
            continue
        result = results[fault] = {"tried": 0, "survived": 0, "failures": []}
        for number in range(args.times):
            result["tried"] += 1
            try:
                with tempfile.TemporaryDirectory(prefix="recis-faults-") as folder:
                    lose(random.Random(f"{args.seed}.{fault}.{number}"), fault, folder)
                result["survived"] += 1
            except Exception as error:
                result["failures"].append(f"trial {number}: {type(error).__name__}: {error}")
                traceback.print_exc()
            print(f"{fault}: {result['survived']} of {result['tried']}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(results))
    else:
        print(f"{'one rank of three is':30} {'tried':>6} {'survived':>9}")
        for name, result in results.items():
            print(f"{name:30} {result['tried']:6} {result['survived']:9}")
    return int(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    assert rank_processes.RANKS >= RANKS
    sys.exit(main())
