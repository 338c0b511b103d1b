"""Ranks that see other files: all raise, and none hangs; and ranks take the same windows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis_hybrid.columnio.options import ShardOptions
from recis_hybrid.columnio.ranks import has_other_ranks, open_on_all_ranks

# Each scenario is run by both ranks, of which each has a folder of its own; what they say is compared below. A last
# collective shows that the group is as it was.
_RANK = """
import json, os, sys, time, warnings
from pathlib import Path
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset
from recis_hybrid.columnio import ColumnDataset, ReadOptions, ShardOptions, Windows

warnings.simplefilter("ignore")
root, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + str(root / "store"), rank=rank, world_size=2)
mine = root / f"rank-{rank}"

def opened(name, batch_size=10, **options):
    return ColumnDataset(mine / name, ["row"], batch_size, **options)

class Lazy(IterableDataset):
    # Opened in a worker, which inherits the group's name and cannot use it.
    def __iter__(self):
        yield from opened("same")

def rows(data):
    return sum(len(batch["row"]) for batch in data)

def names(windows):
    return [(window.name, Path(window.paths[0]).parts[-3:-1]) for window in windows]

def by_hand():
    if rank == 0:
        return [rows(opened("same", shard=ShardOptions(rank=0, world_size=size))) for size in (1, 2)]

def failing():
    # A file system that the first rank alone cannot read.
    windows = Windows(mine / "hours", idle_s=0)
    if rank == 0:
        windows._look = lambda idle: (_ for _ in ()).throw(PermissionError("not yours"))
    return names(windows)

def late():
    waits = []
    def wait(seconds):
        waits.append(seconds)
        if rank == 0 and len(waits) == 2:
            (mine / "later" / "a").mkdir(parents=True)
            (mine / "later" / "a" / "_SUCCESS").touch()
    # The other rank polls more slowly, and would end sooner.
    windows = Windows(mine / "later", poll_s=1, idle_s=(3, 0)[rank], sleep=wait)
    return [window.name for window in windows], len(waits)

scenarios = {
    "elsewhere": lambda: len(opened("same")),
    "file": lambda: opened("file"),
    "rows": lambda: opened("rows"),
    "order": lambda: ColumnDataset([mine / "same" / f"{k}.parquet" for k in ((0, 1), (1, 0))[rank]], ["row"], 10),
    "batch size": lambda: opened("same", 10 + rank),
    "seed": lambda: opened("same", shuffle=True, seed=rank),
    "memory": lambda: ColumnDataset.from_arrow({"row": [0, rank, 2]}, ["row"], 1),
    "same memory": lambda: rows(ColumnDataset.from_arrow({"row": [0, 1, 2]}, ["row"], 1)),
    "damaged": lambda: opened("damaged"),
    "skip": lambda: opened("damaged", read=ReadOptions(on_bad_file="skip")),
    "missing": lambda: opened("missing"),
    "by hand": by_hand,
    "workers": lambda: rows(DataLoader(opened("same"), batch_size=None, num_workers=1, multiprocessing_context="fork")),
    "in a worker": lambda: rows(DataLoader(Lazy(), batch_size=None, num_workers=1, multiprocessing_context="fork")),
    "windows": lambda: names(Windows(mine / "hours", idle_s=0)),
    "alone": lambda: names(Windows(mine / "hours", idle_s=0, alone=True)) if rank else None,
    "list": lambda: [window.name for window in Windows([["a"], ["b"]])] if rank else None,
    "failing": failing,
    "late": late,
}
said = {}
for name, run in scenarios.items():
    try:
        result = run()
        said[name] = result if not isinstance(result, ColumnDataset) else "opened"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
    dist.barrier()
print(json.dumps(said))
dist.destroy_process_group()
"""


def write(path: Path, first: int = 0, rows: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"row": range(first, first + rows)}), path, row_group_size=20)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("ranks")
    for rank in range(2):
        mine = root / f"rank-{rank}"
        for name in ("same", "file", "rows", "damaged"):
            for number in range(2):
                write(mine / name / f"{number}.parquet", number * 30)
        for hour in ("b", *("a" * rank)):
            (mine / "hours" / hour).mkdir(parents=True)
            (mine / "hours" / hour / "_SUCCESS").touch()
    # What appeared before the second rank looked, was written anew, or cannot be read there.
    write(root / "rank-1" / "file" / "2.parquet")
    write(root / "rank-1" / "rows" / "1.parquet", rows=31)
    (root / "rank-1" / "damaged" / "0.parquet").write_bytes(b"PAR1 and no more")
    write(root / "rank-0" / "missing" / "0.parquet")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(root), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        every = [process.communicate(timeout=90) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], every
    return [json.loads(out) for out, _ in every]


@pytest.mark.parametrize(
    ("scenario", "found"),
    [
        ("file", "2.parquet has None on rank 0 and [20, 10] on rank 1"),
        ("rows", "1.parquet has [20, 10] on rank 0 and [20, 11] on rank 1"),
        ("order", "its files are in another order"),
        ("batch size", "batch_size is 10 on rank 0 and 11 on rank 1"),
        ("seed", "seed is 0 on rank 0 and 1 on rank 1"),
        ("memory", "data in memory"),
        ("skip", "0.parquet has [20, 10] on rank 0 and None on rank 1"),
    ],
)
def test_ranks_that_found_other_things_all_raise(said: list[dict[str, Any]], scenario: str, found: str) -> None:
    for rank in said:
        assert rank[scenario].startswith(
            "ValueError: ColumnDataset: all ranks must open the same data, but rank 1 differs from rank 0: "
        )
        assert found in rank[scenario]
        assert rank[scenario].endswith(
            "; open it with the same files and options on all ranks, once all files are there"
        )
    assert said[0][scenario] == said[1][scenario]


def test_what_was_left_out_is_named(said: list[dict[str, Any]]) -> None:
    assert "rank 1 skipped" in said[0]["skip"]
    assert "rank-1/damaged/0.parquet" in said[0]["skip"]


@pytest.mark.parametrize(("scenario", "error"), [("damaged", "BadFileError"), ("missing", "FileNotFoundError")])
def test_a_rank_that_cannot_open_tells_the_others(said: list[dict[str, Any]], scenario: str, error: str) -> None:
    assert said[1][scenario].startswith(f"{error}: ")
    assert said[0][scenario].startswith(f"ValueError: ColumnDataset: rank 1 could not open the dataset ({error}: ")


def test_the_same_data_elsewhere_is_the_same(said: list[dict[str, Any]]) -> None:
    assert [rank["elsewhere"] for rank in said] == [3, 3]
    assert [rank["same memory"] for rank in said] == [2, 1]


def test_ranks_by_hand_and_workers_talk_to_nobody(said: list[dict[str, Any]]) -> None:
    assert [rank["by hand"] for rank in said] == [[60, 30], None]
    assert [rank["workers"] for rank in said] == [30, 30]
    assert [rank["in a worker"] for rank in said] == [30, 30]


def test_the_first_rank_chooses_the_windows(said: list[dict[str, Any]]) -> None:
    # The second rank saw "a", too, and first; each opens its own.
    assert [rank["windows"] for rank in said] == [[["b", [f"rank-{rank}", "hours"]]] for rank in range(2)]
    assert [rank["alone"] and [name for name, _ in rank["alone"]] for rank in said] == [None, ["a", "b"]]
    # An explicit list is the same everywhere.
    assert said[1]["list"] == ["0", "1"]
    assert [rank["late"] for rank in said] == [[["a"], 5], [["a"], 5]]


def test_what_fails_on_the_first_rank_fails_on_all(said: list[dict[str, Any]]) -> None:
    assert said[0]["failing"] == "PermissionError: not yours"
    assert said[1]["failing"].startswith(
        "RuntimeError: columnio: rank 0, which chooses for all ranks, failed: Permission"
    )


def test_one_process_compares_nothing() -> None:
    assert not has_other_ranks()
    with open_on_all_ranks(ShardOptions()) as opening:
        assert not opening.together
    with pytest.raises(LookupError), open_on_all_ranks(ShardOptions()):
        raise LookupError
