"""Checkpoints, compared with the safetensors library and plain reads of the same bytes.

    python -m benchmarks.saver [--quick] [--rows 5000000] [--threads 2] [--folder /data] [--cases save]

The table has 5 million rows (200,000 with --quick) of width 64 with Adam's moments.

- ``save``: write, checksum and sync to disk; peer: ``safetensors.torch.save_file`` of the same columns with fsync.
- ``async_stall``: the time until a background save returns to its caller; peer: a full save.
- ``delta``: a save after training 1 % of the rows; peer: a full save.
- ``load``: three ranks (threads of this process, connected by Gloo) read and verify the files of two ranks and insert
  the rows into tables; peer: three threads that ``read()`` the same bytes into fresh memory.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from benchmarks import harness
from recis_hybrid import optim
from recis_hybrid.checkpointing import rank_of_bucket
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.ops.id_map import bucket_of
from recis_hybrid.saver import Saver

DIM = 64
WRITERS, READERS = 2, 3


def empty() -> EmbeddingEngine:
    return EmbeddingEngine({"id": EmbeddingConfig(dim=DIM)}, optimizer=optim.Adam)


def filled(rows: int, rank: int = 0, world_size: int = 1) -> EmbeddingEngine:
    engine = empty()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for begin in range(0, rows, 100_000):
            size = min(100_000, rows - begin)
            ids = torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator)
            engine({"id": ids[rank_of_bucket(bucket_of(ids), world_size) == rank]})
    return engine


def together(size: int, work: Callable[[int, dist.ProcessGroup], object]) -> None:
    """Call ``work(rank, group)`` in one thread per rank."""
    store, failures = dist.HashStore(), []

    def run(rank: int) -> None:
        try:
            work(rank, dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(minutes=5)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def plain_save(columns: dict[str, torch.Tensor], path: Path) -> None:
    save_file(columns, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def saver_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


class Cases:
    def __init__(self, rows: int, folder: Path, rounds: int, wanted: str) -> None:
        self.rows, self.folder, self.rounds, self.wanted = rows, folder, rounds, wanted
        self.results: list[harness.Result] = []

    def measure(
        self, case: str, size: int, peer: str, mine: Callable[[], float | None], theirs: Callable[[], float | None]
    ) -> None:
        harness.progress(f"{case}, {self.rows:,} rows, {size / 1e9:.2f} GB")
        found = harness.rates({"ours": mine, peer: theirs}, size, self.rounds, torch.device("cpu"))
        ours, other = found["ours"] / 1e6, found[peer] / 1e6
        self.results.append(
            harness.Result(
                "saver", case, "throughput", "MB/s", round(ours, 1), round(other, 1), peer, round(ours / other, 2)
            )
        )
        self.results[-1].print()

    def saves(self) -> None:
        if not any(self.wanted in case for case in ("save", "async_stall", "delta")):
            return
        engine, steps = filled(self.rows), count(1)
        saver = Saver(self.folder / "sync", keep=1)
        background = Saver(self.folder / "async", keep=1, async_save=True)

        def save() -> None:
            saver.save(next(steps), {"engine": engine})

        def stall() -> float:
            begin = time.perf_counter()
            background.save(next(steps), {"engine": engine})
            seconds = time.perf_counter() - begin
            background.wait()
            return seconds

        save()
        files = saver_files(self.folder / "sync")
        size = sum(file.stat().st_size for file in files)
        if self.wanted in "save":
            parts = [load_file(file) for file in files]
            columns = {n: torch.cat([part[n] for part in parts]) for n in parts[0] if not n.startswith("bucket")}
            del parts
            path = self.folder / "plain.safetensors"
            self.measure("save", size, "safetensors + fsync", save, lambda: plain_save(columns, path))
            path.unlink()
            del columns
        if self.wanted in "async_stall":
            self.measure("async_stall", size, "full save", stall, save)
        if self.wanted in "delta":
            del background
            changing, generator = Saver(self.folder / "delta", keep=1), torch.Generator().manual_seed(1)
            optimizer, ids = optim.Adam(engine.parameters()), engine.tables[0].ids(0)

            def delta() -> float:
                touched = ids[torch.randint(ids.numel(), (ids.numel() // 100,), generator=generator)]
                engine({"id": touched})["id"].sum().backward()
                optimizer.step()
                saver.wait()  # waits until the previous full checkpoint is deleted
                begin = time.perf_counter()
                changing.save(next(steps), {"engine": engine}, delta=True)
                return time.perf_counter() - begin

            delta()  # the first is a full checkpoint
            self.measure("delta", size, "full save", delta, save)

    def load(self) -> None:
        if self.wanted not in "load":
            return
        folder = self.folder / "ranks"
        together(
            WRITERS,
            lambda rank, group: Saver(folder, group=group).save(1, {"engine": filled(self.rows, rank, WRITERS)}),
        )
        files = saver_files(folder)
        size = sum(file.stat().st_size for file in files)

        def load() -> float:
            seconds = []

            def one(rank: int, group: dist.ProcessGroup) -> None:
                saver, engine = Saver(folder, group=group), empty()
                begin = time.perf_counter()
                saver.load({"engine": engine})
                seconds.append(time.perf_counter() - begin)

            together(READERS, one)
            return max(seconds)

        def read() -> float:
            seconds = []

            def one(rank: int) -> None:
                begin = time.perf_counter()
                kept = [file.read_bytes() for file in files[rank::READERS]]
                seconds.append(time.perf_counter() - begin)
                del kept

            threads = [threading.Thread(target=one, args=(rank,)) for rank in range(READERS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return max(seconds)

        self.measure("load", size, "read()", load, read)


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--rows", type=int, help="rows of the table (5,000,000; 200,000 with --quick)")
    parser.add_argument("--folder", help="folder to write to (the system's temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = args.rows or (200_000 if args.quick else 5_000_000)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cases = Cases(rows, Path(folder), 3 if args.quick else 5, args.cases)
        cases.saves()
        cases.load()
    harness.progress(harness.table(cases.results))


if __name__ == "__main__":
    main()
