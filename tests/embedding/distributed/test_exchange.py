"""Messages between ranks: their sizes and dtypes, and failures of a rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, ExchangeError, Normal
from tests.support import rank_processes, sharded
from tests.support.near import assert_near
from tests.support.rank_processes import Ranks
from tests.support.sharded import Job, assert_same, train

TIMEOUT_S = 4.0


def some_engine(group: dist.ProcessGroup | None, dim: int = 8, **more: Any) -> EmbeddingEngine:
    names = ("user", "item")
    config = EmbeddingConfig(dim=dim, initializer=Normal(0, 0.1))
    return EmbeddingEngine(dict.fromkeys(names, config), group=group, **more)


def sent(group: dist.ProcessGroup, dim: int, wire: torch.dtype) -> dict[str, int]:
    """Return the bytes that this rank sent in one step, and its number of distinct ids owned by other ranks."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = some_engine(group, dim, wire_dtype=wire)
    optimizer = optim.SGD(engine.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    batch = {name: torch.randint(0, 1500, (2000,), generator=generator) for name in ("user", "item")}
    engine(batch)  # the first lookup also compares the ranks' settings
    before = engine.traffic.total
    sum(value.sum() for value in engine(batch).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    unique = [column.unique() for column in batch.values()]
    remote = sum(int((distinct_owner(ids, ranks) != rank).sum()) for ids in unique)
    return {"bytes": engine.traffic.total - before, "unique": remote, "ids": engine.traffic.ids}


def distinct_owner(ids: torch.Tensor, ranks: int) -> torch.Tensor:
    from recis_hybrid.ops.id_map import bucket_of

    return bucket_of(ids) * ranks // 65536


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_on_the_wire_match_distinct_ids(ranks: Ranks, dim: int, wire: torch.dtype) -> None:
    for world in (2, 4):
        results = ranks.run(world, sent, dim, wire)
        total, unique = (sum(result[key] for result in results) for key in ("bytes", "unique"))
        assert total <= 1.1 * unique * (8 + 2 * wire.itemsize * dim)
        assert total >= unique * (8 + 2 * wire.itemsize * dim)
        assert sum(result["ids"] for result in results) == 2 * 8 * unique  # 64 bits, regardless of the wire dtype


def sent_by_column(group: dist.ProcessGroup, dim: int) -> dict[str, int]:
    rank = dist.get_rank(group)
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=dim, sharding="column")}, group=group)
    optimizer = optim.SGD(engine.parameters(), lr=0.1)
    batch = {"id": torch.randint(0, 500, (600,), generator=torch.Generator().manual_seed(rank))}
    engine(batch)["id"].sum().backward()
    optimizer.step()
    traffic = engine.traffic
    return {"unique": batch["id"].unique().numel(), "ids": traffic.ids, "vectors": traffic.rows + traffic.gradients}


@pytest.mark.parametrize("world", [2, 4])
def test_column_sharding_sends_ids_to_all_ranks_and_elements_once(ranks: Ranks, world: int) -> None:
    results = ranks.run(world, sent_by_column, 32)
    unique, ids, vectors = (sum(result[key] for result in results) for key in ("unique", "ids", "vectors"))
    assert ids == (world - 1) * 8 * unique
    assert vectors == 2 * 4 * 32 * unique * (world - 1) / world  # as by row


def wired(group: dist.ProcessGroup, wire: torch.dtype) -> dict[str, torch.Tensor]:
    engine = some_engine(group, 16, wire_dtype=wire)
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    ids = torch.arange(300)
    generator = torch.Generator().manual_seed(5)
    values = engine({"user": ids, "item": ids})["user"]
    gradient = torch.randn(values.shape, generator=generator) * 10.0 ** torch.randint(-3, 3, (300, 1))
    values.backward(gradient)
    before = {name: columns["embedding"].clone() for name, columns in sharded.rows_of(engine).items()}
    optimizer.step()
    after = sharded.rows_of(engine)["user"]
    return {
        "values": values.detach(),
        "gradient": gradient,
        "ids": after["ids"],
        "stored": before["user"],
        "applied": before["user"] - after["embedding"],
    }


@pytest.mark.parametrize(("wire", "error"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_narrow_wires_round_rows_and_gradients_once(ranks: Ranks, wire: torch.dtype, error: float) -> None:
    torch.manual_seed(0)
    results = ranks.run(2, wired, wire)
    ids = torch.cat([result["ids"] for result in results])
    stored = torch.cat([result["stored"] for result in results])[ids.argsort()]
    assert torch.equal(results[0]["values"], stored.to(wire).float())
    applied = torch.cat([result["applied"] for result in results])[ids.argsort()]
    # The mean is half of each rank's gradient. Each is rounded once, and their sum has a few roundings of float32.
    expected = sum(result["gradient"] / 2 for result in results)
    each = sum((result["gradient"] / 2).abs() for result in results)
    finest = torch.finfo(wire).smallest_normal * torch.finfo(wire).eps
    assert ((applied - expected).abs() <= error * each + finest + 2.0**-21 * (stored.abs() + each)).all()


@pytest.mark.parametrize("sharding", ["row", "column"])
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_wires_train(ranks: Ranks, wire: torch.dtype, sharding: str) -> None:
    job = Job(rule="Adagrad", steps=5, engine={"wire_dtype": wire}, sharding=sharding, dim=8)
    one = ranks.run(1, train, Job(rule="Adagrad", steps=5, dim=8))
    two = ranks.run(2, train, job)
    with pytest.raises(AssertionError):
        assert_same(two, one, sharding=sharding)
    assert_near(two[0]["losses"], one[0]["losses"], 0.02 / torch.finfo(torch.float32).eps)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="reduce must be one of"):
        EmbeddingEngine({"a": EmbeddingConfig(dim=1)}, reduce="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"wire_dtype must be one of .*got torch.int8"):
        EmbeddingEngine({"a": EmbeddingConfig(dim=1)}, wire_dtype=torch.int8)
    with pytest.raises(ValueError, match="sharding must be one of"):
        EmbeddingConfig(dim=1, sharding="columns")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected_rows must be at least 1, got 0"):
        EmbeddingConfig(dim=1, expected_rows=0)


def outside(group: dist.ProcessGroup) -> str:
    """Return the error of building an engine on a rank outside of the group."""
    if dist.get_rank(group) > 1:
        return ""
    try:
        EmbeddingEngine({"a": EmbeddingConfig(dim=1)}, group=dist.GroupMember.NON_GROUP_MEMBER)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_rank_outside_of_the_group_gets_an_error(ranks: Ranks) -> None:
    assert all("is not in the process group" in text for text in ranks.run(2, outside))


def failing(group: dist.ProcessGroup) -> list[str]:
    """Return this rank's errors for each mistake of rank 1; the group stays usable."""
    rank, messages = dist.get_rank(group), []

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
            messages.append("no error")
        except (ExchangeError, KeyError) as error:
            messages.append(f"{type(error).__name__}: {error}")

    engine = some_engine(group)
    batch = {"user": torch.arange(5), "item": torch.arange(5)}
    attempt(lambda: engine(batch if rank == 0 else {"user": torch.arange(5)}))
    engine.train(rank == 0)
    attempt(lambda: engine(batch))
    engine.train()
    attempt(lambda: engine(batch))
    ahead = some_engine(group, prefetch_depth=1, prefetch_group=rank_processes.AHEAD.get(dist.get_world_size(group)))
    incomplete = batch if rank == 0 else {"user": torch.arange(5)}
    ahead.prefetch(incomplete)
    attempt(lambda: ahead(incomplete))
    ahead.prefetch(batch)
    attempt(lambda: ahead(batch))
    other = some_engine(group, seed=rank)
    attempt(lambda: other(batch))
    attempt(lambda: engine(batch))
    return messages


def test_an_error_of_one_rank_reaches_all_ranks(ranks: Ranks) -> None:
    first, second = ranks.run(2, failing)
    assert "rank 0: ranks [1] failed to look up the batch" in first[0]
    assert second[0].startswith("KeyError: \"feature 'item': the batch has no column 'item'")
    assert "must look up in the same mode, got {0: 'training', 1: 'evaluation'}" in first[1]
    assert "must look up in the same mode" in second[1]
    assert "failed to look up the batch" in first[3]
    assert second[3].startswith("KeyError")
    assert "the engines of ranks [1] have different features, tables, seeds or settings" in first[5]
    assert "the engines of ranks [0]" in second[5]
    assert [messages[k] for messages in (first, second) for k in (2, 4, 6)] == ["no error"] * 6


@pytest.fixture
def two_ranks() -> Iterator[Ranks]:
    """Two ranks that a test may kill."""
    started = Ranks(TIMEOUT_S, ranks=2)
    yield started
    started.close()


def breaking(group: dist.ProcessGroup, where: str, how: str) -> tuple[str, float]:
    """Let rank 1 die or raise during an exchange; return rank 0's error, and the seconds until then."""
    rank = dist.get_rank(group)
    engine = some_engine(group)
    optimizer = optim.SGD(engine.parameters(), lr=0.1)
    batch = {"user": torch.arange(5), "item": torch.arange(5)}

    def step() -> None:
        sum(value.sum() for value in engine(batch).values()).backward()  # type: ignore[union-attr]
        optimizer.step()

    step()
    dist.barrier(group)
    if rank == 1:
        exchange = engine._sharded.exchange  # type: ignore[union-attr]
        start = exchange.start

        def broken(what: Any, *args: Any) -> Any:
            if what == where and how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == where:
                raise MemoryError(where)
            return start(what, *args)

        exchange.start = broken  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        step()
    except (ExchangeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "no error", 0.0


@pytest.mark.parametrize(("where", "how"), [("rows", "die"), ("gradients", "die"), ("gradients", "raise")])
def test_losing_a_rank_raises_on_the_others(two_ranks: Ranks, where: str, how: str) -> None:
    two_ranks.start(2, breaking, where, how)
    (message, seconds), lost = two_ranks.results(2)
    assert f"the exchange of {where} between embedding tables failed: another rank has died" in message
    assert seconds < TIMEOUT_S + 3
    if how == "die":
        assert "has died" in str(lost)
    else:
        assert lost[0] == "MemoryError: gradients"
