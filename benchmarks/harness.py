"""What benchmarks share: interleaved timing, and one JSON line a case."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Result:
    """One line of output; ``ratio`` > 1 means that ours is better, None that the peer is absent."""

    bench: str
    case: str
    metric: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None

    def print(self) -> None:
        """Write the line."""
        print(json.dumps(asdict(self)), flush=True)


def rates(
    steps: dict[str, Callable[[], float | None]],
    items: int,
    rounds: int,
    device: torch.device,
    burst: int = 1,
    clock: str = "wall",
) -> dict[str, float]:
    """Run the steps in turn, A B A B …, so that a machine whose speed drifts treats all alike.

    Args:
        steps: By name, one step. A step that runs in another process returns its own seconds.
        items: Items that a step handles.
        rounds: Counted turns of each; three more come before them.
        device: Waited for at the end of each step.
        burst: Runs of a step in one turn, each timed, so that the median is of steps whose caches are warm.
        clock: Of ``CLOCKS``.

    Returns:
        By name, items a second at the median time.
    """
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, step in steps.items():
            for _ in range(burst):
                begin = now()
                seconds = step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number >= 3:
                    times[name].append(now() - begin if seconds is None else seconds)
    return {name: items / statistics.median(seconds) for name, seconds in times.items()}


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark takes."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--quick", action="store_true", help="fewer cases and rounds: under a minute on two cores")
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the tables live")
    result.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    result.add_argument("--cases", default="", help="only cases whose name contains this")
    return result


def table(results: Iterable[Result]) -> str:
    """Return the results as a table for people."""
    lines = [f"{'case':28} {'ours':>8}  {'peer':>8}  {'ratio':>6}  unit      peer's name"]
    for r in results:
        peer, ratio = ("absent", "") if r.peer is None or r.ratio is None else (f"{r.peer:.2f}", f"{r.ratio:.2f}")
        lines.append(f"{r.case:28} {r.ours:8.2f}  {peer:>8}  {ratio:>6}  {r.unit:9} {r.peer_name}")
    return "\n".join(lines)


def progress(text: str) -> None:
    """Says on stderr what is running; stdout is for results."""
    print(text, file=sys.stderr, flush=True)
