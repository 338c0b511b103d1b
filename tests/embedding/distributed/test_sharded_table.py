"""Comparison of sharded tables on several ranks with tables on one process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import optim
from recis_hybrid.checkpointing import PartState, TableState
from recis_hybrid.embedding import (
    Constant,
    EmbeddingConfig,
    EmbeddingEngine,
    MinFrequency,
    Placement,
    Unused,
    leave_out_of_ddp,
    mean_over_samples,
)
from recis_hybrid.ops.id_map import bucket_of
from tests.support import rank_processes, sharded
from tests.support.near import OF_ADAM, ROUNDINGS
from tests.support.rank_processes import Ranks
from tests.support.sharded import Job, assert_same, merged, train


@pytest.mark.quick
@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("rule", ["SGD", "Adagrad", "Adam"])
def test_one_step_agrees_with_one_process(ranks: Ranks, rule: str, deduplicate: bool) -> None:
    job = Job(rule=rule, engine={"deduplicate": deduplicate})
    one = ranks.run(1, train, Job(rule=rule))
    for world in (2, 3, 4):
        assert_same(ranks.run(world, train, job), one, OF_ADAM if rule == "Adam" else ROUNDINGS)


@pytest.mark.parametrize("sharding", ["row", "column"])
def test_records_on_disk_are_bitwise_those_in_memory(ranks: Ranks, tmp_path: Path, sharding: str) -> None:
    # Fewer records in memory than a rank has, and more than a batch uses; with Adam, 64 bytes each and the cache's 22.
    dim, records = (8, 120) if sharding == "column" else (4, 70)
    job = Job(rule="Adam", steps=12, sharding=sharding, dim=dim, samples=8, prefetch=2, engine={"prefetch_depth": 2})
    disk = Placement(blocks="disk", path=tmp_path, cache_bytes=records * 86)
    found, expected = ranks.run(2, train, replace(job, placement=disk)), ranks.run(2, train, job)
    assert all(each["evicted"] > 0 for each in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["losses"] == theirs["losses"]
        assert torch.equal(ours["predictions"], theirs["predictions"])
        for name, columns in theirs["tables"].items():
            assert [key for key in columns if not torch.equal(ours["tables"][name][key], columns[key])] == []


@pytest.mark.parametrize(
    # Each number of ranks with each setting on and off; `make agreement` tries all combinations.
    ("rule", "lr", "settings"),
    [
        ("SGD", 0.05, {2: (False, 0), 4: (True, 2)}),
        ("Adagrad", 0.05, {2: (True, 2), 4: (False, 0)}),
        ("Adam", 0.002, {2: (False, 2), 4: (True, 0)}),
    ],
)
def test_a_hundred_steps_agree_with_one_process(
    ranks: Ranks, rule: str, lr: float, settings: dict[int, tuple[bool, int]]
) -> None:
    job = Job(rule=rule, steps=100, lr=lr)
    one = ranks.run(1, train, job)
    for world, (deduplicate, ahead) in settings.items():
        options = {"deduplicate": deduplicate, "prefetch_depth": ahead}
        found = ranks.run(world, train, Job(**{**vars(job), "prefetch": ahead, "engine": options}))
        assert_same(found, one, OF_ADAM if rule == "Adam" else ROUNDINGS)


@pytest.mark.parametrize(
    "more",
    [
        {"uneven": True},
        {"clip": 0.05},
        {"accumulate": 3, "clip": 0.05},
        {"uneven": True, "accumulate": 2},
        {"sharding": "table"},
        {"sharding": "replicated", "clip": 0.05},
        {"sharding": "replicated", "uneven": True},
        {"sharding": "column", "dim": 18, "clip": 0.05},
        {"sharding": "column", "dim": 16, "uneven": True},
        {"rule": "RowwiseAdagrad", "uneven": True},
    ],
    ids=str,
)
def test_each_way_of_training_agrees_with_one_process(ranks: Ranks, more: dict[str, Any]) -> None:
    job = Job(**{"rule": "Adagrad", "steps": 3, **more})
    one = ranks.run(1, train, job)
    for world in (2, 4):
        assert_same(ranks.run(world, train, job), one, sharding=job.sharding)


@pytest.mark.parametrize(
    "more", [{}, {"uneven": True, "prefetch": 2, "engine": {"prefetch_depth": 2}}, {"sharding": "column", "dim": 16}]
)
def test_rows_on_ranks_catch_up_as_in_one_process(ranks: Ranks, more: dict[str, Any]) -> None:
    job = Job(rule="AdamL2", steps=8, lr=0.01, samples=8, settings={"weight_decay": 0.1, "exact": True}, **more)
    one = ranks.run(1, train, job)
    for world in (2, 4):
        assert_same(ranks.run(world, train, job), one, OF_ADAM, sharding=job.sharding)


@pytest.mark.parametrize("sharding", ["row", "table", "column", "replicated"])
def test_training_on_ranks_is_bitwise_repeatable(ranks: Ranks, sharding: str) -> None:
    job = Job(rule="Adam", steps=5, uneven=True, clip=0.5, sharding=sharding, dim=8)
    first, second = (ranks.run(2, train, job) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert ours["losses"] == theirs["losses"]
        for name, columns in ours["tables"].items():
            for column, values in columns.items():
                assert torch.equal(values, theirs["tables"][name][column]), (name, column)


@pytest.mark.parametrize("sharding", ["row", "column", "replicated"])
@pytest.mark.parametrize("rule", ["SGD", "Adagrad"])
def test_ranks_may_lack_gradients(ranks: Ranks, rule: str, sharding: str) -> None:
    two = ranks.run(2, sharded.train_parts, sharding, rule, 12)
    assert_same(two, ranks.run(1, sharded.train_parts, sharding, rule, 12), sharding=sharding)
    tables = 3  # trained ones: with 4 elements, with 3, and with admission
    assert all(result["watched"] <= 2 * tables for result in two)


def test_rows_are_on_the_owners_of_their_buckets(ranks: Ranks) -> None:
    results = ranks.run(4, train, Job())
    for rank, result in enumerate(results):
        for columns in result["tables"].values():
            assert (bucket_of(columns["ids"]) * 4 // 65536 == rank).all()


def clipped(group: dist.ProcessGroup) -> str:
    config = EmbeddingConfig(dim=8, sharding="column")
    engine = EmbeddingEngine({"id": config}, group=group)
    engine({"id": torch.arange(3)})["id"].sum().backward()
    with pytest.raises(ValueError, match="rows of the table id are split by column over ranks") as caught:
        optim.clip_row_norm_(engine.parameters(), 1.0)
    return str(caught.value)


def test_clipping_rows_split_by_column_is_refused(ranks: Ranks) -> None:
    assert all("or torch.nn.utils.clip_grad_norm_" in text for text in ranks.run(2, clipped))


def owned_tables(group: dist.ProcessGroup) -> dict[str, int]:
    names = {f"t{k}": EmbeddingConfig(dim=2, sharding="table") for k in range(5)}
    engine = EmbeddingEngine(names, group=group)
    engine({name: torch.arange(10 * dist.get_rank(group), 10 * dist.get_rank(group) + 12) for name in names})
    assert len(engine.tables) == 1
    return {name: len(columns["ids"]) for name, columns in sharded.rows_of(engine).items()}


def test_a_table_wise_table_is_on_one_rank(ranks: Ranks) -> None:
    found = ranks.run(2, owned_tables)
    for name in found[0]:
        assert sorted(rows[name] for rows in found) == [0, 22]
    assert {sum(rows.values()) // 22 for rows in found} == {2, 3}


def reduced(group: dist.ProcessGroup, reduce: str, sharding: str) -> dict[int, float]:
    """Return the gradient of each row: by SGD with lr 1 from 0, with ids [1, 1, 2] on rank 0 and [2] on rank 1."""
    engine = EmbeddingEngine(
        {"id": EmbeddingConfig(dim=8, initializer=Constant(0.0), sharding=sharding)}, group=group, reduce=reduce
    )
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    ids = [[1, 1, 2], [2]][dist.get_rank(group)]
    engine({"id": torch.tensor(ids)})["id"].sum(1).mean().backward()
    optimizer.step()
    columns = sharded.rows_of(engine)["id"]
    assert (columns["embedding"] == columns["embedding"][:, :1]).all()
    return dict(zip(columns["ids"].tolist(), (-columns["embedding"][:, 0]).tolist(), strict=True))


@pytest.mark.parametrize("sharding", ["row", "column", "replicated"])
@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", {1: 2 / 4, 2: 2 / 4}),  # each of the four samples has the same weight
        ("sum", {1: 2 / 3, 2: 1 / 3 + 1}),
        ("id", {1: 2 / 3, 2: (1 / 3 + 1) / 2}),  # two ranks have the id 2
    ],
)
def test_reduce_combines_the_gradients_of_ranks(
    ranks: Ranks, reduce: str, expected: dict[int, float], sharding: str
) -> None:
    results = ranks.run(2, reduced, reduce, sharding)
    rows = {key: value for result in results for key, value in result.items()}
    assert rows == pytest.approx(expected, rel=1e-6)


def admitted(group: dist.ProcessGroup, steps: list[list[list[int]]]) -> list[list[int]]:
    """Return the ids that have a row on any rank after each step, from each rank's ids."""
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1, admission=MinFrequency(4))}, group=group)
    found = []
    for step in steps:
        engine({"id": torch.tensor(step[dist.get_rank(group)], dtype=torch.int64)})
        rows: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(rows, sharded.rows_of(engine)["id"]["ids"].tolist(), group=group)
        found.append(sorted(key for each in rows for key in each))
    return found


def test_admission_counts_the_lookups_of_all_ranks(ranks: Ranks) -> None:
    steps = [[[1, 1, 2], [1, 3]], [[2, 2], [3, 3, 1]], [[], [2, 3]]]
    expected = [[], [1], [1, 2, 3]]
    assert ranks.run(2, admitted, steps) == [expected, expected]
    assert ranks.run(1, admitted, [[first + second] for first, second in steps]) == [expected]


def functional(group: dist.ProcessGroup, uneven: bool) -> dict[str, Any]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine(sharded.configs(), optimizer=sharded.OPTIMIZERS["Adagrad"], seed=3, group=group)
    optimizer = optim.Adagrad(engine.parameters(), lr=0.1)
    cuts = sharded.shares(24, ranks, uneven)
    for step in range(3):
        batch = sharded.part_of(sharded.global_batch(step), cuts[rank], cuts[rank + 1])
        values, ctx = engine.lookup(batch)
        own_samples = max(cuts[rank + 1] - cuts[rank], 1)
        engine.apply_gradients(ctx, {name: (value - 0.3) / own_samples for name, value in values.items()}, optimizer)
    return {"losses": [], "tables": sharded.rows_of(engine), "predictions": torch.zeros(0)}


@pytest.mark.parametrize("uneven", [False, True])
def test_the_functional_core_agrees_with_one_process(ranks: Ranks, uneven: bool) -> None:
    one = ranks.run(1, functional, False)
    for world in (2, 4):
        assert_same(ranks.run(world, functional, uneven), one)


@pytest.mark.parametrize(("sharding", "dim"), [("row", 4), ("column", 19)])
def test_first_values_do_not_depend_on_the_ranks(ranks: Ranks, sharding: str, dim: int) -> None:
    job = Job(lr=0.0, sharding=sharding, dim=dim)
    one, two, four = (
        merged(ranks.run(world, train, job), sharding="row" if world == 1 else sharding) for world in (1, 2, 4)
    )
    del one["narrow"]  # its own optimizer has a learning rate
    for name, columns in one.items():
        assert torch.equal(two[name]["embedding"], columns["embedding"])
        assert torch.equal(four[name]["embedding"], columns["embedding"])


def with_ddp(group: dist.ProcessGroup, uneven: bool) -> dict[str, Any]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine(sharded.configs(), seed=3, group=group)
    model = sharded.Model(engine, sum(config.width for config in engine.configs.values()) + 4)
    tower, step_model = model.tower, model
    if ranks > 1:
        leave_out_of_ddp(model)
        step_model = DistributedDataParallel(model, process_group=group)  # type: ignore[assignment]
        if uneven:
            step_model.register_comm_hook(engine, mean_over_samples)
    optimizers = [optim.SGD(engine.parameters(), lr=0.1), torch.optim.SGD(tower.parameters(), lr=0.1)]
    cuts = [0, 5, 24] if uneven and ranks == 2 else sharded.shares(24, ranks, False)
    for step in range(4):
        batch = sharded.part_of(sharded.global_batch(step), cuts[rank], cuts[rank + 1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        (step_model(batch) - batch["label"]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for optimizer in optimizers:
            optimizer.step()
    tables = {**sharded.rows_of(engine)}
    if rank == 0:
        tables["tower"] = {"ids": torch.arange(tower.weight.numel()), "embedding": tower.weight.detach().view(-1)}
    else:
        tables["tower"] = {"ids": torch.arange(0), "embedding": torch.zeros(0)}
    return {"losses": [], "tables": tables, "predictions": torch.zeros(0)}


@pytest.mark.parametrize("uneven", [False, True])
def test_towers_in_ddp_and_tables_use_the_same_mean(ranks: Ranks, uneven: bool) -> None:
    assert_same(ranks.run(2, with_ddp, uneven), ranks.run(1, with_ddp, uneven))


@pytest.mark.parametrize(("depth", "sharding"), [(1, "row"), (3, "column")])
def test_prefetched_ids_change_no_result(ranks: Ranks, depth: int, sharding: str) -> None:
    job = Job(rule="Adam", steps=6, uneven=True, accumulate=2, sharding=sharding, dim=8)
    ahead = Job(**{**vars(job), "prefetch": depth, "engine": {"prefetch_depth": depth}})
    for ours, theirs in zip(ranks.run(2, train, ahead), ranks.run(2, train, job), strict=True):
        assert ours["losses"] == theirs["losses"]
        for name, columns in ours["tables"].items():
            assert all(torch.equal(values, theirs["tables"][name][column]) for column, values in columns.items())
    off = Job(**{**vars(job), "prefetch": depth, "engine": {"prefetch_depth": 0}})  # nothing is sent ahead
    assert ranks.run(2, train, off)[0]["losses"] == ranks.run(2, train, job)[0]["losses"]


def test_prefetched_rows_miss_one_update(ranks: Ranks) -> None:
    job = Job(steps=4)
    stale = Job(steps=4, prefetch=2, engine={"prefetch_depth": 2, "staleness": 1})
    fresh, old = (ranks.run(2, train, each)[0]["losses"] for each in (job, stale))
    again = ranks.run(2, train, stale)[0]["losses"]
    assert old[0] == fresh[0]
    assert old[1:] != fresh[1:]
    assert again == old
    for ours, theirs in zip(old, fresh, strict=True):
        assert abs(ours - theirs) < 0.5 * theirs


def misused(group: dist.ProcessGroup) -> list[str]:
    """Return the errors of wrong uses of prefetch, the same on every rank."""
    config = {"id": EmbeddingConfig(dim=2)}
    engine = EmbeddingEngine(
        config, group=group, prefetch_depth=2, prefetch_group=rank_processes.AHEAD.get(dist.get_world_size(group))
    )
    first, second = ({"id": torch.arange(k, k + 3)} for k in range(2))
    said = []

    def refused(action: Callable[[], object]) -> None:
        with pytest.raises(RuntimeError) as caught:
            action()
        said.append(str(caught.value))

    with pytest.raises(ValueError, match="pass it as prefetch_group"):
        EmbeddingEngine(config, group=group, prefetch_depth=2)
    engine.prefetch(first)
    engine.prefetch(second)
    refused(lambda: engine.prefetch({"id": torch.arange(3)}))
    refused(lambda: engine(second))
    refused(lambda: engine.eval()(first))
    engine.train()
    refused(engine.prefetch_rows)
    apart = engine({"id": torch.arange(4)})["id"]  # a lookup between, of a batch that was not prefetched
    assert not engine.has_read(first)
    expected = engine(dict(first))["id"]
    assert torch.equal(expected, apart[:3])
    assert engine.has_read(first)
    assert torch.equal(engine(second)["id"][:2], expected[1:])
    assert torch.equal(engine(first)["id"], expected)
    return said


def too_old(group: dist.ProcessGroup) -> str:
    """Let two steps pass between the lookup of a batch's rows and its turn."""
    engine = EmbeddingEngine(
        {"id": EmbeddingConfig(dim=2)},
        group=group,
        prefetch_depth=1,
        staleness=1,
        prefetch_group=rank_processes.AHEAD.get(dist.get_world_size(group)),
    )
    optimizer = optim.SGD(engine.parameters(), lr=0.1)
    batch = {"id": torch.arange(3)}
    for steps in (1, 2):
        engine.prefetch(batch)
        engine.prefetch_rows()
        for _ in range(steps):
            optimizer.step()
        if steps == 1:
            engine(batch)
    with pytest.raises(RuntimeError) as caught:
        engine(batch)
    return str(caught.value)


def test_rows_older_than_the_staleness_are_refused(ranks: Ranks) -> None:
    for said in ranks.run(2, too_old):
        assert "the rows of the batch are 2 steps old, and staleness=1; call prefetch_rows no earlier" in said


def test_misuse_of_prefetch_is_refused(ranks: Ranks) -> None:
    for said in ranks.run(2, misused):
        assert "2 batches are on their way, and prefetch_depth=2" in said[0]
        assert "in the order in which they were prefetched" in said[1]
        assert "prefetched with (training, gradients) = (True, True) and comes with (False, True)" in said[2]
        assert "build the engine with staleness=1" in said[3]


def scaled(group: dist.ProcessGroup, broken: int) -> dict[str, Any]:
    """Train with loss scaling and a gradient that is infinite in one step on one rank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, initializer=Constant(1.0))}, group=group, reduce="sum")
    optimizer = optim.SGD(engine.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scales = []
    for step in range(4):
        optimizer.zero_grad()
        parts = [rank] if ranks == 2 else [0, 1]
        for part in parts:
            values = engine({"id": torch.arange(5 * part, 5 * part + 8)})["id"]
            factor = torch.inf if step == broken and part == 1 else 0.1
            scaler.scale((values * values * factor).sum()).backward()
        if step % 2:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(engine.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {"losses": scales, "tables": sharded.rows_of(engine), "predictions": torch.zeros(0)}


@pytest.mark.parametrize("broken", [1, 2, -1])
def test_gradient_scaling_agrees_on_all_ranks(ranks: Ranks, broken: int) -> None:
    two, one = ranks.run(2, scaled, broken), ranks.run(1, scaled, broken)
    assert two[0]["losses"] == two[1]["losses"]
    assert_same(two, one)


def evicted(group: dist.ProcessGroup) -> dict[str, Any]:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine(sharded.configs(), optimizer=sharded.OPTIMIZERS["Adagrad"], group=group)
    optimizer = optim.Adagrad(engine.parameters(), lr=0.1)
    cuts = sharded.shares(24, ranks, False)
    for step in range(6):
        batch = sharded.part_of(sharded.global_batch(step, ids=200), cuts[rank], cuts[rank + 1])
        loss = sum(value.square().sum() for value in engine(batch).values())
        assert isinstance(loss, torch.Tensor)
        (loss / (cuts[rank + 1] - cuts[rank])).backward()
        if step == 2:
            with pytest.raises(RuntimeError, match="detach pending gradients"):
                engine.evict(Unused(1))
        optimizer.step()
        engine.evict(Unused(2))
        if step == 3:
            engine.compact()
    return {"losses": [], "tables": sharded.rows_of(engine), "predictions": torch.zeros(0)}


def test_ranks_evict_the_same_rows_as_one_process(ranks: Ranks) -> None:
    assert_same(ranks.run(2, evicted), ranks.run(1, evicted))


def evicted_in_parts(group: dist.ProcessGroup) -> dict[str, Any]:
    """Return the rows after two evictions, whose shares come between the steps, and a compaction."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine(sharded.configs(), optimizer=sharded.OPTIMIZERS["Adagrad"], group=group)
    optimizer = optim.Adagrad(engine.parameters(), lr=0.1)
    cuts = sharded.shares(24, ranks, False)
    eviction, compaction = None, None
    for step in range(9):
        batch = sharded.part_of(sharded.global_batch(step, ids=200), cuts[rank], cuts[rank + 1])
        loss = sum(value.square().sum() for value in engine(batch).values())
        assert isinstance(loss, torch.Tensor)
        (loss / (cuts[rank + 1] - cuts[rank])).backward()
        if step == 3:
            assert eviction is not None
            with pytest.raises(RuntimeError, match="detach pending gradients"):
                next(eviction)
        optimizer.step()
        if step in (2, 6):
            eviction = engine.evict(Unused(2), rows_per_call=400)
            compaction = engine.compact(rows_per_call=50)
        if eviction is not None and compaction is not None:
            next(eviction, None)
            next(compaction, None)
    assert eviction is not None
    return {"losses": [], "tables": sharded.rows_of(engine), "predictions": torch.zeros(0)}


def test_ranks_evict_the_same_rows_in_parts_as_one_process(ranks: Ranks) -> None:
    assert_same(ranks.run(2, evicted_in_parts), ranks.run(1, evicted_in_parts))


def freed(group: dist.ProcessGroup) -> list[bool]:
    """Return whether tables are freed with the engine, without the garbage collector."""
    gc.disable()
    try:
        engine = EmbeddingEngine(sharded.configs(), group=group)
        optimizer = optim.SGD(engine.parameters(), lr=0.1)
        loss = sum(value.sum() for value in engine(sharded.global_batch(0)).values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        engine(sharded.global_batch(1))
        tables = [weakref.ref(table) for table in engine.tables]
        del engine, optimizer, loss
        return [table() is None for table in tables]
    finally:
        gc.enable()


def test_tables_are_freed_with_their_engine(ranks: Ranks) -> None:
    for are_freed in ranks.run(2, freed):
        assert all(are_freed)


def dropped(group: dist.ProcessGroup) -> list[int]:
    """Return the number of watched lookups after many without a step, of which one is still referenced, and finally."""
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1, initializer=Constant(0.0))}, group=group, reduce="sum")
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    referenced = engine({"id": torch.tensor([7])})["id"]
    for step in range(150):
        values = engine({"id": torch.arange(3)})["id"]
        if step < 100 and dist.get_rank(group) == 0:
            values.sum().backward()
    before = sharded.watched(engine)
    referenced.sum().backward()
    optimizer.step()
    del referenced, values
    engine({"id": torch.tensor([7])})["id"].sum().backward()
    optimizer.step()
    columns = sharded.rows_of(engine)["id"]
    rows = dict(zip(columns["ids"].tolist(), columns["embedding"][:, 0].tolist(), strict=True))
    assert all(value == -4.0 if key == 7 else value == -100.0 for key, value in rows.items()), rows
    return [before, sharded.watched(engine)]


def test_lookups_without_a_step_are_dropped(ranks: Ranks) -> None:
    for before, after in ranks.run(2, dropped):
        assert before <= 65
        assert after <= 2


def saved(
    group: dist.ProcessGroup, sharding: str, dim: int, state: list[PartState] | None
) -> tuple[PartState, dict[str, Any]]:
    """Train two steps, starting from a state if there is one."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine(
        sharded.configs(sharding, dim), optimizer=sharded.OPTIMIZERS["Adagrad"], seed=3, group=group
    )
    optimizer = optim.Adagrad(engine.parameters(), lr=0.1)
    if state is not None:
        engine.load_checkpoint_state(whole(state))
    cuts = sharded.shares(24, ranks, False)
    for step in range(2):
        batch = sharded.part_of(sharded.global_batch(step + 2 * (state is not None)), cuts[rank], cuts[rank + 1])
        loss = sum(value.square().sum() for value in engine(batch).values())
        assert isinstance(loss, torch.Tensor)
        (loss / (cuts[rank + 1] - cuts[rank])).backward()
        optimizer.step()
    found = engine.checkpoint_state()
    for table in found.tables.values():
        assert torch.equal(table.buckets, bucket_of(table.columns["ids"]))
    return found, {
        "losses": [],
        "tables": {name: table.columns for name, table in found.tables.items()},
        "predictions": torch.zeros(0),
    }


def whole(states: list[PartState]) -> PartState:
    """Return the rows that all ranks export, checking that there are no duplicates."""
    tables = {}
    for name, first in states[0].tables.items():
        columns = {
            column: torch.cat([state.tables[name].columns[column] for state in states]) for column in first.columns
        }
        assert columns["ids"].unique().numel() == columns["ids"].numel()
        tables[name] = TableState(columns, bucket_of(columns["ids"]), first.meta)
    assert all(state.meta == states[0].meta for state in states)
    return PartState(tables=tables, meta=states[0].meta)


@pytest.mark.parametrize(("sharding", "dim"), [("row", 4), ("table", 4), ("column", 18), ("replicated", 4)])
def test_state_is_loaded_by_any_number_of_ranks(ranks: Ranks, sharding: str, dim: int) -> None:
    first = ranks.run(1, saved, "row", dim, None)
    expected = ranks.run(1, saved, "row", dim, [state for state, _ in first])
    two = ranks.run(2, saved, sharding, dim, None)
    assert_same([result for _, result in two], [result for _, result in first])
    states = [state for state, _ in two]
    for world, other in ((1, "row"), (2, sharding), (3, "row"), (4, sharding)):
        results = ranks.run(world, saved, other, dim, states)
        assert_same([result for _, result in results], [result for _, result in expected])
