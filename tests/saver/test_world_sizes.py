"""Any number of ranks writes the same bytes, and any number reads them, each its own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

from recis_hybrid import optim
from recis_hybrid.checkpointing import owned_buckets, rank_of_bucket
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency
from recis_hybrid.ops.id_map import bucket_of
from recis_hybrid.saver import CheckpointError, CorruptCheckpoint, PartState, PerRank, Saver, TableState
from recis_hybrid.saver.checkpoint import table_plan
from tests.saver.fakes import Shelf, entries
from tests.support.devices import EDGE_IDS
from tests.support.ranks import all_of, in_ranks

SIZES = [1, 2, 3, 4, 8]


@settings(max_examples=60)
@given(st.integers(1, 70000))
def test_every_bucket_has_one_owner(size: int) -> None:
    owners = rank_of_bucket(torch.arange(65536), size)
    assert owners.min() == 0
    assert owners.max() < size
    for rank in {0, 1, size // 3, size - 1} & set(range(size)):
        first, stop = owned_buckets(rank, size)
        assert (owners == rank).nonzero().flatten().tolist() == list(range(first, stop))
    with pytest.raises(ValueError, match=f"rank must be 0 to {size - 1}, got {size}"):
        owned_buckets(size, size)


def own(ids: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return ids[rank_of_bucket(bucket_of(ids), size) == rank]


def sharded(rank: int, size: int, *, filled: bool = True, **options: Any) -> EmbeddingEngine:
    """Return an engine of three member tables with the rows and counts of its rank."""
    engine = EmbeddingEngine(
        {
            "user": EmbeddingConfig(dim=4),
            "item": EmbeddingConfig(dim=4),
            "query": EmbeddingConfig(dim=3, admission=MinFrequency(3)),
        },
        optimizer=optim.Adam,
        **options,
    )
    if filled:
        generator = torch.Generator().manual_seed(5)
        for name, count in (("user", 900), ("item", 40), ("query", 300)):
            ids = torch.cat([torch.randint(-(2**62), 2**62, (count,), generator=generator), torch.tensor(EDGE_IDS)])
            ids = own(ids.unique(), rank, size)
            table, number = member(engine, name)
            values = ids[:, None].sin() * torch.arange(1, table.layout.dim + 1)
            columns = {"embedding": values.float(), "exp_avg": values.cos().float()}
            columns |= {"updated_step": ids % 7, "seen_step": ids % 11, "frequency": ids % 13}
            table.insert(number, ids, {name: c.contiguous() for name, c in columns.items()})
        ids = own(torch.arange(500), rank, size)
        with torch.no_grad():
            engine({"user": ids[:0], "item": ids[:0], "query": ids})
        for table in engine.tables:
            table.step = 9
    return engine


def member(engine: EmbeddingEngine, name: str) -> tuple[Any, int]:
    return next((t, n) for t in engine.tables for n, m in enumerate(t.members) if m.name == name)


def rows_of(engine: EmbeddingEngine) -> dict[str, dict[int, list[list[float]]]]:
    """Return all columns by table and id."""
    found = {}
    for name, table in engine.checkpoint_state().tables.items():
        ids, *columns = (
            column.view(len(column), *column.shape[1:] or (1,)).tolist() for column in table.columns.values()
        )
        found[name] = {id_: list(rest) for (id_,), *rest in zip(ids, *columns, strict=True)}
    return found


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run for each number of ranks, with tables of up to 32 files."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_plan, "RANGE_BYTES", 4096)
        for size in SIZES:
            all_of(size, lambda rank, group, size=size: write(root / str(size), rank, size, group))
    return root


def write(path: Path, rank: int, size: int, group: dist.ProcessGroup) -> None:
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, rank + 1)
    torch.nn.init.zeros_(model.bias)
    generator = torch.Generator().manual_seed(100 + rank)
    engine = sharded(rank, size)
    Saver(path, group=group).save(
        1, {"engine": engine, "model": model, "note": {"rank": "any"}, "rng": PerRank(generator)}
    )


def test_equal_tables_give_equal_bytes_at_any_world_size(runs: Path) -> None:
    alone = files_of(runs / "1" / "step_000001")
    assert len([name for name in alone if name.startswith("sparse/engine/user/")]) == 32
    for size in SIZES:
        directory = runs / str(size) / "step_000001"
        found = files_of(directory)
        each = [f"dense/rng%5B{rank}%5D.safetensors" for rank in range(size)]
        assert sorted(name for name in found if "rng" in name) == each
        assert {name: data for name, data in found.items() if "rng" not in name} == {
            name: data for name, data in alone.items() if "rng" not in name
        }
        documents = [json.loads((runs / run / "step_000001/manifest.json").read_text()) for run in ("1", str(size))]
        assert documents[1]["world_size"] == size
        assert documents[0]["parts"]["engine"] == documents[1]["parts"]["engine"]
        assert entries(runs / str(size)) == ["step_000001"]


@pytest.mark.parametrize("readers", SIZES)
@pytest.mark.parametrize("writers", SIZES)
def test_any_world_size_loads_any_checkpoint(runs: Path, writers: int, readers: int) -> None:
    expected = rows_of(sharded(0, 1))

    def read(rank: int, group: dist.ProcessGroup) -> EmbeddingEngine:
        engine, model, rng = sharded(rank, readers, filled=False, seed=3), torch.nn.Linear(2, 1), torch.Generator()
        parts: dict[str, object] = {"engine": engine, "model": model}
        if rank < writers:
            parts["rng"] = PerRank(rng)
        # All ranks must load the same parts, so the generator only if each rank has one.
        if readers <= writers:
            assert Saver(runs / str(writers), group=group).load(parts) == 1
            assert torch.equal(rng.get_state(), torch.Generator().manual_seed(100 + rank).get_state())
        else:
            assert Saver(runs / str(writers), group=group).load({"engine": engine, "model": model}) == 1
        assert model.weight.tolist() == [[1, 1]]
        assert all(table.step == 9 and table.store.seed == 0 for table in engine.tables)
        return engine

    found: dict[str, dict[int, Any]] = {name: {} for name in expected}
    for rank, engine in enumerate(all_of(readers, read)):
        for name, rows in rows_of(engine).items():
            ids = torch.tensor(list(rows), dtype=torch.int64)
            assert torch.equal(own(ids, rank, readers), ids)
            found[name] |= rows
    assert found == expected


def test_a_rank_without_its_own_part_stays_unchanged(runs: Path) -> None:
    rng = torch.Generator().manual_seed(7)
    state = rng.get_state()

    def read(rank: int, group: dist.ProcessGroup) -> None:
        saver = Saver(runs / "1", group=group)
        if rank == 0:
            saver.load({"rng": PerRank(torch.Generator())})
        else:
            with pytest.warns(UserWarning, match="part 'rng' was saved by 1 ranks and stays unchanged on rank 1"):
                saver.load({"rng": PerRank(rng)})

    all_of(2, read)
    assert torch.equal(rng.get_state(), state)
    with pytest.raises(CheckpointError, match="part 'rng' was saved per rank, .*Wrap it in PerRank"):
        Saver(runs / "2").load({"rng": rng})
    Saver(runs / "2").load({"rng[1]": rng})
    assert torch.equal(rng.get_state(), torch.Generator().manual_seed(101).get_state())


def large(rank: int, size: int) -> Shelf:
    ids = own(torch.arange(150_000) * 7919, rank, size)
    columns = {"ids": ids, "embedding": ids[:, None].float().expand(-1, 40).contiguous(), "sum": ids.double()}
    return Shelf(PartState({"t": TableState(columns, bucket_of(ids), {})}))


@pytest.mark.parametrize("range_bytes", [2**26, 2**22])
@pytest.mark.parametrize("readers", [3, 8])
def test_a_rank_reads_little_more_than_its_own_rows(
    tmp_path: Path, readers: int, range_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_plan, "RANGE_BYTES", range_bytes)
    all_of(2, lambda rank, group: Saver(tmp_path, group=group).save(1, {"shelf": large(rank, 2)}))
    total = sum(map(len, files_of(tmp_path / "step_000001").values()))
    read: list[int] = []

    def load(rank: int, group: dist.ProcessGroup) -> None:
        shelf, saver = large(rank, 2**16), Saver(tmp_path, group=group)
        shelf.state.tables["t"].columns.update({k: v[:0] for k, v in shelf.state.tables["t"].columns.items()})
        saver.load({"shelf": shelf})
        assert shelf.loaded is not None
        loaded, expected = shelf.loaded.tables["t"], large(rank, readers).state.tables["t"]
        order = expected.columns["ids"].argsort()[loaded.columns["ids"].argsort().argsort()]
        assert all(torch.equal(loaded.columns[name], column[order]) for name, column in expected.columns.items())
        assert torch.equal(loaded.buckets, expected.buckets[order])
        read.append(saver.bytes_read)

    all_of(readers, load)
    assert total > 2.5e7
    assert max(read) <= 1.2 * total / readers + 2**20
    assert sum(read) >= total


@pytest.mark.parametrize("changed", ["page", "header", "other"])
def test_partial_reads_are_verified(tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One file of two chunks; each rank reads a part of it.
    Saver(tmp_path).save(1, {"shelf": large(0, 1)})
    path = next((tmp_path / "step_000001").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    at = {"page": len(data) // 2, "header": data.index(b'"pages') + 20, "other": len(data) - 100}[changed]
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    path.write_bytes(data)

    def load(rank: int, group: dist.ProcessGroup) -> None:
        shelf = large(0, 2**16)
        Saver(tmp_path, group=group).load({"shelf": shelf})

    results = in_ranks(3, load)
    assert all(isinstance(result, CorruptCheckpoint) for result in results)
    assert all(str(path) in str(result) for result in results)
    assert all("load another step" in str(result) for result in results)
