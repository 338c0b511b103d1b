"""Resuming and epochs under a DataLoader: in the main process, in workers, and in persistent workers."""

from __future__ import annotations

import copy
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from recis_hybrid.columnio import ColumnDataset, ShardOptions
from tests.support.columns import dense
from tests.support.workers import FEW_CORES, FORKED

pytestmark = [FORKED, FEW_CORES]

ROWS = 140


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader")
    pq.write_table(pa.table({"row": pa.array(range(ROWS), pa.int64())}), path / "a.parquet", row_group_size=17)
    return path


def opened(folder: Path, **options: Any) -> ColumnDataset:
    return ColumnDataset(folder, ["row"], 10, shard=ShardOptions(rank=0, world_size=1), **options)


def rows_of(batches: Any) -> list[int]:
    return list(chain.from_iterable(dense(batch).tolist() for batch in batches))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_pass_is_resumed_again(folder: Path, workers: int, shuffle: bool) -> None:
    whole = rows_of(opened(folder, shuffle=shuffle))
    data = opened(folder, shuffle=shuffle)
    data.load_state_dict({**data.state_dict(), "row": 100})
    passing = iter(DataLoader(data, batch_size=None, num_workers=workers))
    assert data.state_dict(0)["row"] == 100
    assert rows_of(islice(passing, 3)) == whole[100:130]
    state = data.state_dict(3)
    assert (state["epoch"], state["row"]) == (0, 130)
    again = opened(folder, shuffle=shuffle)
    again.load_state_dict(state)
    assert rows_of(again) == whole[130:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_state_after_the_last_batch_belongs_to_the_finished_pass(folder: Path, workers: int) -> None:
    data = opened(folder, shuffle=True)
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    count = len(list(loader))
    state = data.state_dict(count)
    assert (state["epoch"], state["row"]) == (0, ROWS)
    # After set_epoch, it belongs to the next pass.
    data.set_epoch(1)
    assert (data.state_dict(0)["epoch"], data.state_dict(2)["epoch"], data.state_dict(2)["row"]) == (1, 1, 20)


def test_a_state_of_no_batches_after_a_complete_pass_belongs_to_the_next(folder: Path) -> None:
    data = opened(folder)
    list(data)
    state = data.state_dict(0)
    assert (state["epoch"], state["row"]) == (1, 0)


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_persistent_workers_follow_epochs_and_states(folder: Path, context: str, workers: int) -> None:
    direct = {}
    data = opened(folder, shuffle=True, seed=1)
    for epoch in (0, 2, 5):
        data.set_epoch(epoch)
        direct[epoch] = rows_of(data)
    # A copy has its own position.
    data = copy.deepcopy(opened(folder, shuffle=True, seed=1))
    other = copy.deepcopy(data)
    loader = DataLoader(
        data, batch_size=None, num_workers=workers, persistent_workers=True, multiprocessing_context=context
    )
    assert rows_of(loader) == direct[0]
    other.set_epoch(3)
    # An epoch is repeated until set_epoch.
    assert rows_of(loader) == direct[0]
    data.set_epoch(5)
    assert rows_of(loader) == direct[5]
    data.set_epoch(2)
    passing = iter(loader)
    next(passing)
    state = data.state_dict(4)
    assert rows_of(passing) == direct[2][10:]
    data.load_state_dict(state)
    assert rows_of(loader) == direct[2][40:]
    assert data.state_dict(3)["row"] == 70
    data.set_epoch(0)
    assert rows_of(loader) == direct[0]


def test_changes_in_a_worker_do_not_reach_the_main_process(folder: Path) -> None:
    data = opened(folder, shuffle=True)

    def begin(_: int) -> None:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        info.dataset.set_epoch(7)  # type: ignore[attr-defined]

    list(DataLoader(data, batch_size=None, num_workers=1, worker_init_fn=begin, multiprocessing_context="fork"))
    assert data.epoch == 0
    want = opened(folder, shuffle=True)
    assert rows_of(data) == rows_of(want)
