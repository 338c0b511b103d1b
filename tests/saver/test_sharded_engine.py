"""Checkpoints of sharded tables move between any numbers of ranks and any shardings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from tests.saver.fakes import entries
from tests.support.devices import EDGE_IDS
from tests.support.rank_processes import Ranks
from tests.support.sharded_saves import (
    load_and_save,
    load_damaged,
    load_some,
    resume_from_delta,
    save_after_losing_changes,
    save_chain,
    save_in_background,
    save_wide,
)

SIZES = [1, 2, 3, 4, 8]
SHARDINGS = ["row", "table", "replicated", "mixed"]


@pytest.fixture(scope="module")
def eight() -> Iterator[Ranks]:
    """Return processes that are ranks of a group."""
    started = Ranks(timeout_s=60, ranks=8)  # few of them have a core
    yield started
    started.close()


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def runs(eight: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, Path]]:
    """Return sharding and directory of a run, by the number of ranks that wrote it."""
    found = {}
    for number, size in enumerate(SIZES):
        sharding, root = SHARDINGS[number % 4], tmp_path_factory.mktemp(f"of{size}")
        eight.run(size, save_chain, sharding, str(root))
        found[size] = sharding, root
    return found


def test_chains_hold_changes(runs: dict[int, tuple[str, Path]]) -> None:
    for size, (_, root) in runs.items():
        assert entries(root / "run") == ["step_000001", "step_000002", "step_000003"]
        last = StoredCheckpoint(root / "run", 3)
        assert last.manifest.world_size == size
        assert last.manifest.previous is not None
        assert len(StoredCheckpoint(root / "whole", 3).manifest.parts["engine"].tables["user"].ranges) >= 4
        tables = StoredCheckpoint(root / "run", 2).manifest.parts["engine"].tables
        whole = StoredCheckpoint(root / "run", 1).manifest.parts["engine"].tables
        assert all(
            (table.removed is None) == (name in ("frozen", "frozen.admission")) or table.removed is not None
            for name, table in tables.items()
        )
        assert tables["user"].removed is not None
        assert tables["user"].removed.rows >= len(EDGE_IDS)
        assert all(table.removed is None for table in whole.values())


@pytest.mark.parametrize("readers", SIZES)
@pytest.mark.parametrize("writers", SIZES)
def test_any_number_of_ranks_loads_any_checkpoint(
    eight: Ranks, runs: dict[int, tuple[str, Path]], tmp_path: Path, writers: int, readers: int
) -> None:
    root = runs[writers][1]
    sharding = SHARDINGS[(SIZES.index(writers) + SIZES.index(readers)) % 4]
    eight.run(readers, load_and_save, sharding, str(root / "run"), str(tmp_path), readers % 2 == 0)
    ours, expected = tmp_path / "step_000003", root / "whole" / "step_000003"
    assert files(ours) == files(expected)
    documents = [json.loads((place / "manifest.json").read_bytes()) for place in (ours, expected)]
    assert documents[0]["parts"] == documents[1]["parts"]


@pytest.mark.parametrize(("size", "sharding"), [(2, "mixed"), (3, "table"), (2, "replicated"), (4, "row")])
def test_training_continues_during_a_background_save(eight: Ranks, tmp_path: Path, size: int, sharding: str) -> None:
    eight.run(size, save_in_background, sharding, str(tmp_path))
    for step in (1, 2, 3):
        whole, background = StoredCheckpoint(tmp_path / "first", step), StoredCheckpoint(tmp_path / "background", step)
        for name, table in whole.read("engine").tables.items():
            other = background.read("engine").tables[name]
            assert all(torch.equal(other.columns[column], values) for column, values in table.columns.items())
        assert (background.manifest.previous is None) == (step != 3)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_resumed_run_is_bitwise_identical(eight: Ranks, tmp_path: Path, sharding: str) -> None:
    eight.run(2, resume_from_delta, sharding, str(tmp_path))
    assert files(tmp_path / "resumed") == files(tmp_path / "uninterrupted")


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_damage_changes_nothing_on_any_rank(
    eight: Ranks, runs: dict[int, tuple[str, Path]], tmp_path: Path, sharding: str
) -> None:
    root = tmp_path / "run"
    source = runs[2][1] / "whole" / "step_000003"
    for path in source.rglob("*"):
        target = root / "step_000003" / path.relative_to(source)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    path = max((root / "step_000003" / "sparse" / "engine" / "user").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last bucket, which only one rank reads if tables are sharded
    path.write_bytes(data)
    for answer in eight.run(2, load_damaged, sharding, str(root)):
        assert len(answer) == 1
        assert path.name in answer[0]


def test_a_table_is_whole_on_all_ranks_if_it_is_on_one(eight: Ranks, tmp_path: Path) -> None:
    eight.run(3, save_after_losing_changes, str(tmp_path))
    last = StoredCheckpoint(tmp_path / "run", 3)
    tables = last.manifest.parts["engine"].tables
    assert last.manifest.previous is not None
    assert {name for name, table in tables.items() if table.removed is None} == {"user"}
    eight.run(2, load_and_save, "row", str(tmp_path / "run"), str(tmp_path / "again"), False)
    assert files(tmp_path / "again" / "step_000003") == files(tmp_path / "whole" / "step_000003")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_some_tables_load_into_another_sharding(
    eight: Ranks, runs: dict[int, tuple[str, Path]], tmp_path: Path, size: int
) -> None:
    source = runs[2][1] / "whole"
    eight.run(size, load_some, "mixed", 4, str(source), str(tmp_path))
    check_some(source, tmp_path)


@pytest.mark.parametrize(
    ("writers", "sharding", "readers", "others"),
    [
        (1, "row", 2, "column"),
        (2, "row", 3, "column"),
        (3, "column", 2, "column"),
        (2, "column", 2, "mixed"),
    ],
)
def test_some_tables_load_into_a_split_by_column(
    eight: Ranks, tmp_path: Path, writers: int, sharding: str, readers: int, others: str
) -> None:
    eight.run(writers, save_wide, sharding, str(tmp_path / "one"))
    eight.run(readers, load_some, others, 16, str(tmp_path / "one"), str(tmp_path / "other"))
    check_some(tmp_path / "one", tmp_path / "other")


def check_some(source: Path, target: Path) -> None:
    expected, found = (StoredCheckpoint(root, 3).read("engine").tables for root in (source, target))
    for name, other in (("user", "best"), ("narrow", "narrow"), ("item", "user")):
        state = ("sum",) if name == "narrow" else ("exp_avg", "exp_avg_sq")
        for column in ("ids", "embedding", *state, "frequency"):
            assert len(expected[name].columns[column]) > 0
            assert torch.equal(found[other].columns[column], expected[name].columns[column]), (name, column)
