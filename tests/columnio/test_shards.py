"""Sharing of rows: equal numbers of batches, ranks of torch.distributed, workers of a DataLoader, threads."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from recis_hybrid.columnio import ColumnDataset, ReadOptions, ShardOptions
from recis_hybrid.columnio.ranks import open_on_all_ranks
from recis_hybrid.columnio.read.sampler import Batches
from recis_hybrid.features import Feature, FeatureEngine, Hash, Mod
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.columns import dense
from tests.support.programs import Program
from tests.support.workers import FEW_CORES, FORKED

pytestmark = [FORKED, FEW_CORES]

ROWS = 47


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    for number, (first, stop) in enumerate([(0, 13), (13, 20), (20, ROWS)]):
        rows = range(first, stop)
        columns = {"row": pa.array(rows, pa.int64()), "text": [f"é{row}" for row in rows]}
        lists = pa.array([[row] * (row % 4) for row in rows], pa.list_(pa.int64()))
        pq.write_table(pa.table({**columns, "list": lists}), path / f"part-{number}.parquet", row_group_size=5)
    return path


def rows_of(batches: Any) -> list[list[int]]:
    return [dense(batch).tolist() for batch in batches]


# Equal numbers of batches


@settings(max_examples=60)
@given(
    batch_size=st.integers(1, 60),
    world_size=st.integers(1, 9),
    shuffle=st.booleans(),
    threads=st.integers(1, 2),
    consumed=st.integers(0, 3),
    later=st.integers(1, 9),
)
def test_padded_batches_contain_every_row_once(
    folder: Path, batch_size: int, world_size: int, shuffle: bool, threads: int, consumed: int, later: int
) -> None:
    def opened(rank: int, size: int) -> ColumnDataset:
        return ColumnDataset(
            folder,
            ["row"],
            batch_size,
            shuffle=shuffle,
            seed=5,
            shard=ShardOptions(rank=rank, world_size=size, uneven="pad"),
            read=ReadOptions(num_threads=threads),
        )

    seen: list[int] = []
    states = []
    for rank in range(world_size):
        data = opened(rank, world_size)
        passing = iter(data)
        for _ in range(min(consumed, len(data))):
            batch = next(passing)
            assert len(dense(batch)) == len(dense(batch, "mask")) == batch_size
            seen += dense(batch)[dense(batch, "mask")].tolist()
        states.append(data.state_dict())
    assert states == states[:1] * world_size
    counts = set()
    for rank in range(later):
        data = opened(rank, later)
        data.load_state_dict(states[0])
        batches = list(data)
        counts.add(len(batches))
        for batch in batches:
            assert dense(batch).shape == dense(batch, "mask").shape == (batch_size,)
            assert set(dense(batch).tolist()) <= set(range(ROWS))
            seen += dense(batch)[dense(batch, "mask")].tolist()
    assert sorted(seen) == list(range(ROWS))
    assert len(counts) == 1


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 5, 9])
def test_wrapped_batches_continue_from_the_start(folder: Path, shuffle: bool, world_size: int) -> None:
    def opened(**options: Any) -> ColumnDataset:
        return ColumnDataset(folder, ["row"], 7, shuffle=shuffle, **options)

    order = list(chain.from_iterable(rows_of(opened())))
    turns = -(-ROWS // (7 * world_size))
    endless = order * 3
    ranks = [opened(shard=ShardOptions(rank=rank, world_size=world_size, uneven="wrap")) for rank in range(world_size)]
    assert [len(data) for data in ranks] == [turns] * world_size
    got = [rows_of(data) for data in ranks]
    for turn in range(turns):
        for rank in range(world_size):
            first = (turn * world_size + rank) * 7
            assert got[rank][turn] == endless[first : first + 7]


@given(
    rows=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    world_size=st.integers(2, 6),
    start=st.integers(0, 199),
    workers=st.integers(1, 3),
)
def test_ranks_get_the_same_number_of_batches_of_similar_size(
    rows: int, batch_size: int, world_size: int, start: int, workers: int
) -> None:
    start = min(start, rows)

    def ranges(begin: int, rank: int) -> list[tuple[int, int]]:
        of_workers = [
            list(Batches(rows, batch_size, begin, rank, world_size, False, None, w, workers)) for w in range(workers)
        ]
        return [each[turn] for turn in range(len(of_workers[0])) for each in of_workers if turn < len(each)]

    by_rank = [ranges(start, rank) for rank in range(world_size)]
    turns = len(by_rank[0])
    assert [len(each) for each in by_rank] == [turns] * world_size
    # Each row once, in one order for any number of ranks.
    assert [row for turn in zip(*by_rank, strict=True) for low, high in turn for row in range(low, high)] == list(
        range(start, rows)
    )
    sizes = [high - low for each in by_rank for low, high in each]
    assert max(sizes, default=0) <= batch_size
    if rows - start >= world_size and batch_size > 1:
        assert min(sizes) > 0
    # A run resumed after any turn continues with the same batches.
    for turn in range(turns):
        begin = Batches(rows, batch_size, start, 0, world_size).after(turn)
        assert [ranges(begin, rank) for rank in range(world_size)] == [each[turn:] for each in by_rank]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_dropping_a_turn_leaves_equal_numbers_of_batches(folder: Path, world_size: int) -> None:
    alone = rows_of(ColumnDataset(folder, ["row"], 7))
    ranks = [
        ColumnDataset(folder, ["row"], 7, shard=ShardOptions(rank=rank, world_size=world_size, uneven="drop"))
        for rank in range(world_size)
    ]
    turns = len(alone) // world_size
    got = [rows_of(data) for data in ranks]
    assert [[len(data)] + [len(each)] for data, each in zip(ranks, got, strict=True)] == [[turns, turns]] * world_size
    assert got == [alone[rank : turns * world_size : world_size] for rank in range(world_size)]
    with pytest.raises(ValueError, match="uneven='drop' leaves no batch of 47 rows"):
        ColumnDataset(folder, ["row"], 7, shard=ShardOptions(rank=0, world_size=8, uneven="drop"))


def test_padding_of_every_kind_of_column(folder: Path) -> None:
    (batch,) = ColumnDataset(folder, ["row", "text", "list"], 50, shard=ShardOptions(uneven="pad"))
    rows = dense(batch).tolist()
    assert rows == [*range(ROWS), 0, 1, 2]
    text, lists = batch["text"], batch["list"]
    assert isinstance(text, RaggedTensor)
    assert isinstance(lists, RaggedTensor)
    assert text.to_strings(decode=False) == [f"é{row}".encode() for row in rows]
    assert lists.to_lists() == [[row] * (row % 4) for row in rows]
    assert dense(batch, "mask").tolist() == [True] * ROWS + [False] * 3


@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    start=st.integers(0, 60),
    world_size=st.integers(1, 5),
    uneven=st.sampled_from([None, "wrap", "drop"]),
    drop=st.booleans(),
    workers=st.integers(1, 4),
    data=st.data(),
)
def test_wants_exactly_the_rows_of_its_batches(
    rows: int, batch_size: int, start: int, world_size: int, uneven: Any, drop: bool, workers: int, data: st.DataObject
) -> None:
    start = min(start, rows)
    rank, worker = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(0, workers - 1))
    batches = Batches(rows, batch_size, start, rank, world_size, drop, uneven, worker, workers)
    assert len(list(batches)) == len(batches)
    contained = {row for low, high in batches for row in range(low, high)}
    first = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(first, rows))
    assert batches.wants(first, stop) == bool(contained & set(range(first, stop)))


# Ranks


def test_an_explicit_rank_overrides_the_launcher(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_on_all_ranks(ShardOptions()) as opening:
        assert (opening.rank, opening.world_size) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with open_on_all_ranks(ShardOptions(rank=0, world_size=2)) as opening:
        assert (opening.rank, opening.world_size) == (0, 2)


_DISTRIBUTED = """
import sys
import torch.distributed as dist
from recis_hybrid.columnio import ColumnDataset, ShardOptions
# The ranks differ from the environment of torchrun: the initialized group takes precedence.
rank = 1 - int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
data = ColumnDataset(sys.argv[1], ["row"], 5, shard=ShardOptions(uneven="pad"))
seen = []
for batch in data:
    dist.all_reduce(batch["row"].sum())
    seen += batch["row"][batch["mask"]].tolist()
print(rank, seen)
dist.destroy_process_group()
"""


def test_ranks_of_torch_distributed_share_all_rows_and_no_collective_hangs(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_DISTRIBUTED)
    started = [
        Program(program, [str(folder), str(number), str(tmp_path / "store")], folder=tmp_path, number=number)
        for number in range(2)
    ]
    seen: list[int] = []
    for number, process in enumerate(started):
        done = process.finish()
        assert done.returncode == 0, done.stderr
        rank, rows = done.stdout.strip().split(" ", 1)
        assert int(rank) == 1 - number
        seen += [int(row) for row in rows.strip("[]").split(",")]
    assert sorted(seen) == list(range(ROWS))


# torch.utils.data.DataLoader


class Watched:
    """Transforms of a worker; picklable."""

    def __init__(self) -> None:
        self.engine = FeatureEngine([Feature("hashed", ops=[Hash("farm"), Mod(1000)], source="text")]).reading_part()

    def __call__(self, batch: Batch) -> Batch:
        jax = any(name.split(".")[0] in ("jax", "jaxlib") for name in sys.modules)
        return {**self.engine({**batch}), "jax": torch.tensor([jax] * len(dense(batch)))}


@pytest.mark.parametrize(("workers", "context"), [(0, None), (1, "fork"), (2, "fork"), (2, "spawn")])
def test_workers_share_the_batches_of_a_rank_in_order(folder: Path, workers: int, context: str | None) -> None:
    columns = ["row", "text", "list"]
    data = ColumnDataset(
        folder,
        columns,
        4,
        shuffle=True,
        seed=2,
        shard=ShardOptions(rank=1, world_size=2),
        transforms=Watched(),
        read=ReadOptions(prefetch=1),
    )
    want = list(
        ColumnDataset(
            folder, columns, 4, shuffle=True, seed=2, shard=ShardOptions(rank=1, world_size=2), transforms=Watched()
        )
    )
    loader = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=context)
    assert len(loader) == len(want)
    got = list(loader)
    assert rows_of(got) == rows_of(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(dense(one, "hashed"), dense(other, "hashed"))
        assert isinstance(one["list"], RaggedTensor)
        assert isinstance(other["list"], RaggedTensor)
        assert one["list"].to_lists() == other["list"].to_lists()
        if context == "spawn":
            # A fresh process imports only the package's dependencies.
            assert not dense(one, "jax").any()


def test_a_pass_of_a_loader_is_resumed_without_a_loader(folder: Path) -> None:
    def opened(**options: Any) -> ColumnDataset:
        return ColumnDataset(folder, ["row"], 4, shuffle=True, seed=2, **options)

    whole = rows_of(opened())
    data = opened()
    loader = iter(DataLoader(data, batch_size=None, num_workers=2))
    assert rows_of([next(loader) for _ in range(5)]) == whole[:5]
    state = data.state_dict(5)
    resumed = opened()
    resumed.load_state_dict(state)
    assert rows_of(resumed) == whole[5:]
    resumed = opened()
    resumed.load_state_dict(state)
    again = DataLoader(resumed, batch_size=None, num_workers=2)
    assert rows_of(again) == whole[5:]
    resumed.set_epoch(1)
    data.set_epoch(1)
    assert rows_of(again) == rows_of(data) != whole


# Threads


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_do_not_change_order_or_results(folder: Path, threads: int) -> None:
    engine = FeatureEngine([Feature("hashed", ops=[Hash("farm"), Mod(1000)], source="text"), Feature("row")])
    later = [engine(batch) for batch in ColumnDataset(folder, ["row", "text"], 3, shuffle=True)]
    reading, remaining = engine.reading_part(), engine.remaining_part()
    data = ColumnDataset(
        folder, ["row", "text"], 3, shuffle=True, transforms=reading, read=ReadOptions(num_threads=threads, prefetch=5)
    )
    got = [remaining(batch) for batch in data]
    assert len(got) == len(later)
    for one, other in zip(got, later, strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(dense(one, name), dense(other, name)) for name in one)


def test_device_and_pinned_memory(folder: Path) -> None:
    (batch, *_) = ColumnDataset(folder, ["row", "list"], 50, device="meta")
    assert {column.device.type for column in batch.values()} == {"meta"}
    if not torch.accelerator.is_available():
        with pytest.raises(ValueError, match="pin_memory needs a GPU that torch can use, but there is none"):
            ColumnDataset(folder, ["row"], 50, read=ReadOptions(pin_memory=True))


@pytest.mark.gpu
def test_pinned_batches_arrive_on_the_gpu(folder: Path) -> None:
    host = list(ColumnDataset(folder, ["row", "list"], 6, read=ReadOptions(pin_memory=True)))
    assert all(column.is_pinned() for batch in host for column in batch.values())
    there = list(ColumnDataset(folder, ["row", "list"], 6, read=ReadOptions(pin_memory=True), device="cuda"))
    assert rows_of(there) == rows_of(host)
    assert all(column.device.type == "cuda" for batch in there for column in batch.values())
