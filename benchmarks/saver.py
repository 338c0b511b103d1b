"""Checkpoints beside what a disk and the safetensors library do with the same bytes.

    python -m benchmarks.saver [--quick] [--threads 2] [--cases save]

A table of 5 million rows (200,000 with --quick) of width 64 with Adam's moments. ``save``: written, checksummed and
forced to the disk, beside ``safetensors.torch.save_file`` of the same columns and an fsync. ``async_stall``: how long a
save in the background keeps its caller, beside the whole save (the ratio says how many times longer that is).
``delta``: what 1 % of the rows touched takes, beside the whole save. ``load``: read, verified and put into tables,
beside reading the same bytes into fresh memory.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import harness
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.saver import Saver

DIM = 64


def filled(rows: int) -> EmbeddingEngine:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=DIM)}, optimizer_state=optim.Adam.row_state())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for begin in range(0, rows, 100_000):
            size = min(100_000, rows - begin)
            engine({"id": torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator)})
    return engine


def read_all(files: list[Path]) -> None:
    for file in files:
        file.read_bytes()


def plain_save(columns: dict[str, torch.Tensor], path: Path) -> None:
    save_file(columns, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def cases(rows: int, folder: Path, rounds: int, wanted: str) -> list[harness.Result]:
    engine, steps, device = filled(rows), count(1), torch.device("cpu")
    saver, background = Saver(folder / "sync", keep=1), Saver(folder / "async", keep=1, async_save=True)
    results = []

    def save() -> None:
        saver.save(next(steps), engine=engine)

    def stall() -> float:
        begin = time.perf_counter()
        background.save(next(steps), engine=engine)
        seconds = time.perf_counter() - begin
        background.wait()
        return seconds

    save()
    files = sorted(saver_files(folder / "sync"))
    size = sum(file.stat().st_size for file in files)
    parts = [load_file(file) for file in files]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if not name.startswith("bucket")}
    del parts

    def load() -> None:
        saver.load(engine=engine)

    def result(case: str, unit: str, peer: str, mine: Callable[[], float | None], theirs: Callable[[], None]) -> None:
        if wanted not in case:
            return
        harness.progress(f"{case}, {rows:,} rows, {size / 1e9:.2f} GB")
        rate = {name: r / 1e6 for name, r in harness.rates({"ours": mine, peer: theirs}, size, rounds, device).items()}
        results.append(
            harness.Result(
                "saver", case, "bytes a second", unit, round(rate["ours"], 1), round(rate[peer], 1), peer,
                round(rate["ours"] / rate[peer], 2),
            )
        )  # fmt: skip
        results[-1].print()

    result("save", "MB/s", "safetensors + fsync", save, lambda: plain_save(columns, folder / "plain.safetensors"))
    result("async_stall", "MB/s", "the whole save", stall, save)
    changing, generator = Saver(folder / "delta", keep=1), torch.Generator().manual_seed(1)
    optimizer, ids = optim.Adam(engine.parameters()), engine.tables[0].ids(0)

    def delta() -> float:
        touched = ids[torch.randint(ids.numel(), (ids.numel() // 100,), generator=generator)]
        engine({"id": touched})["id"].sum().backward()
        optimizer.step()
        begin = time.perf_counter()
        changing.save(next(steps), delta=True, engine=engine)
        return time.perf_counter() - begin

    if wanted in "delta":
        delta()  # the first is whole
    result("delta", "MB/s", "the whole save", delta, save)
    # A load replaces rows, so it comes last; the files are in the page cache for both.
    save()
    result("load", "MB/s", "read()", load, lambda: read_all(sorted(saver_files(folder / "sync"))))
    return results


def saver_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


def main() -> None:
    args = harness.parser(__doc__ or "").parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = cases(200_000 if args.quick else 5_000_000, Path(folder), 3 if args.quick else 5, args.cases)
    harness.progress(harness.table(results))


if __name__ == "__main__":
    main()
