"""Waits of the host for the device in training, counted on the emulated device as CUDA waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import Constant, EmbeddingConfig, EmbeddingEngine, exchange_gradients
from recis_hybrid.embedding.distributed import exchange
from recis_hybrid.embedding.table.blocks import EmbeddingBlocks
from recis_hybrid.ragged import RaggedTensor
from tests.support import emulated
from tests.support.rank_processes import Ranks

pytestmark = pytest.mark.emulated
ON = "emulated"
LISTS = RaggedTensor.from_lists([[1, 2, 3], [], [4], [2, 9]])
WEIGHTS = RaggedTensor.from_lists([[1.0, 0.5, 2.0], [], [3.0], [0.5, 0.25]])
DEEP = RaggedTensor.from_lists([[[1, 2, 3], []], [[4, 5]], []])


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: torch.tensor([1, 2], device=ON), 1),
        (lambda x: torch.zeros(3).to(ON), 1),
        (lambda x: torch.zeros(3).to(ON, non_blocking=True), 0),
        (lambda x: torch.zeros(3, pin_memory=True).to(ON, non_blocking=True), 0),
        (lambda x: x.cpu(), 1),
        (lambda x: int(x[0]), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.index_put_((x > 1,), x[1:]), 1),
        (lambda x: x.index_put_((x > 1,), x[0]), 0),
        (lambda x: x.masked_select(x > 1), 1),
        (lambda x: x.unique(), 1),
        (lambda x: x.unique_consecutive(), 1),
        (lambda x: x.bincount(), 1),
        (lambda x: x.repeat_interleave(x), 1),
        (lambda x: x.repeat_interleave(x, output_size=6), 0),
        (lambda x: torch.where(x > 1, x, 0), 0),
        (lambda x: x[x.clamp(max=2)], 0),
        (lambda x: x.sort(), 0),
    ],
)
def test_the_emulated_device_counts_what_cuda_waits_for(call: Callable[[Tensor], object], waits: int) -> None:
    x = torch.tensor([1, 2, 3], device=ON)
    assert emulated.synchronizations(lambda: call(x)) == waits


def on_device(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: column.to(ON) for name, column in batch.items()}


def trained(config: EmbeddingConfig, batch: dict[str, Any], device: str) -> tuple[list[Tensor], dict[str, int]]:
    """Return the outputs and rows after two steps, and the counts of the second one."""
    engine = EmbeddingEngine({"id": config}, optimizer=optim.Adam, device=device)
    optimizer = engine.make_optimizer(lr=0.1)

    def step() -> Tensor:
        optimizer.zero_grad()
        vectors = engine(batch)["id"]
        vectors.square().sum().backward()
        optimizer.step()
        return vectors.detach()

    step()
    emulated.clear_counts()
    vectors = step()
    counts = emulated.counts()
    return [vectors.cpu(), engine.tables[0].export_all()[0]["embedding"].cpu()], counts


@pytest.mark.parametrize(
    ("config", "columns", "copies"),
    [
        ({"combiner": "mean"}, {"id": LISTS}, 2),
        ({"combiner": "sum", "weights": "w"}, {"id": LISTS, "w": WEIGHTS}, 3),
        ({"combiner": "sum", "max_length": 2, "weights": "w"}, {"id": LISTS, "w": WEIGHTS}, 3),
        ({"combiner": "max", "max_length": 1}, {"id": LISTS}, 2),
        ({"combiner": "tile", "max_length": 2}, {"id": LISTS}, 2),
        ({"combiner": None, "max_length": 2}, {"id": LISTS}, 1),
        ({"combiner": "sum", "max_length": 2}, {"id": DEEP}, 2),
        ({}, {"id": torch.tensor([3, 4, 3])}, 1),
        ({}, {"id": torch.tensor([3, 4, 3], dtype=torch.int32)}, 1),
        ({"combiner": "mean", "weights": "w"}, {"id": torch.tensor([[3, 4], [3, 5]]), "w": torch.rand(2, 2)}, 2),
        ({"combiner": "mean", "max_length": 1}, {"id": torch.tensor([[3, 4], [3, 5]])}, 1),
        ({"combiner": "tile", "max_length": 2}, {"id": torch.arange(6).view(1, 2, 3)}, 1),
    ],
)
@pytest.mark.parametrize("pinned", [False, True])
def test_columns_on_the_cpu_are_copied_once_without_waiting(
    config: dict[str, Any], columns: dict[str, Any], copies: int, pinned: bool
) -> None:
    expected, _ = trained(EmbeddingConfig(dim=4, **config), columns, "cpu")
    if pinned:
        columns = {name: column.pin_memory() for name, column in columns.items()}
    found, counts = trained(EmbeddingConfig(dim=4, **config), columns, ON)
    assert counts["synchronizations"] == 0
    assert counts["copies_to_device"] == copies
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("config", "columns", "waits"),
    [
        ({"combiner": "sum", "max_length": 2, "weights": "w"}, {"id": LISTS, "w": WEIGHTS}, 0),
        ({"combiner": "max", "max_length": 1}, {"id": LISTS}, 0),
        ({"combiner": "tile", "max_length": 2}, {"id": LISTS}, 0),
        ({"combiner": "sum", "max_length": 2}, {"id": DEEP}, 0),
        ({"combiner": "mean", "max_length": 1}, {"id": torch.tensor([[3, 4], [3, 5]])}, 0),
        ({"combiner": None, "max_length": 2}, {"id": LISTS}, 1),  # the host must know the number of vectors
    ],
)
def test_max_length_waits_only_for_a_number_of_vectors(
    config: dict[str, Any], columns: dict[str, Any], waits: int
) -> None:
    expected, _ = trained(EmbeddingConfig(dim=4, **config), columns, "cpu")
    found, counts = trained(EmbeddingConfig(dim=4, **config), on_device(columns), ON)
    assert counts["synchronizations"] == waits
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_columns_are_checked_before_they_are_copied() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4, weights="w", combiner="sum")}, device=ON)
    for columns, message in (
        ({"id": LISTS, "w": WEIGHTS.values[:3]}, "one weight for each id"),
        ({"id": LISTS, "w": RaggedTensor(WEIGHTS.values, torch.tensor([0, 3, 3, 3, 6]))}, "one weight for each id"),
        ({"id": LISTS.values.float(), "w": WEIGHTS.values}, "ids must be int64 or int32"),
    ):
        emulated.clear_counts()
        with pytest.raises((TypeError, ValueError), match=message):
            engine(columns)
        assert emulated.counts()["copies_to_device"] == 0


BLOCK_ROWS = 64


def small_blocks() -> tuple[EmbeddingEngine, Callable[[Tensor], None]]:
    """Return an engine whose table has small blocks, and its step."""
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)}, optimizer=optim.Adam, device=ON)
    store = engine.tables[0].store
    store.blocks = EmbeddingBlocks(store.layout, store.device, block_rows=BLOCK_ROWS)
    optimizer = engine.make_optimizer(lr=0.1)
    gradient = torch.ones(1, 4, device=ON).expand(200, 4)

    def step(ids: Tensor) -> None:
        optimizer.zero_grad()
        # No operator of torch, which would run what is queued.
        engine({"id": ids})["id"].backward(gradient[: ids.numel()])
        optimizer.step()

    return engine, step


@pytest.mark.parametrize("late", [0, 1, 2])
def test_room_is_made_for_one_step_whatever_is_queued(late: int) -> None:
    ids = torch.arange(40).repeat(3).to(ON)
    with emulated.schedule(late=late):
        engine, step = small_blocks()
        blocks = engine.tables[0].store.blocks
        for _ in range(30):
            step(ids)
            assert blocks.capacity < 40 + ids.numel() + BLOCK_ROWS
        assert len(engine.tables[0]) == 40


def test_steps_without_a_new_block_do_not_wait() -> None:
    _, step = small_blocks()
    ids = torch.arange(40).repeat(3).to(ON)
    step(ids)
    step(ids)  # room for the ids of a step beside the rows in use
    assert emulated.synchronizations(lambda: [step(ids) for _ in range(30)]) == 0


def test_a_host_that_runs_ahead_waits_for_inserts_and_not_for_what_follows() -> None:
    ids, few = torch.arange(40).repeat(3).to(ON), torch.arange(4).to(ON)
    with emulated.schedule(late=1):
        engine, _ = small_blocks()
        engine({"id": ids})
        for _ in range(5):
            later = torch.Event(ON)
            later.record()
            assert emulated.synchronizations(lambda: engine({"id": ids})) == 1
            assert not later.query()
        engine, _ = small_blocks()
        engine({"id": few})
        # Once in so many lookups as have room beside the rows in use.
        assert emulated.synchronizations(lambda: [engine({"id": few}) for _ in range(45)]) == 2


class _Done:
    """A collective that has completed."""

    def wait(self) -> None:
        """Return at once."""


@contextmanager
def device_collectives(engine: EmbeddingEngine) -> Iterator[list[int]]:
    """Let the ranks' collectives take tensors on the device, as NCCL's do, and yield the waits inside of them."""
    inside = [0]
    all_to_all, all_reduce = dist.all_to_all_single, dist.all_reduce

    def counted(call: Callable[[], None]) -> _Done:
        inside[0] += emulated.synchronizations(call)
        return _Done()

    def exchanged(received: Tensor, values: Tensor, *sizes: Any, group: Any, async_op: bool) -> Any:
        def run() -> None:
            host = torch.empty(received.shape, dtype=received.dtype)
            all_to_all(host, values.cpu(), *sizes, group=group)
            received.copy_(host)

        return counted(run)

    def summed(total: Tensor, group: Any) -> Any:
        def run() -> None:
            host = total.cpu()
            all_reduce(host, group=group)
            total.copy_(host)

        return counted(run)

    assert engine._sharded is not None
    engine._sharded.exchange.device = engine.device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.dist, "all_to_all_single", exchanged)
        patch.setattr(exchange.dist, "all_reduce", summed)
        yield inside


def clip_norm(engine: EmbeddingEngine, step: Callable[[], None]) -> None:
    with exchange_gradients(engine.parameters()):
        torch.nn.utils.clip_grad_norm_(engine.parameters(), 0.5)
        step()


def clip_norm_table_by_table(engine: EmbeddingEngine, step: Callable[[], None]) -> None:
    torch.nn.utils.clip_grad_norm_(engine.parameters(), 0.5)
    step()


def clip_rows(engine: EmbeddingEngine, step: Callable[[], None]) -> None:
    with exchange_gradients(engine.parameters()):
        optim.clip_row_norm_(engine.parameters(), 0.1)
        step()


def sharded(
    group: dist.ProcessGroup,
    device: str,
    tables: int,
    settings: dict[str, Any],
    sharding: str,
    unused: bool,
    update: Callable[[EmbeddingEngine, Callable[[], None]], None] = lambda engine, step: step(),
) -> dict[str, Any]:
    """Train on several ranks; return the rows, and the waits of each step outside of collectives."""
    rank = dist.get_rank(group)
    if device == ON:
        emulated.load()
    configs = {
        f"{kind}{number}": EmbeddingConfig(dim=8 * (number + 1), combiner="mean", table=str(number), sharding=sharding)
        for number in range(tables)
        for kind in ("a", "b")
    }
    engine = EmbeddingEngine(
        configs, optimizer=optim.Adam, device=device, group=group, prefetch_depth=0, seed=2, **settings
    )
    optimizer = engine.make_optimizer(lr=0.1)
    draw = torch.Generator().manual_seed(rank)

    def step() -> None:
        ids = {name: torch.randint(0, 30, (20, 3), generator=draw).to(engine.device) for name in configs}
        before = emulated.counts()["synchronizations"] - inside[0] if device == ON else 0
        optimizer.zero_grad()
        vectors = engine(ids)
        sum(part.square().sum() for name, part in vectors.items() if not (unused and name[0] == "b")).backward()
        update(engine, optimizer.step)
        waits.append(emulated.counts()["synchronizations"] - inside[0] - before if device == ON else 0)

    waits: list[int] = []
    if device == ON:
        with device_collectives(engine) as inside:
            for _ in range(4):
                step()
    else:
        for _ in range(4):
            step()
    rows = [table.export_all()[0]["embedding"].cpu() for table in engine.tables]
    return {"rows": rows, "waits": waits}


@pytest.mark.parametrize("tables", [1, 4])
@pytest.mark.parametrize(
    ("settings", "sharding", "unused"),
    [
        ({}, "row", False),
        ({}, "row", True),
        ({"reduce": "id"}, "row", False),
        ({"reduce": "id", "deduplicate": False}, "row", True),
        ({}, "table", False),
        ({}, "column", False),
        ({}, "column", True),
        ({}, "replicated", False),
        ({"wire_dtype": torch.bfloat16}, "replicated", True),
    ],
)
def test_ranks_wait_for_split_sizes_once_for_all_tables(
    ranks: Ranks, tables: int, settings: dict[str, Any], sharding: str, unused: bool
) -> None:
    found = ranks.run(2, sharded, ON, tables, settings, sharding, unused)
    expected = ranks.run(2, sharded, "cpu", tables, settings, sharding, unused)
    for ours, theirs in zip(found, expected, strict=True):
        # Once for the ids and once for the gradients; once more to count the gradients, if only some ids have any.
        assert ours["waits"][-1] == 2 + unused
        assert all(torch.equal(one, other) for one, other in zip(ours["rows"], theirs["rows"], strict=True))


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize(("update", "sharding"), [(clip_norm, "row"), (clip_norm, "column"), (clip_rows, "row")])
def test_ranks_wait_for_split_sizes_once_if_they_clip(
    ranks: Ranks, tables: int, update: Callable[..., None], sharding: str
) -> None:
    plainly = clip_norm_table_by_table if update is clip_norm else update
    found = ranks.run(2, sharded, ON, tables, {}, sharding, True, update)
    expected = ranks.run(2, sharded, "cpu", tables, {}, sharding, True, plainly)
    unclipped = ranks.run(2, sharded, "cpu", tables, {}, sharding, True)
    for ours, theirs, others in zip(found, expected, unclipped, strict=True):
        assert ours["waits"][-1] == 3
        assert all(torch.equal(one, other) for one, other in zip(ours["rows"], theirs["rows"], strict=True))
        assert not any(torch.equal(one, other) for one, other in zip(ours["rows"], others["rows"], strict=True))


def backward_within(group: dist.ProcessGroup) -> list[str]:
    """Return the error of backward within the block, and the row after the step that follows."""
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1, initializer=Constant(0.0))}, group=group, prefetch_depth=0)
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    vectors = engine({"id": torch.tensor([7])})["id"]
    vectors.sum().backward(retain_graph=True)
    with exchange_gradients(engine.parameters()), pytest.raises(RuntimeError) as error:
        vectors.sum().backward(retain_graph=True)
    if dist.get_rank(group) == 0:  # later, one rank alone may have further gradients
        vectors.sum().backward()
    optimizer.step()
    return [str(error.value), *(str(table.export_all()[0]["embedding"].tolist()) for table in engine.tables)]


def test_backward_within_the_block_is_refused(ranks: Ranks) -> None:
    results = ranks.run(2, backward_within)
    assert all("table id: backward ran within exchange_gradients()" in error for error, _ in results)
    # The mean over ranks of 1 before the block, and of 1 on rank 0 after it.
    assert sorted(rows for _, rows in results) == ["[[-1.5]]", "[]"]


def through_host(group: dist.ProcessGroup, tables: int) -> tuple[int, int]:
    """Return the waits and the copies to the host in a step with Gloo, which sends from host memory."""
    emulated.load()
    configs = {f"f{number}": EmbeddingConfig(dim=4 * (number + 1)) for number in range(tables)}
    engine = EmbeddingEngine(configs, optimizer=optim.Adam, device=ON, group=group, prefetch_depth=0)
    optimizer = engine.make_optimizer(lr=0.1)
    ids = {name: torch.arange(20).to(ON) for name in configs}
    for _ in range(3):
        emulated.clear_counts()
        optimizer.zero_grad()
        sum(part.square().sum() for part in engine(ids).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    counts = emulated.counts()
    return counts["synchronizations"], counts["copies_from_device"]


@pytest.mark.parametrize("tables", [1, 3])
def test_gloo_waits_only_for_what_it_sends(ranks: Ranks, tables: int) -> None:
    # The sizes of all tables; then the ids, their counts, the rows and the gradients of each.
    for waits, copies in ranks.run(2, through_host, tables):
        assert waits == 1 + 4 * tables
        assert copies == waits + tables  # the counters of a table, without waiting
