"""What benchmarks share: interleaved timing, and one JSON line a case."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


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
        """Writes the line."""
        print(json.dumps(asdict(self)), flush=True)


def rates(steps: dict[str, Callable[[], None]], items: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Runs the steps in turn, A B A B …, so that a machine whose speed drifts treats all alike.

    Args:
        steps: By name, one step. Each runs three times before it counts.
        items: Items that a step handles.
        rounds: Counted runs of each.
        device: Waited for at the end of each step.

    Returns:
        By name, items a second at the median time.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 3):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 3:
                times[name].append(time.perf_counter() - begin)
    return {name: items / statistics.median(seconds) for name, seconds in times.items()}


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that every benchmark takes."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--quick", action="store_true", help="fewer cases and rounds: under a minute on two cores")
    result.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the tables live")
    result.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    result.add_argument("--cases", default="", help="only cases whose name contains this")
    return result


def progress(text: str) -> None:
    """Says on stderr what is running; stdout is for results."""
    print(text, file=sys.stderr, flush=True)
