"""Growth of one embedding table: training steps that insert only new ids, from an empty table on.

    python -m benchmarks.growth [--quick] [--rows 40000000] [--peer-rows 8000000] [--plot growth.html]

Each step looks up 65,536 new ids of width 16, runs backward from a fixed gradient, and updates with Adagrad. Steps are
timed by process CPU time, and each run is repeated: the figure of a step is its best time. Bytes are the growth of the
process's resident memory. The peers are a table of a Python dict and torch tensors that double (``dict``), and TFRA's
cuckoo table (``tfra``). From a million rows on, the cases are ``pause``, the longest step over the median one;
``speed``, the mean over all steps; ``bytes``, the most bytes a row; for ours, also ``map_pause``,
``map_bytes`` and ``map_peak``, the IDMap alone, and, on the CPU, the most memory that its process has taken at any
moment over the final size of the map. A ratio above 1 means that ours is better.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.embedding import FixedGradient
from benchmarks.peers.worker import ENVIRONMENTS, HERE, installed
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, IdMap

STEP = 65_536
DIM = 16
LR = 0.01
LARGE = 1_000_000
"""Rows from which on steps are compared."""
REPEATS = 3

Step = Callable[[Tensor], None]


def ours(rows: int, device: torch.device) -> tuple[Step, Callable[[], int] | None]:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=DIM)}, optimizer=optim.Adagrad, device=device)
    optimizer = optim.Adagrad(engine.parameters(), lr=LR)
    gradient = torch.full((STEP, DIM), 0.1, device=device)

    def step(ids: Tensor) -> None:
        outputs = engine({"id": ids})
        FixedGradient.apply([gradient], *outputs.values()).backward()
        optimizer.step()

    return step, None


def id_map(rows: int, device: torch.device) -> tuple[Step, Callable[[], int]]:
    table = IdMap(device)

    def step(ids: Tensor) -> None:
        table.reserve(ids.numel())
        table.find_or_insert([ids], [0])
        table.commit()

    return step, lambda: table.nbytes


def dictionary(rows: int, device: torch.device) -> tuple[Step, None]:
    """Return the steps of a dict from ids to rows of tensors that double."""
    row_of: dict[int, int] = {}
    weight, total = torch.zeros(2, STEP, DIM).unbind()
    gradient = torch.full((STEP, DIM), 0.1)

    def step(ids: Tensor) -> None:
        nonlocal weight, total
        found = torch.tensor([row_of.setdefault(i, len(row_of)) for i in ids.tolist()])
        while len(row_of) > len(weight):
            weight, total = (torch.cat([part, torch.zeros_like(part)]) for part in (weight, total))
        unique, inverse = torch.unique(found, return_inverse=True)
        g = torch.zeros(unique.numel(), DIM).index_add_(0, inverse, gradient)
        total[unique] += g * g
        weight[unique] -= LR * g / (total[unique].sqrt() + 1e-10)

    return step, None


CONTENDERS = {"ours": ours, "id_map": id_map, "dict": dictionary}


def run(name: str, rows: int, threads: int, device: torch.device) -> None:
    """Train until there are ``rows`` rows, and print the figures of each step as JSON; in a process of its own."""
    torch.set_num_threads(threads)
    step, size = CONTENDERS[name](rows, device)
    page, now = os.sysconf("SC_PAGE_SIZE"), time.process_time
    step(-torch.arange(1, STEP + 1, device=device))  # load the library and warm up
    before = resident() * page
    times, sizes = [], []
    for first in range(0, rows, STEP):
        ids = torch.arange(first, first + STEP, device=device) * 0x9E3779B97F4A7C1
        begin = now()
        step(ids)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(now() - begin)
        sizes.append(resident() * page - before if size is None else size())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"times": times, "bytes": sizes, "peak": peak}))


def resident() -> int:
    """Return the resident pages of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1])


class Growth(NamedTuple):
    """Figures of a contender's runs."""

    times: list[float]
    """The best CPU time of each step, in seconds."""
    sizes: list[float]
    """Bytes after each step."""
    peak: float | None
    """The most bytes at any moment; None for peers."""


def measure(name: str, rows: int, args: argparse.Namespace) -> Growth | None:
    """Run a contender; None if it is absent."""
    if name not in CONTENDERS and not (installed(name) and args.device == "cpu"):
        return None
    command = [sys.executable, "-m", "benchmarks.growth", "--run", name]
    if name not in CONTENDERS:
        command = [str(ENVIRONMENTS / name / "bin" / "python"), "-W", "ignore", str(HERE / f"{name}_growth.py")]
    command += ["--rows", str(rows), "--threads", str(args.threads), "--device", args.device]
    runs = []
    for _ in range(1 if args.quick else REPEATS):
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        runs.append(json.loads(answer.splitlines()[-1]))
    times = [min(times) for times in zip(*(run["times"] for run in runs), strict=True)]
    return Growth(times, runs[0]["bytes"], runs[0].get("peak"))


def figures(growth: Growth) -> dict[str, float]:
    """Return the figures of each case."""
    large = range(min(LARGE // STEP, len(growth.times) - 1), len(growth.times))
    late = [growth.times[k] for k in large]
    return {
        "pause": max(late) / statistics.median(late),
        "speed": STEP * len(growth.times) / sum(growth.times) / 1e6,
        "bytes": max(growth.sizes[k] / (STEP * (k + 1)) for k in large),
    }


UNITS = {"pause": "max/median", "speed": "M ids/s", "bytes": "B/row"}


def results(args: argparse.Namespace) -> tuple[list[harness.Result], dict[str, Growth]]:
    """Measure all contenders, each to its own number of rows; ours is compared at the peer's number."""
    found: list[harness.Result] = []
    curves = {}
    prefix = "" if args.device == "cpu" else f"{args.device}/"
    for peer in ("dict", "tfra"):
        harness.progress(f"ours and {peer}, {args.peer_rows:,} rows")
        theirs, own = measure(peer, args.peer_rows, args), measure("ours", args.peer_rows, args)
        assert own is not None
        mine, other = figures(own), figures(theirs) if theirs else {}
        if theirs:
            curves[peer] = theirs
        for case, unit in UNITS.items():
            value, better = other.get(case), mine[case]
            ratio = None if value is None else better / value if case == "speed" else value / better
            found.append(_result(f"{prefix}{args.peer_rows // 1_000_000}M/{case}", unit, better, value, peer, ratio))
    harness.progress(f"ours, {args.rows:,} rows")
    own, alone = measure("ours", args.rows, args), measure("id_map", args.rows, args)
    assert own is not None
    assert alone is not None
    curves["ours"] = own
    size = f"{prefix}{args.rows // 1_000_000}M"
    for case, value in figures(own).items():
        found.append(_result(f"{size}/{case}", UNITS[case], value))
    found.append(_result(f"{size}/map_pause", UNITS["pause"], figures(alone)["pause"]))
    found.append(_result(f"{size}/map_bytes", UNITS["bytes"], figures(alone)["bytes"]))
    if args.device == "cpu" and alone.peak:
        found.append(_result(f"{size}/map_peak", "max/final", alone.peak / alone.sizes[-1]))
    return found, curves


def _result(
    case: str,
    unit: str,
    mine: float,
    other: float | None = None,
    peer: str = "none",
    ratio: float | None = None,
) -> harness.Result:
    rounded = [None if value is None else round(value, 2) for value in (mine, other, ratio)]
    return harness.Result("growth", case, "growth", unit, rounded[0], rounded[1], peer, rounded[2])


def plot(curves: dict[str, Growth]) -> str:
    """Return a page with step time and bytes a row against rows."""
    from recis_hybrid.app import svg

    def points(values: list[float], scale: Callable[[int], float]) -> list[tuple[float, float | None]]:
        return [(STEP * (k + 1) / 1e6, value * scale(k)) for k, value in enumerate(values)]

    times = {name: points(curve.times, lambda _: 1e3) for name, curve in curves.items()}
    sizes = {
        name: points(curve.sizes, lambda k: 1 / (STEP * (k + 1)))[LARGE // STEP :] for name, curve in curves.items()
    }
    charts = [
        f"<h2>{title}</h2>{svg.lines(series, x_label='M rows', from_zero=True)}"
        for title, series in (("CPU time of a step, ms", times), ("Bytes a row", sizes))
    ]
    colors = "".join(f".c{k}{{stroke:{color};background:{color}}}" for k, color in enumerate(("#06c", "#c60", "#390")))
    style = (
        "body{font:15px sans-serif;max-width:560px} svg text{font-size:12px} .grid{stroke:#ddd} polyline{fill:none}"
        ".legend span{margin-right:14px} .legend i{display:inline-block;width:10px;height:10px;margin-right:5px}"
    )
    return f"<!doctype html><title>Growth</title><style>{style}{colors}</style>{''.join(charts)}"


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--rows", type=int, help="rows of ours; 40 million, with --quick 4 million")
    parser.add_argument("--peer-rows", type=int, help="rows of the peers; 8 million, with --quick 2 million")
    parser.add_argument("--plot", type=Path, help="HTML file for charts")
    parser.add_argument("--run", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows = args.rows or (4_000_000 if args.quick else 40_000_000)
    args.peer_rows = args.peer_rows or (2_000_000 if args.quick else 8_000_000)
    if args.run:
        run(args.run, args.rows, args.threads, torch.device(args.device))
        return
    found, curves = results(args)
    for result in found:
        if args.cases in result.case:
            result.print()
    harness.progress(harness.table(found))
    if args.plot:
        args.plot.write_text(plot(curves))


if __name__ == "__main__":
    main()
