"""Loads into tables that differ from those saved; a damaged file leaves them unchanged."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Placement
from recis_hybrid.saver import CheckpointMismatch, CorruptCheckpoint, Saver
from recis_hybrid.saver.checkpoint import table_plan
from tests.saver.fakes import edit_manifest
from tests.saver.test_world_sizes import member, rows_of, sharded


def column(engine: EmbeddingEngine, table: str, name: str) -> torch.Tensor:
    """Return a column, by ascending id."""
    state = engine.checkpoint_state().tables[table]
    return state.columns[name][state.columns["ids"].argsort()]


def engine(optimizer: Any = optim.Adam, **options: Any) -> EmbeddingEngine:
    common = {"dtype": options.pop("dtype", torch.float32), "placement": options.pop("placement", None)}
    query: dict[str, Any] = options.pop("query", {"admission": MinFrequency(3)})
    return EmbeddingEngine(
        {
            "user": EmbeddingConfig(dim=4, **common),
            "item": EmbeddingConfig(dim=4, **common),
            "query": EmbeddingConfig(dim=3, **common, **query),
        },
        optimizer=optimizer,
        **options,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    Saver(path).save(1, {"engine": sharded(0, 1)})
    return path


@pytest.mark.parametrize(
    "options", [{"coalesce": False}, {"seed": 4}, {"placement": Placement(id_map="cpu", blocks="cpu")}]
)
def test_coalescing_seed_and_placement_do_not_matter(run: Path, options: dict[str, Any]) -> None:
    live = engine(**options)
    Saver(run).load({"engine": live})
    assert rows_of(live) == rows_of(sharded(0, 1))
    # New ids start with the same values as in the saved run.
    batch = {name: torch.tensor([777_777]) for name in ("user", "item", "query")}
    assert all(torch.equal(live(batch)[name], value) for name, value in sharded(0, 1)(batch).items())


def test_values_are_converted_to_another_dtype(run: Path) -> None:
    live, saved = engine(dtype=torch.bfloat16), sharded(0, 1)
    with pytest.warns(UserWarning, match="tables of another kind.*'embedding': checkpoint float32.*bfloat16") as caught:
        Saver(run).load({"engine": live})
    assert len(caught) == 1
    for table in ("user", "item", "query"):
        assert torch.equal(column(live, table, "embedding"), column(saved, table, "embedding").bfloat16())
        assert torch.equal(column(live, table, "exp_avg"), column(saved, table, "exp_avg"))
        assert torch.equal(column(live, table, "frequency"), column(saved, table, "frequency"))


def test_another_optimizer_loads_common_state_and_starts_the_rest(run: Path) -> None:
    live, saved = engine(optim.Adagrad), sharded(0, 1)
    with pytest.warns(UserWarning, match="'exp_avg' is in the checkpoint only.*'sum' is in the live object only"):
        Saver(run).load({"engine": live})
    assert torch.equal(column(live, "user", "embedding"), column(saved, "user", "embedding"))
    assert torch.equal(column(live, "user", "seen_step"), column(saved, "user", "seen_step"))
    first = optim.Adagrad.row_state()[0].first_value
    assert (column(live, "user", "sum") == first).all()
    # And back: Adam's moments start fresh, sums are dropped.
    Saver(run / "adagrad").save(1, {"engine": live})
    again = engine()
    with pytest.warns(UserWarning, match="starts with its first value"):
        Saver(run / "adagrad").load({"engine": again})
    assert torch.equal(column(again, "user", "embedding"), column(saved, "user", "embedding"))
    assert (column(again, "user", "exp_avg") == 0).all()


def test_state_of_another_width_starts_fresh(run: Path, tmp_path: Path) -> None:
    Saver(tmp_path).save(1, {"engine": engine(optim.RowwiseAdagrad)})
    live = engine(optim.Adagrad)
    with pytest.warns(UserWarning, match="'sum': checkpoint float32 .1., live object float32 .4."):
        Saver(tmp_path).load({"engine": live})


def test_another_admission_warns(run: Path) -> None:
    live = engine(query={})
    with pytest.warns(UserWarning, match="table 'query.admission' is in the checkpoint only"):
        Saver(run).load({"engine": live})
    assert torch.equal(column(live, "query", "embedding"), column(sharded(0, 1), "query", "embedding"))


def test_another_width_is_refused(run: Path) -> None:
    live = EmbeddingEngine({"user": EmbeddingConfig(dim=5), "other": EmbeddingConfig(dim=3)})
    with pytest.raises(CheckpointMismatch) as caught:
        Saver(run).load({"engine": live})
    for text in (
        "table 'user', column 'embedding': checkpoint float32 [4], live object float32 [5]",
        "table 'item' is in the checkpoint only (ids int64 []",
        "table 'other' is in the live object only (ids int64 []",
    ):
        assert text in str(caught.value)
    assert len(live.tables[0]) == 0


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("number", [0, -1])
def test_a_damaged_file_leaves_the_tables_unchanged(
    tmp_path: Path, filled: bool, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_plan, "RANGE_BYTES", 4096)
    Saver(tmp_path).save(1, {"engine": sharded(0, 1)})
    path = sorted((tmp_path / "step_000001").rglob("*.safetensors"))[number]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    live = engine(seed=8)
    if filled:
        table, item = member(live, "item")
        table.insert(item, torch.tensor([5, 6]), {"embedding": torch.ones(2, 4)})
    before = rows_of(live)
    with pytest.raises(CorruptCheckpoint, match=path.name):
        Saver(tmp_path).load({"engine": live})
    assert rows_of(live) == before
    assert (len(live.tables[0]), live.tables[0].store.seed) == (2 if filled else 0, 8)


@pytest.mark.parametrize("rows", [2**60, 2**33])
def test_false_row_counts_allocate_no_memory(run: Path, tmp_path: Path, rows: int) -> None:
    shutil.copytree(run, tmp_path / "run")

    def lie(document: dict[str, Any]) -> None:
        table = document["parts"]["engine"]["tables"]["user"]
        table["rows"] = table["ranges"][0]["rows"] = rows

    edit_manifest(tmp_path / "run" / "step_000001", lie)
    live = engine()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpoint, match="part 'engine', table 'user'"):
        Saver(tmp_path / "run").load({"engine": live})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert all(len(table) == 0 for table in live.tables)


def test_state_loaded_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    def step(model: torch.nn.Linear, dense: torch.optim.Optimizer) -> None:
        model(torch.ones(1, 2)).sum().backward()
        dense.step()
        dense.zero_grad()

    found = []
    for within in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        dense = torch.optim.Adam(model.parameters(), lr=0.1)
        saver = Saver(tmp_path / str(within), async_save=True)
        step(model, dense)
        with torch.inference_mode(within):
            saver.save(1, {"model": model, "dense": dense})
        step(model, dense)
        saver.save(2, {"model": model, "dense": dense})  # reuses the memory of the first copy
        model = torch.nn.Linear(2, 2)
        dense = torch.optim.Adam(model.parameters())
        with torch.inference_mode(within):
            assert saver.load({"model": model, "dense": dense}) == 2
        step(model, dense)
        with torch.inference_mode(within):
            saver.load_some({"model": model}, 1, only="weight")
        step(model, dense)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
