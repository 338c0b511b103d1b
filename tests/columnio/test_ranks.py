"""Ranks that open different files: all raise and none hangs; and all ranks get the same windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recis_hybrid.columnio.options import ShardOptions
from recis_hybrid.columnio.ranks import has_other_ranks, open_on_all_ranks
from tests.support.programs import Program

# Both ranks run each scenario, each with its own folder; their reports are compared below. The barrier after each
# scenario shows that the group still works.
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
    # Opened in a worker, which inherits the group but cannot use it.
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
    # A file system that only rank 0 cannot read.
    windows = Windows(mine / "hours", idle_s=0)
    if rank == 0:
        windows._poll = lambda idle: (_ for _ in ()).throw(PermissionError("not yours"))
    return names(windows)

def late():
    waits = []
    def wait(seconds):
        waits.append(seconds)
        if rank == 0 and len(waits) == 2:
            (mine / "later" / "a").mkdir(parents=True)
            (mine / "later" / "a" / "_SUCCESS").touch()
    # Alone, rank 1 would end immediately.
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
reports = {}
for name, run in scenarios.items():
    try:
        result = run()
        reports[name] = result if not isinstance(result, ColumnDataset) else "opened"
    except Exception as error:
        reports[name] = f"{type(error).__name__}: {error}"
    dist.barrier()
print(json.dumps(reports))
dist.destroy_process_group()
"""


def write(path: Path, first: int = 0, rows: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"row": range(first, first + rows)}), path, row_group_size=20)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("ranks")
    for rank in range(2):
        mine = root / f"rank-{rank}"
        for name in ("same", "file", "rows", "damaged"):
            for number in range(2):
                write(mine / name / f"{number}.parquet", number * 30)
        for hour in ("b", *("a" * rank)):
            (mine / "hours" / hour).mkdir(parents=True)
            (mine / "hours" / hour / "_SUCCESS").touch()
    # On rank 1: an extra file, a rewritten file, and an unreadable file.
    write(root / "rank-1" / "file" / "2.parquet")
    write(root / "rank-1" / "rows" / "1.parquet", rows=31)
    (root / "rank-1" / "damaged" / "0.parquet").write_bytes(b"PAR1 and no more")
    write(root / "rank-0" / "missing" / "0.parquet")
    program = root / "program.py"
    program.write_text(_RANK)
    ranks = [Program(program, [str(root), str(rank)], folder=root, number=rank) for rank in range(2)]
    every = [rank.finish() for rank in ranks]
    assert [done.returncode for done in every] == [0, 0], every
    return [json.loads(done.stdout) for done in every]


@pytest.mark.parametrize(
    ("scenario", "difference"),
    [
        ("file", "2.parquet has None on rank 0 and [20, 10] on rank 1"),
        ("rows", "1.parquet has [20, 10] on rank 0 and [20, 11] on rank 1"),
        ("order", "its files are in a different order"),
        ("batch size", "batch_size is 10 on rank 0 and 11 on rank 1"),
        ("seed", "seed is 0 on rank 0 and 1 on rank 1"),
        ("memory", "data in memory"),
        ("skip", "0.parquet has [20, 10] on rank 0 and None on rank 1"),
    ],
)
def test_ranks_with_different_data_all_raise(reports: list[dict[str, Any]], scenario: str, difference: str) -> None:
    for rank in reports:
        assert rank[scenario].startswith(
            "ValueError: ColumnDataset: all ranks must open the same data, but rank 1 differs from rank 0: "
        )
        assert difference in rank[scenario]
        assert rank[scenario].endswith(
            "; open it with the same files and options on all ranks, once all files are there"
        )
    assert reports[0][scenario] == reports[1][scenario]


def test_skipped_files_are_named(reports: list[dict[str, Any]]) -> None:
    assert "rank 1 skipped" in reports[0]["skip"]
    assert "rank-1/damaged/0.parquet" in reports[0]["skip"]


@pytest.mark.parametrize(("scenario", "error"), [("damaged", "BadFileError"), ("missing", "FileNotFoundError")])
def test_a_failure_on_one_rank_is_reported_on_the_others(
    reports: list[dict[str, Any]], scenario: str, error: str
) -> None:
    assert reports[1][scenario].startswith(f"{error}: ")
    assert reports[0][scenario].startswith(f"ValueError: ColumnDataset: rank 1 could not open the dataset ({error}: ")


def test_the_same_data_in_another_folder_matches(reports: list[dict[str, Any]]) -> None:
    assert [rank["elsewhere"] for rank in reports] == [3, 3]
    assert [rank["same memory"] for rank in reports] == [2, 1]


def test_explicit_ranks_and_workers_do_not_communicate(reports: list[dict[str, Any]]) -> None:
    assert [rank["by hand"] for rank in reports] == [[60, 30], None]
    assert [rank["workers"] for rank in reports] == [30, 30]
    assert [rank["in a worker"] for rank in reports] == [30, 30]


def test_the_first_rank_chooses_the_windows(reports: list[dict[str, Any]]) -> None:
    # Rank 1 also has "a", which sorts first; each rank opens the chosen window in its own folder.
    assert [rank["windows"] for rank in reports] == [[["b", [f"rank-{rank}", "hours"]]] for rank in range(2)]
    assert [rank["alone"] and [name for name, _ in rank["alone"]] for rank in reports] == [None, ["a", "b"]]
    # An explicit list is the same everywhere.
    assert reports[1]["list"] == ["0", "1"]
    assert [rank["late"] for rank in reports] == [[["a"], 5], [["a"], 5]]


def test_a_failure_on_the_first_rank_raises_on_all(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["failing"] == "PermissionError: not yours"
    assert reports[1]["failing"].startswith(
        "RuntimeError: columnio: rank 0, which chooses for all ranks, failed: Permission"
    )


def test_one_process_compares_nothing() -> None:
    assert not has_other_ranks()
    with open_on_all_ranks(ShardOptions()) as opening:
        assert not opening.together
    with pytest.raises(LookupError), open_on_all_ranks(ShardOptions()):
        raise LookupError
