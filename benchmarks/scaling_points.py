"""Measure the constants of the cost model in ``benchmarks/scaling.py``, and steps to validate it.

    python -m benchmarks.scaling_points [--quick] > benchmarks/scaling_points.json

Constants, measured with one single-threaded process, or two connected by Gloo: FLOPs per second of the tower, bytes per
second of the rest of a step (as counted by the model), bandwidth and latency of an all-to-all, and the seconds of a
step with almost no ids. Points: steps of 1, 2 and 4 ranks with tables, tower and the all-reduce of its gradients.
Seconds are medians of a rank's CPU time, which other work on the machine does not affect. The minimum wall time is also
written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks import scaling, workload
from benchmarks.embedding import LR, FixedGradient
from benchmarks.harness import progress
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine

DIM, HIDDEN, BYTES = 64, 32, 8 << 20
RANKS = (1, 2, 4)


def seconds_of(step: Callable[[], object], times: int) -> tuple[float, float]:
    """Return the minimum wall time of a step, and its median CPU time on this rank."""
    wall, cpu = [], []
    for number in range(times + 2):
        if dist.get_world_size() > 1:
            dist.barrier()
        begin, busy = time.perf_counter(), time.process_time()
        step()
        if number >= 2:
            cpu.append(time.process_time() - busy)
            wall.append(time.perf_counter() - begin)
    return min(wall), statistics.median(cpu)


def measure(rank: int, ranks: int, folder: str, size: str, times: int) -> None:
    """Measure all steps on one rank; the first rank writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    work = workload.make(size, DIM, torch.device("cpu"))
    names = [workload.name(feature) for feature in range(workload.FEATURES)]
    engine = EmbeddingEngine({name: EmbeddingConfig(dim=DIM) for name in names}, optimizer=optim.RowwiseAdagrad)
    sparse = optim.RowwiseAdagrad(engine.parameters(), lr=LR)
    with torch.no_grad():
        for part in range(0, workload.IDS, 10_000):
            engine({name: work.ids[f][part : part + 10_000] for f, name in enumerate(names)})
    tower = nn.Sequential(nn.Linear(workload.FEATURES * DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    parameters = list(tower.parameters())
    samples = workload.SIZES[size]
    vectors = [torch.randn(samples, DIM, requires_grad=True) for _ in names]
    numbers = iter(range(1 << 30))

    def tables() -> None:
        batch = work.batch(next(numbers) * ranks + rank)
        FixedGradient.apply(work.gradients, *engine(batch).values()).backward()
        sparse.step()

    def tiny() -> None:
        torch.cat(list(engine({name: work.ids[f][:1] for f, name in enumerate(names)}).values())).sum().backward()
        sparse.step()

    def dense() -> None:
        tower.zero_grad()
        for vector in vectors:
            vector.grad = None
        tower(torch.cat(vectors, 1)).mean().backward()

    def whole() -> None:
        tower.zero_grad()
        values = engine(work.batch(next(numbers) * ranks + rank)).values()
        tower(torch.cat(list(values), 1)).mean().backward()
        if ranks > 1:
            gradients = torch.cat([p.grad.view(-1) for p in parameters if p.grad is not None])
            dist.all_reduce(gradients)
        sparse.step()

    def exchange(count: int) -> Callable[[], None]:
        sent, received = torch.zeros(count), torch.empty(count)
        return lambda: dist.all_to_all_single(received, sent)  # type: ignore[return-value]

    distinct = [work.ids[f][work.rows[number][f]].unique().numel() for number in range(8) for f in range(len(names))]
    result = {
        "ranks": ranks,
        "samples": samples,
        "features": len(names),
        "dim": DIM,
        "distinct": sum(distinct) / (8 * len(names) * samples),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "flops": 2 * sum(parameter.numel() for parameter in parameters),
    }
    steps: dict[str, tuple[Callable[[], object], int]] = {
        "step": (whole, times),
        "tables": (tables, times),
        "tower": (dense, times),
        "tiny": (tiny, 100),
    }
    if ranks > 1:
        steps |= {"small": (exchange(ranks * 16), 100), "large": (exchange(BYTES // 4), times)}
    for name, (step, count) in steps.items():
        wall, cpu = seconds_of(step, count)
        total = torch.tensor(cpu)
        dist.all_reduce(total)
        result |= {f"{name}_wall_s": wall, f"{name}_s": float(total) / ranks}
    dist.barrier()
    if rank == 0:
        Path(folder, "point.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def constants_of(one: dict[str, Any], two: dict[str, Any]) -> dict[str, float]:
    """Derive the constants from the points of one rank and of two."""
    work = scaling.measured_work(one)
    unit = scaling.Machine(
        ranks_per_host=1,
        memory=1.0,
        flops=1.0,
        in_host=1.0,
        between=1.0,
        collective_s=0,
        peer_s=0,
        launch_s=0,
        ingest=1.0,
    )
    alone = scaling.step(work, unit, 1)
    small = two["small_s"]
    return {
        "cores": len(os.sched_getaffinity(0)),
        # From a whole step, because tables miss the caches more often with a tower than without.
        "memory": alone.memory / (one["step_s"] - one["tower_s"] - one["tiny_s"]),
        "flops": alone.tower / one["tower_s"],
        "in_host": BYTES / 2 / (two["large_s"] - small),
        "collective_s": small,
        "call_s": one["tiny_s"],
        "shared_call_s": two["tiny_s"] - 3 * small,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, only of 4,082 ids")
    args = parser.parse_args()
    points = []
    for size in ["4k"] if args.quick else ["65k", "4k"]:
        for ranks in RANKS:
            progress(f"scaling_points: {size}, {ranks} ranks")
            with tempfile.TemporaryDirectory(prefix="recis-bench-") as folder:
                mp.spawn(measure, (ranks, folder, size, 10 if args.quick else 60), nprocs=ranks)  # type: ignore[no-untyped-call]
                points.append(json.loads(Path(folder, "point.json").read_text()))
    constants = constants_of(points[0], points[1])
    machine = f"{platform.machine()}, {constants['cores']:g} cores, {datetime.date.today()}"
    print(json.dumps({"machine": machine, "constants": constants, "points": points}, indent=1))


if __name__ == "__main__":
    main()
