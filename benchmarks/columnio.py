"""ColumnDataset, compared with a bare pyarrow scan, a DataLoader over pandas frames, and pandas' hashing.

    python -m benchmarks.columnio [--quick] [--threads 2] [--cases scan]

- ``scan``: Parquet files of 26 int64 columns, 13 float32 columns and a label to tensors; peer: pyarrow's own scan to
  RecordBatches, the upper limit.
- ``dataloader``: the same; peer: ``torch.utils.data.DataLoader`` with 2 workers, which read files with pandas and slice
  batches from the frames.
- ``ragged_strings``: lists of ids, lists of strings (20 per row on average) and two string columns, all hashed while
  reading; peer: a pyarrow scan and pandas' hash of the values.
- ``memory``: the peak of Arrow's memory under a slow consumer, in batches, minus the peak of the same number of pyarrow
  decoders alone (encoded columns, pages and dictionaries of a row group); peer: the bound, prefetch + threads.
  ``memory/total`` is the whole peak. Ratios are bound to usage.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks import harness
from recis_hybrid.columnio import ColumnDataset, ReadOptions
from recis_hybrid.features import Feature, FeatureEngine, Hash
from recis_hybrid.ragged import RaggedTensor

IDS = [f"id{k}" for k in range(26)]
FLOATS = [f"x{k}" for k in range(13)]
NUMBERS = [*IDS, *FLOATS, "label"]
CLICKS, TAGS, STRINGS = "clicks", "tags", ["site", "app"]
ROWS, FILES, BATCH, PREFETCH = 2_000_000, 8, 8192, 4
GROUP = 65_536
LENGTH = 20


def write(folder: Path, rows: int, make: Callable[[int, np.random.Generator], dict[str, Any]]) -> None:
    generator = np.random.default_rng(0)
    for number in range(FILES):
        table = pa.table(make(rows // FILES, generator))
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=GROUP)


def numbers(rows: int, generator: np.random.Generator) -> dict[str, Any]:
    """Draw ids with the skew of a click log, spread over all 64 bits."""
    columns: dict[str, Any] = {
        name: (generator.zipf(1.2, rows) % 1_000_003) * np.int64(0x1F83D9ABFB41BD6B) for name in IDS
    }
    columns |= {name: generator.standard_normal(rows, np.float32) for name in FLOATS}
    return columns | {"label": generator.integers(0, 2, rows).astype(np.float32)}


def ragged(rows: int, generator: np.random.Generator) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name in (CLICKS, TAGS):
        lengths = generator.integers(0, 2 * LENGTH + 1, rows)
        offsets = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        ids = pa.array(generator.zipf(1.2, offsets[-1].as_py()) % 1_000_003)
        columns[name] = pa.ListArray.from_arrays(offsets, ids if name == CLICKS else texts(ids, name))
    for name in STRINGS:
        columns[name] = texts(pa.array(generator.zipf(1.2, rows) % 100_003), name)
    return columns


def texts(ids: Any, name: str) -> Any:
    return pc.binary_join_element_wise(name, ids.cast(pa.string()), "-")


def consume(data: ColumnDataset) -> int:
    rows = 0
    for batch in data:
        rows += len(next(iter(batch.values())))
    return rows


class Frames(IterableDataset[dict[str, torch.Tensor]]):
    """Batches sliced from pandas frames: the peer of ``dataloader``."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.parquet"))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for file in self._files[first::step]:
            frame = pd.read_parquet(file, columns=NUMBERS)
            for start in range(0, len(frame), BATCH):
                part = frame.iloc[start : start + BATCH]
                yield {name: torch.from_numpy(part[name].to_numpy().copy()) for name in NUMBERS}


def of_frames(folder: Path) -> int:
    return sum(len(batch["label"]) for batch in DataLoader(Frames(folder), batch_size=None, num_workers=2))


def bare_scan(folder: Path, columns: list[str]) -> int:
    return sum(batch.num_rows for batch in ds.dataset(folder).to_batches(columns=columns))


def pandas_hashes(folder: Path) -> int:
    rows = 0
    for batch in ds.dataset(folder).to_batches(columns=[CLICKS, TAGS, *STRINGS]):
        rows += batch.num_rows
        pd.util.hash_array(batch.column(CLICKS).flatten().to_numpy())
        for column in (batch.column(TAGS).flatten(), *map(batch.column, STRINGS)):
            pd.util.hash_array(column.to_numpy(zero_copy_only=False), categorize=False)
    return rows


def checked(step: Callable[[], int], rows: int) -> Callable[[], None]:
    """Wrap a step with a check that it yields all rows, so that only equal work is compared."""

    def run() -> None:
        if (got := step()) != rows:
            raise AssertionError(f"columnio: expected {rows} rows, got {got}")

    return run


def report(case: str, rate: dict[str, float], peer: str) -> None:
    rate = {name: value / 1e6 for name, value in rate.items()}
    harness.Result(
        "columnio",
        case,
        "rows",
        "M rows/s",
        round(rate["ours"], 3),
        round(rate["peer"], 3),
        peer,
        round(rate["ours"] / rate["peer"], 2),
    ).print()


def number_cases(folder: Path, args: Any, rounds: int) -> None:
    rows = (ROWS // 10 if args.quick else ROWS) // FILES * FILES
    write(folder, rows, numbers)
    peers: dict[str, tuple[str, Callable[[], int]]] = {
        "scan": ("bare pyarrow scan to RecordBatches", lambda: bare_scan(folder, NUMBERS)),
        "dataloader": ("torch DataLoader over pandas frames, 2 workers", lambda: of_frames(folder)),
    }
    ours = ColumnDataset(folder, NUMBERS, BATCH, read=ReadOptions(num_threads=args.threads, prefetch=PREFETCH))
    for case, (name, peer) in peers.items():
        if args.cases in case:
            harness.progress(f"{case}, {args.threads} thread(s)")
            steps = {"ours": checked(lambda: consume(ours), rows), "peer": checked(peer, rows)}
            report(case, harness.rates(dict(steps), rows, rounds, torch.device("cpu")), name)
    if args.cases in "memory":
        harness.progress("memory")
        memory_case(folder, args.threads)


def memory_case(folder: Path, threads: int) -> None:
    """Compare the peak of Arrow's memory with that of the same number of pyarrow decoders alone."""
    ours = ColumnDataset(
        folder, NUMBERS, BATCH, read=ReadOptions(num_threads=threads, prefetch=PREFETCH, decoded_rows=BATCH)
    )
    before, most, size = pa.total_allocated_bytes(), 0, 0
    for number, batch in enumerate(ours):
        if number % 5 == 0:
            # Let the threads read ahead up to their limit.
            time.sleep(0.02)
        most = max(most, pa.total_allocated_bytes() - before)
        size = max(size, sum(c.nbytes for c in batch.values() if isinstance(c, torch.Tensor)))
    decoders = held_by_decoders(sorted(folder.glob("*.parquet"))[:threads])
    bound, ahead = PREFETCH + threads, (most - decoders) / size
    for case, used, peer, name in (
        ("memory", ahead, bound, "bound: prefetch + threads"),
        ("memory/total", most / size, decoders / size, f"{threads} pyarrow decoders alone"),
    ):
        harness.Result(
            "columnio", case, "peak memory", "batches", round(used, 1), round(peer, 1), name, round(peer / used, 2)
        ).print()


def held_by_decoders(files: list[Path]) -> int:
    """Return the peak of Arrow's memory while decoders read one row group each, concurrently."""
    before, most = pa.total_allocated_bytes(), 0
    readers = [pq.ParquetFile(file).iter_batches(BATCH, row_groups=[0], columns=NUMBERS) for file in files]
    for _ in zip(*readers, strict=True):
        most = max(most, pa.total_allocated_bytes() - before)
    return most


def ragged_case(folder: Path, args: Any, rounds: int) -> None:
    rows = (ROWS // 80 if args.quick else ROWS // 8) // FILES * FILES
    write(folder, rows, ragged)
    columns = [CLICKS, TAGS, *STRINGS]
    features = FeatureEngine([Feature(name, ops=[Hash("farm")]) for name in columns])
    data = ColumnDataset(
        folder,
        columns,
        BATCH,
        transforms=features.reading_part(),
        read=ReadOptions(num_threads=args.threads, prefetch=PREFETCH),
    )
    first = next(iter(data))
    assert isinstance(first[CLICKS], RaggedTensor)
    steps = {
        "ours": checked(lambda: sum(len(batch["site"]) for batch in data), rows),
        "peer": checked(lambda: pandas_hashes(folder), rows),
    }
    harness.progress(f"ragged_strings, {args.threads} thread(s)")
    report(
        "ragged_strings",
        harness.rates(dict(steps), rows, rounds, torch.device("cpu")),
        "pyarrow scan + pandas.util.hash_array",
    )


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(threads=2)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("reading runs on the CPU only; omit --device cuda")
    torch.set_num_threads(args.threads)
    rounds = 3 if args.quick else 15
    with tempfile.TemporaryDirectory() as folder:
        for name, run in (("scan dataloader memory", number_cases), ("ragged_strings", ragged_case)):
            if args.cases in name or any(args.cases in case for case in name.split()):
                inner = Path(folder) / name.split()[0]
                inner.mkdir()
                run(inner, args, rounds)


if __name__ == "__main__":
    main()
