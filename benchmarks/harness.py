"""Helpers of all benchmarks: interleaved timing, and one JSON line per case."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Result:
    """One line of output. ``ratio`` > 1 means that ours is better; None means that there is no figure for the peer."""

    bench: str
    case: str
    metric: str
    unit: str
    ours: float | None
    peer: float | None
    peer_name: str
    ratio: float | None

    def print(self) -> None:
        """Print the line as JSON."""
        print(json.dumps(asdict(self)), flush=True)


def rates(
    steps: dict[str, Callable[[], float | None]],
    items: int,
    rounds: int,
    device: torch.device,
    burst: int = 1,
    clock: str = "wall",
) -> dict[str, float]:
    """Run the steps alternately, A B A B …, so that drift of the machine's speed affects all equally.

    Args:
        steps: Functions by name, each running one step. A step that runs in another process returns its seconds.
        items: Number of items that a step processes.
        rounds: Number of timed rounds, after three warm-up rounds.
        device: Device to synchronize at the end of each step.
        burst: Number of timed steps per round, so that the median step has warm caches.
        clock: A name in ``CLOCKS``.

    Returns:
        Items per second at the median time, by name.
    """
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, step in steps.items():
            for _ in range(burst):
                begin = now()
                seconds = step()
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                if number >= 3:
                    times[name].append(now() - begin if seconds is None else seconds)
    return {name: items / statistics.median(seconds) for name, seconds in times.items()}


def parser(description: str, devices: Sequence[str] = ("cpu", "cuda")) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; the first of the devices is the default."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--quick", action="store_true", help="fewer cases and rounds: under a minute on two cores")
    result.add_argument("--device", default=devices[0], choices=devices, help="device of the tables")
    result.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    result.add_argument("--cases", default="", help="only cases whose name contains this")
    return result


def table(results: Iterable[Result]) -> str:
    """Return the results as a text table."""
    lines = [f"{'case':28} {'ours':>8}  {'peer':>8}  {'ratio':>6}  unit      peer's name"]
    for r in results:
        peer, ratio = ("absent", "") if r.peer is None or r.ratio is None else (f"{r.peer:.2f}", f"{r.ratio:.2f}")
        ours = "absent" if r.ours is None else f"{r.ours:.2f}"
        lines.append(f"{r.case:28} {ours:>8}  {peer:>8}  {ratio:>6}  {r.unit:9} {r.peer_name}")
    return "\n".join(lines)


def progress(text: str) -> None:
    """Print a line of progress to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)
