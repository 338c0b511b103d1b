"""Functions that ranks run in tests of checkpoints of sharded tables."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingEngine, Unused
from recis_hybrid.saver import CorruptCheckpoint, Saver
from recis_hybrid.saver.checkpoint import table_plan
from tests.support import rank_processes, sharded
from tests.support.devices import EDGE_IDS


def engine_of(sharding: str, group: dist.ProcessGroup, seed: int = 3, dim: int = 4) -> EmbeddingEngine:
    configs = sharded.configs("row" if sharding == "mixed" else sharding, dim)
    if sharding == "mixed":
        # Also mix shardings within one logical table: "tiled" would be coalesced with "user".
        others = {"best": "table", "tiled": "table", "narrow": "replicated", "rare": "replicated"}
        configs |= {name: replace(configs[name], sharding=other) for name, other in others.items()}
        configs["each"] = replace(configs["each"], sharding="auto", expected_rows=40)
    return EmbeddingEngine(configs, optimizer=sharded.OPTIMIZERS["Adam"], seed=seed, group=group)


class Run:
    """An engine in training on this rank's share of the batches."""

    def __init__(self, sharding: str, group: dist.ProcessGroup, seed: int = 3, dim: int = 4) -> None:
        table_plan.RANGE_BYTES = 1024  # several files per table, some written by several ranks
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.engine = engine_of(sharding, group, seed, dim)
        self.optimizer = optim.Adam(self.engine.parameters(), lr=0.1)

    def train(self, steps: range) -> None:
        cuts = sharded.shares(24, self.size, False)
        for step in steps:
            batch = sharded.part_of(sharded.global_batch(step), cuts[self.rank], cuts[self.rank + 1])
            loss = sum(value.square().sum() for value in self.engine(batch).values())
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def saver(self, path: str, **options: bool) -> Saver:
        return Saver(path, group=rank_processes.SAVING[self.size], **options)

    def parts(self) -> dict[str, object]:
        return {"engine": self.engine, "sparse": self.optimizer}


def save_chain(group: dist.ProcessGroup, sharding: str, root: str) -> None:
    """Save a chain of three checkpoints with deltas, and the last state as a full checkpoint in another folder."""
    run = Run(sharding, group)
    saver = run.saver(f"{root}/run")
    for step in (1, 2, 3):
        run.train(range(2 * step, 2 * step + 2))
        if step == 2:
            run.engine.evict(Unused(1))
            # All ranks receive all ids, whichever rank owns them.
            run.engine.tables[0].erase(0, torch.tensor([*EDGE_IDS, 100, 101, 10**6]))
        saver.save(step, run.parts(), delta=True)
    run.saver(f"{root}/whole").save(3, run.parts())


def load_and_save(group: dist.ProcessGroup, sharding: str, root: str, out: str, filled: bool) -> None:
    """Load the last checkpoint of a chain, and save it as a full checkpoint."""
    run = Run(sharding, group, seed=9)
    if filled:
        run.train(range(1))
    assert run.saver(root).load(run.parts()) == 3
    run.saver(out).save(3, run.parts())


def save_in_background(group: dist.ProcessGroup, sharding: str, root: str) -> None:
    """Train during background saves, both of full checkpoints and of deltas."""
    run = Run(sharding, group)
    # Savers that run concurrently need separate groups.
    first, background = Saver(f"{root}/first", group=group), run.saver(f"{root}/background", async_save=True)
    for step in (1, 2, 3):
        run.train(range(2 * step, 2 * step + 2))
        first.save(step, run.parts())
        background.save(step, run.parts(), delta=step != 2)
        run.engine.tables[0].erase(0, torch.tensor([100 + step]))
    background.wait()
    run.train(range(20, 22))


def resume_from_delta(group: dist.ProcessGroup, sharding: str, root: str) -> None:
    """Resume from a delta and continue training; save the state, and that of an uninterrupted run."""
    run = Run(sharding, group)
    run.train(range(3))
    saver = run.saver(f"{root}/run")
    saver.save(1, run.parts(), delta=True)
    run.train(range(3, 6))
    saver.save(2, run.parts(), delta=True)
    run.train(range(6, 9))
    run.saver(f"{root}/uninterrupted").save(3, run.parts())
    again = Run(sharding, group, seed=8)
    again.saver(f"{root}/run").load(again.parts())
    again.train(range(6, 9))
    again.saver(f"{root}/resumed").save(3, again.parts())


def load_damaged(group: dist.ProcessGroup, sharding: str, root: str) -> list[str]:
    """Load a damaged checkpoint into filled tables, assert that they are unchanged, and return the error message."""
    run = Run(sharding, group)
    run.train(range(2))
    before = run.engine.checkpoint_state()
    try:
        run.saver(root).load(run.parts())
    except CorruptCheckpoint as error:
        after = run.engine.checkpoint_state()
        for name, table in before.tables.items():
            assert all(torch.equal(after.tables[name].columns[c], values) for c, values in table.columns.items())
        return [str(error)]
    return []


def save_after_losing_changes(group: dist.ProcessGroup, root: str) -> None:
    """Save a delta after one rank has lost track of the changes of a member table."""
    run = Run("mixed", group)
    run.train(range(2))
    saver = run.saver(f"{root}/run")
    saver.save(1, run.parts(), delta=True)
    run.train(range(2, 4))
    if run.rank == 1:
        table = next(table for table in run.engine.tables if any(member.name == "user" for member in table.members))
        for changes in table.change_logs:
            changes.note_whole([member.name for member in table.members].index("user"))
    saver.save(3, run.parts(), delta=True)
    run.saver(f"{root}/whole").save(3, run.parts())


def save_wide(group: dist.ProcessGroup, sharding: str, root: str) -> None:
    """Train and save tables whose rows are wide enough to be split among three ranks."""
    run = Run(sharding, group, dim=16)
    run.train(range(3))
    run.saver(root).save(3, run.parts())


def load_some(group: dist.ProcessGroup, sharding: str, dim: int, root: str, out: str) -> None:
    """Load tables of another run under other names and with another sharding."""
    run = Run(sharding, group, seed=9, dim=dim)
    run.train(range(1))
    rename = {"user": "best", "narrow": "narrow", "item": "user"}
    found = run.saver(root).load_some({"engine": run.engine}, only=list(rename), rename=rename, strict=False)
    assert sorted(found.loaded) == ["engine: best", "engine: narrow", "engine: user"]
    run.saver(out).save(3, run.parts())
