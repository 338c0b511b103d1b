"""Pauses of training by bulk evictions and compactions: at once, and spread over steps.

    python -m benchmarks.eviction [--quick] [--rows 20000000] [--rows-per-call 50000]

A table of width 16 with Adagrad, half of whose rows have not been seen lately, evicts that half and is then compacted.
Training steps look up 65,536 ids that stay, and each is followed by a call of the eviction or compaction in progress.
All times are process CPU time. ``longest`` is the longest such step against the longest pause without spreading,
``total`` the time of all calls against that pause; ``step`` is the longest step against the median of steps alone. The
peer is ours at once; a ratio above 1 means that spreading is better.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks import harness
from benchmarks.embedding import FixedGradient
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Unused

STEP = 65_536
DIM = 16
ALONE = 30
"""Steps without eviction."""
KINDS = ("evict", "compact")


class Training:
    """A table, half of whose rows the rule selects, and training steps on the other half."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self.engine = EmbeddingEngine({"id": EmbeddingConfig(dim=DIM)}, optimizer=optim.Adagrad, device=device)
        self._optimizer = optim.Adagrad(self.engine.parameters(), lr=0.01)
        self._gradient = torch.full((STEP, DIM), 0.1, device=device)
        self._steps = 0
        for every in (1, 2):
            for first in range(0, rows // every, STEP):
                self.engine({"id": self._ids(first, every)})
            self.step()
            self.step()

    def rule(self) -> Unused:
        """Return the rule that selects the half that has not been seen since the first step."""
        return Unused(steps=self.engine.tables[0].step - 1)

    def step(self) -> None:
        """Train on ids of the half that stays, every other one."""
        outputs = self.engine({"id": self._ids(self._steps * STEP % (self._rows // 2 - STEP), 2)})
        self._steps += 1
        FixedGradient.apply([self._gradient], *outputs.values()).backward()
        self._optimizer.step()

    def _ids(self, first: int, every: int) -> torch.Tensor:
        return torch.arange(first, first + STEP, device=self._device) * every * 0x9E3779B97F4A7C1


def timed(device: torch.device, function: object, *args: object) -> tuple[float, object]:
    """Return the CPU time of a call in seconds, and its result."""
    begin = time.process_time()
    result = function(*args)  # type: ignore[operator]
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.process_time() - begin, result


def run(rows: int, rows_per_call: int, threads: int, device: torch.device) -> None:
    """Measure, and print the times as JSON, in a process of its own; with 0 rows per call, at once."""
    torch.set_num_threads(threads)
    training = Training(rows, device)
    engine = training.engine
    before = len(engine.tables[0])
    alone = [timed(device, training.step)[0] for _ in range(ALONE)]
    found: dict[str, object] = {"step": statistics.median(alone)}
    for kind in KINDS:
        if rows_per_call == 0:
            seconds, _ = (
                timed(device, engine.evict, training.rule()) if kind == "evict" else timed(device, engine.compact)
            )
            found[kind] = {"longest": seconds, "total": seconds}
            continue
        calls: Iterator[int] = (
            engine.evict(training.rule(), rows_per_call=rows_per_call)
            if kind == "evict"
            else engine.compact(rows_per_call=rows_per_call)
        )
        steps, total, moved = [], 0.0, 0
        while moved is not None:
            step, _ = timed(device, training.step)
            pause, moved = timed(device, next, calls, None)  # type: ignore[assignment]
            steps.append(step + pause)
            total += pause
        found[kind] = {"longest": max(steps), "total": total}
    harness.progress(f"{before - len(engine.tables[0]):,} of {before:,} rows evicted")
    print(json.dumps(found))


def measure(args: argparse.Namespace, rows_per_call: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.eviction", "--run", "--rows", str(args.rows), "--device", args.device]
    command += ["--threads", str(args.threads), "--rows-per-call", str(rows_per_call)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: dict[str, dict[str, float]] = json.loads(answer.splitlines()[-1])
    return found


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--rows", type=int, help="rows before the eviction; 20 million, with --quick 1 million")
    parser.add_argument("--rows-per-call", type=int, default=50_000)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows = args.rows or (1_000_000 if args.quick else 20_000_000)
    if args.run:
        run(args.rows, args.rows_per_call, args.threads, torch.device(args.device))
        return
    harness.progress(f"{args.rows:,} rows, at once")
    once = measure(args, 0)
    harness.progress(f"{args.rows:,} rows, {args.rows_per_call:,} per call")
    spread = measure(args, args.rows_per_call)
    prefix = "" if args.device == "cpu" else f"{args.device}/"
    results = []
    for kind in KINDS:
        alone = float(spread["step"])  # type: ignore[arg-type]
        pairs = {
            "longest": (spread[kind]["longest"], once[kind]["longest"], "at once"),
            "total": (spread[kind]["total"], once[kind]["total"], "at once"),
            "step": (spread[kind]["longest"], alone, "median step alone"),
        }
        for metric, (ours, peer, name) in pairs.items():
            case = f"{prefix}{args.rows // 1_000_000}M/{kind}/{metric}"
            ms = [round(1e3 * value, 1) for value in (ours, peer)]
            results.append(harness.Result("eviction", case, "cpu_time", "ms", *ms, name, round(peer / ours, 2)))
    for result in results:
        if args.cases in result.case:
            result.print()
    harness.progress(harness.table(results))


if __name__ == "__main__":
    main()
