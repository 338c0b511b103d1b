"""Training steps of a table on disk, beside the same table in memory.

A step looks up and updates 65,536 ids, Zipf 1.05 over the rows, in records of 256 bytes (dim 20 with Adam). The cache
holds an eighth of the records. While a step runs, the records of the next batch are read (``prefetch``). Both tables
train on the same batches, in alternating bursts, with the same outputs. Then both are saved, on the same disk. Prints
one JSON line a figure: rates, hit rate, misses a step, the disk's rate of random reads, measured in the same run, and
the memory that saving takes.

    python -m benchmarks.disk --path /local_ssd [--rows 20000000] [--quick]

``--reads-per-second`` simulates a disk, by holding the reads from a file system in memory to a rate. (Their copies take
about as much of the CPU as requests to a disk.)

    python -m benchmarks.disk --path /dev/shm --reads-per-second 450000
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Result, parser
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Placement
from recis_hybrid.embedding.table.disk_blocks import DiskBlocks
from recis_hybrid.ops.disk import BYTES_OF_A_FRAME
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver

DIM, RECORD = 20, 256
IDS = 65_536
EXPONENT = 1.05
CHUNK = 1 << 16
RATE = "PACED_READS_PER_SECOND"


class Side:
    """One of the two tables, with its optimizer."""

    def __init__(self, placement: Placement | None, rows: int) -> None:
        config = EmbeddingConfig(dim=DIM, placement=placement)
        self.engine = EmbeddingEngine({"id": config}, optimizer=optim.Adam)
        self.optimizer = self.engine.make_optimizer(lr=0.01)
        self.table = self.engine.tables[0]
        assert self.table.layout.record_bytes == RECORD
        # Popular ids first, so that the cache starts with most of them.
        for first in range(0, rows, CHUNK):
            self.table.insert(0, torch.arange(first, min(first + CHUNK, rows)))

    def step(self, batch: Batch, following: Batch | None, gradient: Tensor) -> Tensor:
        if following is not None:
            self.engine.prefetch(following)
        values, lookup = self.engine.lookup(batch)
        self.engine.apply_gradients(lookup, {"id": gradient}, self.optimizer)
        return values["id"]


def batches_of(rows: int, count: int) -> list[Batch]:
    """Return batches of ids, of which id 0 is the most popular."""
    random = np.random.default_rng(0)
    shares = (1 / np.arange(1, rows + 1) ** EXPONENT).cumsum()
    drawn = np.searchsorted(shares, random.random((count, IDS)) * shares[-1]).clip(max=rows - 1)
    return [{"id": ids} for ids in torch.from_numpy(drawn)]


def reads_per_second(blocks: DiskBlocks, rows: int) -> float:
    """Return the rate of random reads of the disk, by the same path as a lookup's."""
    random = np.random.default_rng(1)
    times = []
    for _ in range(5):
        some = torch.from_numpy(random.integers(0, rows, 40_000))
        on_disk = some[blocks.locations[some] & 1 == 1].unique()
        begin = time.perf_counter()
        for _ in blocks._pieces(on_disk):
            pass
        times.append((time.perf_counter() - begin) / on_disk.numel())
    return 1 / statistics.median(times)


def saved(side: Side, path: Path) -> tuple[float, int]:
    """Save a table to a folder that is removed again; return the seconds and the bytes of memory that it took."""
    with tempfile.TemporaryDirectory(dir=path) as folder:
        os.sync()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, begin = _memory("VmRSS"), time.perf_counter()
        Saver(folder).save(1, {"engine": side.engine})
        return time.perf_counter() - begin, _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def run_paced(reads_per_second: int) -> int:
    """Run this program again with its reads held to a rate, and return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "paced_reads.so")
        source = Path(__file__).with_name("paced_reads.cpp")
        subprocess.run(["g++", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        rate = {RATE: str(reads_per_second), "LD_PRELOAD": str(library)}
        command = [sys.executable, "-m", "benchmarks.disk", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, **rate}, check=False).returncode


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "", ["cpu"])
    options.add_argument("--path", type=Path, default=tempfile.gettempdir(), help="folder on a local SSD")
    options.add_argument("--rows", type=int, default=20_000_000)
    options.add_argument("--bursts", type=int, default=8)
    options.add_argument("--reads-per-second", type=int, help="hold a file system in memory to this rate (Linux)")
    args = options.parse_args()
    if args.reads_per_second and RATE not in os.environ:
        sys.exit(run_paced(args.reads_per_second))
    torch.set_num_threads(args.threads)
    rows = 1_000_000 if args.quick else args.rows
    bursts, length = (4, 6) if args.quick else (args.bursts, 12)
    disk = Placement(blocks="disk", path=args.path, cache_bytes=rows // 8 * (RECORD + BYTES_OF_A_FRAME))
    warm = 2 * length
    sides = {"disk": Side(disk, rows), "memory": Side(None, rows)}
    batches = batches_of(rows, warm + bursts * length)
    gradient = torch.linspace(-1, 1, IDS * DIM).view(IDS, DIM)
    blocks: Any = sides["disk"].table.store.blocks
    times: dict[str, list[float]] = {name: [] for name in sides}
    before = blocks.figures()
    for start in range(0, len(batches), length):
        outputs = {}
        if start == warm:
            before = blocks.figures()
        for name, side in sides.items():
            for at in range(start, start + length):
                # The first step of a burst has read nothing ahead, and is not counted.
                following = batches[at + 1] if at + 1 < start + length else None
                begin = time.perf_counter()
                outputs[name] = side.step(batches[at], following, gradient)
                if start >= warm and at > start:
                    times[name].append(time.perf_counter() - begin)
        assert torch.equal(outputs["disk"], outputs["memory"])
    after, steps = blocks.figures(), bursts * length
    seconds = {name: statistics.median(each) for name, each in times.items()}
    hits, misses = after.hits - before.hits, after.misses - before.misses
    rate = reads_per_second(blocks, rows)
    bound = max(seconds["memory"], misses / steps / rate)
    disk_name = f"simulated disk of {args.reads_per_second:,} reads/s" if args.reads_per_second else str(args.path)
    case = f"{rows:,} rows, cache of 1/8, {disk_name}"

    def show(metric: str, unit: str, ours: float, peer: float | None, peer_name: str) -> None:
        Result("disk", case, metric, unit, ours, peer, peer_name, None if peer is None else ours / peer).print()

    show("training", "ids/s", IDS / seconds["disk"], IDS / seconds["memory"], "in memory")
    show("training against the bound", "ids/s", IDS / seconds["disk"], IDS / bound, "max(in memory, misses / reads)")
    means = {name: IDS / statistics.mean(each) for name, each in times.items()}
    show("mean training", "ids/s", means["disk"], means["memory"], "in memory")
    show("hit rate", "share of distinct rows", hits / (hits + misses), None, "")
    show("misses", "rows/step", misses / steps, None, "")
    show("misses read ahead", "share", (after.prefetched - before.prefetched) / max(misses, 1), None, "")
    show("random reads", "reads/s", rate, None, "")
    memory = {name: side.engine.memory()["total"] for name, side in sides.items()}
    show("memory", "bytes", memory["disk"], memory["memory"], "in memory")
    show("disk", "bytes", after.log_bytes, None, "")
    saves = {name: saved(side, args.path) for name, side in sides.items()}
    show("saving", "rows/s", rows / saves["disk"][0], rows / saves["memory"][0], "in memory")
    show("memory of saving", "bytes", saves["disk"][1], saves["memory"][1], "in memory")
    show("io_uring, direct", "", 10 * after.io_uring + after.direct, None, "")


if __name__ == "__main__":
    main()
