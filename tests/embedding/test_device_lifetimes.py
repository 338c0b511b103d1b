"""Work that is queued on an accelerator: whatever the host does next, nothing is read too early or freed too soon.

On the emulated device, streams run only when something waits for them, and freed memory is poisoned.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Placement, Rows
from recis_hybrid.saver import Saver
from tests.support import rank_processes
from tests.support.caches import cached
from tests.support.devices import late_streams, on_accelerators
from tests.support.rank_processes import Ranks

IDS = torch.arange(40).repeat(3)


def build(device: str, blocks: str, **arguments: Any) -> tuple[EmbeddingEngine, Any]:
    placement = None
    if blocks == "cached":  # fewer records than the ids of a batch
        placement = cached(1, optim.Adam, dim=6)
    elif device != "cpu":
        placement = Placement(id_map="cuda", blocks=blocks)  # type: ignore[arg-type]
    config = EmbeddingConfig(dim=6, placement=placement)
    engine = EmbeddingEngine({"id": config}, optimizer=optim.Adam, device=device, **arguments)
    return engine, engine.make_optimizer(lr=0.1)


def step(engine: EmbeddingEngine, optimizer: Any, ids: Tensor) -> None:
    optimizer.zero_grad()
    engine({"id": ids.to(engine.device)})["id"].square().sum().backward()
    optimizer.step()


def rows_of(engine: EmbeddingEngine) -> dict[str, Tensor]:
    (table,) = engine.tables
    return {name: values.cpu() for name, values in table.export_all()[0].items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@on_accelerators
@pytest.mark.parametrize("blocks", ["cuda", "pinned", "cached"])
@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_holds_the_updates_that_are_still_queued(
    device: str, blocks: str, background: bool, tmp_path: Path
) -> None:
    twin, twin_optimizer = build("cpu", "cpu")
    for _ in range(3):
        step(twin, twin_optimizer, IDS)
    with late_streams(device):
        engine, optimizer = build(device, blocks)
        for _ in range(2):
            step(engine, optimizer, IDS)
        torch.accelerator.synchronize()
        step(engine, optimizer, IDS)
        saver = Saver(tmp_path, async_save=background)
        saver.save(1, {"engine": engine})
        step(engine, optimizer, IDS)
        saver.wait()
        loaded, _ = build("cpu", "cpu")
        Saver(tmp_path).load({"engine": loaded})
    assert_equal(rows_of(loaded), rows_of(twin))


def drop(engine: EmbeddingEngine) -> None:
    engine.tables.clear()


def reset(engine: EmbeddingEngine) -> None:
    engine.tables[0].store.reset()


class All:
    """Evicts every row."""

    def unwanted(self, rows: Rows) -> Tensor:
        return torch.ones_like(rows.ids, dtype=torch.bool)


def evict_and_compact(engine: EmbeddingEngine) -> None:
    engine.evict(All())
    engine.compact()


@on_accelerators
@pytest.mark.parametrize("blocks", ["cuda", "pinned", "cached"])
@pytest.mark.parametrize("free", [drop, reset, evict_and_compact])
def test_blocks_live_until_the_kernels_that_write_them_have_run(
    device: str, blocks: str, free: Callable[[EmbeddingEngine], None]
) -> None:
    with late_streams(device):
        engine, optimizer = build(device, blocks)
        step(engine, optimizer, IDS)
        step(engine, optimizer, IDS)
        free(engine)
        del engine, optimizer
        gc.collect()
        torch.accelerator.synchronize()


def prefetched(group: dist.ProcessGroup, device: str, how: int, blocks: str) -> list[dict[str, Tensor]]:
    """Train on ids that are sent ahead; return the rows of this rank and the vectors of each step."""
    with late_streams(device, how):
        ahead = rank_processes.AHEAD.get(dist.get_world_size(group))
        engine, optimizer = build(device, blocks, group=group, prefetch_depth=2, prefetch_group=ahead, staleness=1)
        draw = torch.Generator().manual_seed(dist.get_rank(group))
        batches = [torch.randint(0, 60, (50,), generator=draw) for _ in range(6)]
        found = []
        on_device = [{"id": ids.to(engine.device)} for ids in batches]
        engine.prefetch(on_device[0])
        for number, batch in enumerate(on_device):
            if number + 1 < len(on_device):
                engine.prefetch(on_device[number + 1])
            optimizer.zero_grad()
            vectors = engine(batch)["id"]
            (vectors.square().sum() * (number + 1)).backward()
            if number + 1 < len(on_device) and number % 2:
                engine.prefetch_rows()
            optimizer.step()
            found.append({"vectors": vectors.detach().cpu() if number % 3 == 0 else vectors.detach()})
        return [{name: values.cpu() for name, values in each.items()} for each in [*found, rows_of(engine)]]


@pytest.mark.parametrize(("how", "blocks"), [(1, "cuda"), (2, "cuda"), (2, "cached")])
@on_accelerators
def test_ids_sent_ahead_by_another_thread_change_no_result(ranks: Ranks, device: str, how: int, blocks: str) -> None:
    runs = (ranks.run(2, prefetched, device, how, blocks), ranks.run(2, prefetched, "cpu", 0, "cpu"))
    for found, expected in zip(*runs, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal(ours, theirs)
