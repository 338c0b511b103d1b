"""Checkpoints of tables split by column."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingEngine, Unused
from recis_hybrid.saver import Saver
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from tests.support import rank_processes, sharded
from tests.support.rank_processes import Ranks

DIM = 18


def parts_of(group: dist.ProcessGroup, sharding: str) -> dict[str, object]:
    engine = EmbeddingEngine(sharded.configs(sharding, DIM), optimizer=sharded.OPTIMIZERS["Adam"], seed=3, group=group)
    return {"engine": engine, "sparse": optim.Adam(engine.parameters(), lr=0.1)}


def saver_of(group: dist.ProcessGroup, folder: str, background: bool = False) -> Saver:
    return Saver(folder, group=rank_processes.SAVING[dist.get_world_size(group)], async_save=background)


def trained(group: dist.ProcessGroup, folder: str, background: bool) -> None:
    """Save a full checkpoint, then deltas: changed rows, removed rows, and counts of ids that are not admitted."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    parts, saver = parts_of(group, "column"), saver_of(group, folder, background)
    engine, sparse = parts["engine"], parts["sparse"]
    assert isinstance(engine, EmbeddingEngine)
    assert isinstance(sparse, optim.Adam)
    cuts = sharded.shares(24, ranks, False)
    for step in range(1, 4):
        batch = sharded.part_of(sharded.global_batch(step, ids=90), cuts[rank], cuts[rank + 1])
        loss = sum(value.square().sum() for value in engine(batch).values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        sparse.step()
        if step == 3:
            assert engine.evict(Unused(1)) > 0
        saver.save(step, parts, delta=step > 1)
    saver.wait()


def resaved(group: dist.ProcessGroup, sharding: str, source: str, target: str) -> None:
    parts = parts_of(group, sharding)
    assert saver_of(group, source).load(parts) == 3
    saver_of(group, target).save(3, parts)


@pytest.mark.parametrize("background", [False, True])
def test_saved_columns_equal_whole_rows(ranks: Ranks, tmp_path: Path, background: bool) -> None:
    source = tmp_path / "run"
    ranks.run(2, trained, str(source), background)
    assert StoredCheckpoint(source, 3).manifest.previous is not None
    found = {}
    for world, sharding in ((1, "row"), (2, "column"), (3, "row"), (4, "column")):
        target = tmp_path / f"{world}"
        ranks.run(world, resaved, sharding, str(source), str(target))
        found[world] = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*.safetensors")}
    tables = StoredCheckpoint(tmp_path / "1", 3).read("engine").tables
    assert tables["user"].columns["exp_avg"].shape[1] == DIM
    assert tables["user"].columns["ids"].numel() > 20
    for world in (2, 3, 4):
        assert found[world] == found[1]
