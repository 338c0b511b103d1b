"""If one rank fails, all raise, none hangs, and no checkpoint is left."""

from __future__ import annotations

import errno
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid.checkpointing import rank_of_bucket
from recis_hybrid.ops.id_map import bucket_of
from recis_hybrid.saver import CheckpointError, CheckpointMismatch, PartState, PerRank, Saver, TableState
from recis_hybrid.saver.actions import write
from recis_hybrid.saver.checkpoint import table_plan
from recis_hybrid.saver.format import tensor_file
from recis_hybrid.saver.storage import shared_check
from tests.saver.fakes import Shelf, entries
from tests.support.programs import start_ranks
from tests.support.ranks import all_of, in_ranks


def shelf(rank: int, size: int, rows: int = 400) -> Shelf:
    ids = torch.arange(rows) * 7919
    ids = ids[rank_of_bucket(bucket_of(ids), size) == rank]
    columns = {"ids": ids, "embedding": ids[:, None].float()}
    return Shelf(PartState({"t": TableState(columns, bucket_of(ids), {})}, {"dense": torch.tensor(1.0)}))


def refused(path: Path, results: list[Any], message: str, failing: int = 1) -> None:
    """Check that all ranks raise, that the others name the failing rank and its error, and that nothing is left."""
    for rank, result in enumerate(results):
        assert isinstance(result, Exception), result
        assert message in str(result)
        if rank != failing:
            assert isinstance(result, CheckpointError)
            assert f"rank {failing} of {len(results)} failed: " in str(result)
    assert not path.exists() or entries(path) == []


class Failing(Shelf):
    def checkpoint_state(self) -> PartState:
        raise RuntimeError("out of luck")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_state_that_raises(tmp_path: Path, async_save: bool) -> None:
    def save(rank: int, group: dist.ProcessGroup) -> None:
        part = Failing(PartState()) if rank == 1 else shelf(rank, 3)
        saver = Saver(tmp_path, group=group, async_save=async_save)
        saver.save(1, {"first": shelf(rank, 3), "part": part})
        saver.wait()

    refused(tmp_path, in_ranks(3, save), "out of luck")


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_full_disk(tmp_path: Path, async_save: bool, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_plan, "RANGE_BYTES", 1024)
    write_file, plan, owners = tensor_file.write_file, write.plan_files, {}

    def planned(ranks: Any, *args: Any) -> Any:
        files = plan(ranks, *args)
        owners.update({f"{f.first_bucket:05d}-{f.last_bucket:05d}.safetensors": f.writer for f in files})
        return files

    def full(path: Path, pieces: Any) -> Any:
        if owners.get(path.name) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_file(path, pieces)

    monkeypatch.setattr(write, "plan_files", planned)
    monkeypatch.setattr(tensor_file, "write_file", full)

    def save(rank: int, group: dist.ProcessGroup) -> None:
        saver = Saver(tmp_path, group=group, async_save=async_save)
        saver.save(1, {"shelf": shelf(rank, 3)})
        saver.wait()

    results = in_ranks(3, save)
    refused(tmp_path, results, "No space left on device", failing)
    assert "could not be written" in str(results[failing])
    monkeypatch.setattr(tensor_file, "write_file", write_file)
    all_of(3, save)
    assert entries(tmp_path) == ["step_000001"]


class BadReader:
    def read(self, first: int, stop: int, out: Mapping[str, Tensor]) -> None:
        raise RuntimeError("a bad record")


@pytest.mark.parametrize("failing", [0, 1])
def test_no_rank_waits_for_rows_that_cannot_be_read(tmp_path: Path, failing: int) -> None:
    # A file with rows of both ranks: one sends, the other receives and writes.
    def save(rank: int, group: dist.ProcessGroup) -> None:
        part = shelf(rank, 2)
        if rank == failing:
            table = part.state.tables["t"]
            order = table.buckets.argsort(stable=True)
            ids = table.columns["ids"][order]
            columns = {"ids": ids, "embedding": torch.empty(0, 1)}
            part.state.tables["t"] = TableState(columns, table.buckets[order], {}, reader=BadReader())
        Saver(tmp_path, group=group).save(1, {"first": part})

    refused(tmp_path, in_ranks(2, save), "a bad record", failing)


def test_ranks_that_do_not_agree(tmp_path: Path) -> None:
    def steps(rank: int, group: dist.ProcessGroup) -> None:
        Saver(tmp_path, group=group).save(1 + rank, {"shelf": shelf(rank, 2)})

    def parts(rank: int, group: dist.ProcessGroup) -> None:
        Saver(tmp_path, group=group).save(1, {f"part{rank}": shelf(rank, 2)})

    def tables(rank: int, group: dist.ProcessGroup) -> None:
        part = shelf(rank, 2)
        if rank:
            columns = part.state.tables["t"].columns
            columns["embedding"] = columns["embedding"].double()
        Saver(tmp_path, group=group).save(1, {"shelf": part})

    def foreign(rank: int, group: dist.ProcessGroup) -> None:
        Saver(tmp_path, group=group).save(1, {"shelf": shelf(0, 1)})

    for work, message in (
        (steps, "all ranks must save the same step and parts"),
        (parts, "all ranks must save the same step and parts"),
        (tables, "all ranks must hold the same tables with the same columns and meta, rank 1 differs"),
        (foreign, "each rank must hold rows of later buckets than the ranks before it, rank 0 has buckets"),
    ):
        results = in_ranks(2, work)
        assert all(isinstance(result, CheckpointError) for result in results), results
        assert message in str(results[0])
        assert entries(tmp_path) == []


def test_tables_per_rank_are_refused(tmp_path: Path) -> None:
    results = in_ranks(2, lambda rank, group: Saver(tmp_path, group=group).save(1, {"t": PerRank(shelf(rank, 2))}))
    assert all("ranks share tables. Pass the object without PerRank" in str(result) for result in results)


def test_a_model_of_another_shape_on_one_rank_stops_all(tmp_path: Path) -> None:
    all_of(
        2,
        lambda rank, group: Saver(tmp_path, group=group).save(1, {"shelf": shelf(rank, 2), "m": torch.nn.Linear(2, 1)}),
    )
    loaded: list[Shelf] = []

    def load(rank: int, group: dist.ProcessGroup) -> None:
        part = shelf(rank, 2)
        loaded.append(part)
        Saver(tmp_path, group=group).load({"shelf": part, "m": torch.nn.Linear(2 + rank, 1)})

    results = in_ranks(2, load)
    assert all(isinstance(result, CheckpointMismatch) for result in results)
    assert "rank 1 of 2 failed: " in str(results[0])
    assert [part.loaded for part in loaded] == [None, None]


def test_separate_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_check, "PATIENCE_S", 0.2)

    def save(rank: int, group: dist.ProcessGroup) -> None:
        # Like the same path on different machines.
        (tmp_path / str(rank)).mkdir(exist_ok=True)
        Saver(tmp_path / str(rank), group=group).save(1, {"shelf": shelf(rank, 3)})

    results = in_ranks(3, save)
    for rank, result in enumerate(results):
        assert isinstance(result, CheckpointError)
        assert "all ranks must see the same directory, rank 1 on " in str(result) or rank == 2
        assert "Save to a file system that all machines share" in str(result)
        assert entries(tmp_path / str(rank)) == []


def test_all_ranks_share_one_lease(tmp_path: Path) -> None:
    savers: list[Saver] = []

    def save(rank: int, group: dist.ProcessGroup) -> None:
        saver = Saver(tmp_path, group=group)
        savers.append(saver)
        saver.save(1, {"shelf": shelf(rank, 2)})
        saver.save(2, {"shelf": shelf(rank, 2)})

    all_of(2, save)
    with pytest.raises(CheckpointError, match="another saver saves here"):
        Saver(tmp_path).save(3, {"note": 1})
    savers.clear()
    Saver(tmp_path).save(3, {"note": 1})


def test_a_group_of_another_backend_is_refused(tmp_path: Path) -> None:
    class Nccl:
        def name(self) -> str:
            return "nccl"

    with pytest.raises(CheckpointError, match="group must be a gloo process group .*new_group"):
        Saver(tmp_path, group=Nccl()).save(1, {"note": 1})  # type: ignore[arg-type]


JOB = """
import sys, os, signal, torch, torch.distributed as dist
from recis_hybrid.saver import Saver
from tests.saver.runtime.test_ranks import shelf
dist.init_process_group("gloo")
rank, size, path, what = dist.get_rank(), dist.get_world_size(), sys.argv[1], sys.argv[2]
saver = Saver(path, async_save=what == "async")
if what == "load":
    part = shelf(rank, size)
    rows = part.state.tables["t"]
    part.state.tables["t"] = type(rows)({k: v[:0] for k, v in rows.columns.items()}, rows.buckets[:0], {})
    assert saver.load({'shelf': part}) == 1
    ids = part.loaded.tables["t"].columns["ids"].sort().values
    assert torch.equal(ids, rows.columns["ids"].sort().values)
else:
    part = shelf(rank, size)
    if what == "die" and rank == 1:
        part.checkpoint_state = lambda: os.kill(os.getpid(), signal.SIGKILL)
    saver.save(1, {'shelf': part})
    if what == "async":
        x = torch.ones(1)
        for _ in range(20):  # training continues with its own collectives
            dist.all_reduce(x)
    saver.wait()
dist.destroy_process_group()
print("done", rank)
"""


def run_job(size: int, folder: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    (folder / "job.py").write_text(JOB)
    return [rank.finish(60) for rank in start_ranks(folder / "job.py", arguments, size)]


@pytest.mark.slow
def test_processes_of_torch_distributed(tmp_path: Path) -> None:
    Saver(tmp_path / "alone").save(1, {"shelf": shelf(0, 1)})
    run = tmp_path / "run"
    for size, what in ((2, "async"), (3, "load")):
        for done in run_job(size, tmp_path, str(run), what):
            assert done.returncode == 0, done.stderr
    for path in (run / "step_000001").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "alone" / path.relative_to(run)).read_bytes()


@pytest.mark.slow
def test_a_rank_that_dies_stops_the_others(tmp_path: Path) -> None:
    left, killed = run_job(2, tmp_path, str(tmp_path / "run"), "die")
    assert killed.returncode == -signal.SIGKILL
    assert (left.returncode, left.stdout) == (1, "")
    assert "CheckpointError: Saver: rank 0 of 2 lost the connection to another" in left.stderr
    assert Saver(tmp_path / "run").steps() == []
