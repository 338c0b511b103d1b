"""Restarts: torchrun restarts a job when a rank is killed, and a different number of ranks can continue it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.embedding import restarting
from tests.support import rank_processes
from tests.support.near import assert_near
from tests.support.rank_processes import Ranks
from tests.support.sharded import assert_same

STEPS = 9


def in_ranks(group: dist.ProcessGroup, folder: str, steps: int, sharding: str = "row") -> dict[str, Any]:
    return restarting.train(group, folder, steps, rank_processes.SAVING[dist.get_world_size(group)], sharding=sharding)


def torchrun(root: Path, folder: Path, *more: str) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "--monitor-interval",
        "0.1",
        "-m",
        "tests.embedding.restarting",
        str(folder),
        str(STEPS),
        *more,
    ]
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        # Otherwise, ranks find the addresses of the previous ranks in torchrun's store (docs/distributed.md).
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"end.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_a_job_restarted_by_torchrun_ends_bitwise_identical(root: Path, tmp_path: Path, ranks: Ranks) -> None:
    undisturbed = ranks.run(2, in_ranks, str(tmp_path / "undisturbed"), STEPS)
    (tmp_path / "killed").mkdir()
    ended = torchrun(root, tmp_path / "killed", "--die-after", "8")
    assert (tmp_path / "killed" / "died").exists()
    for ours, theirs in zip(ended, undisturbed, strict=True):
        assert ours["first_step"] == 6  # that of the checkpoint before the kill
        assert torch.equal(torch.tensor(ours["tower"]), theirs["tower"])
        assert torch.equal(torch.tensor(ours["predictions"]), theirs["predictions"])
        for name, columns in theirs["tables"].items():
            order = columns["ids"].argsort()
            ids = torch.tensor(ours["tables"][name]["ids"], dtype=torch.int64)
            ordered = ids.argsort()
            for column, values in columns.items():
                got = torch.tensor(ours["tables"][name][column], dtype=values.dtype).view(-1, *values.shape[1:])
                assert torch.equal(got[ordered], values[order]), (name, column)


@pytest.mark.parametrize(("world", "sharding"), [(1, "row"), (3, "row"), (4, "row"), (1, "column"), (4, "column")])
def test_a_different_number_of_ranks_continues(tmp_path: Path, ranks: Ranks, world: int, sharding: str) -> None:
    ranks.run(2, in_ranks, str(tmp_path), 6, sharding)
    continued = ranks.run(world, in_ranks, str(tmp_path), STEPS, sharding)
    assert {result["first_step"] for result in continued} == {6}
    one = ranks.run(1, in_ranks, str(tmp_path / "one"), STEPS, sharding)
    assert_same(continued, one, sharding="row" if world == 1 else sharding)
    assert_near(continued[0]["tower"], one[0]["tower"])
