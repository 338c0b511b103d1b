"""Sparse optimizers in checkpoints, stored by member table and thus independent of coalescing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.saver import CheckpointMismatch, CorruptCheckpoint, Saver
from tests.saver.fakes import edit_manifest

CONFIGS = {name: EmbeddingConfig(dim=4) for name in ("a", "b", "c")}


class Run:
    def __init__(
        self, configs: dict[str, EmbeddingConfig] = CONFIGS, *, coalesce: bool = True, lr: float = 0.1
    ) -> None:
        self.engine = EmbeddingEngine(configs, optimizer=optim.Adam, seed=1, coalesce=coalesce)
        self.optimizer = optim.Adam(self.engine.parameters(), lr=lr)

    def train(self, steps: range) -> Run:
        for step in steps:
            batch = {name: torch.arange(step, step + 5) for name in self.engine.configs}
            sum(value.square().sum() for value in self.engine(batch).values()).backward()  # type: ignore[union-attr]
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def rows(self) -> dict[str, torch.Tensor]:
        tables = self.engine.checkpoint_state().tables
        return {f"{name}.{column}": v for name, table in tables.items() for column, v in table.columns.items()}

    def parts(self) -> dict[str, object]:
        return {"engine": self.engine, "sparse": self.optimizer}


@pytest.mark.parametrize("coalesce", [True, False])
def test_steps_and_hyperparameters_follow_the_tables(tmp_path: Path, coalesce: bool) -> None:
    run = Run(coalesce=coalesce, lr=0.2).train(range(3))
    run.optimizer.param_groups[0]["initial_lr"] = 0.5  # as set by schedulers
    Saver(tmp_path).save(1, run.parts())
    other = Run(coalesce=not coalesce)
    assert Saver(tmp_path).load(other.parts()) == 1
    for group in other.optimizer.param_groups:
        assert (group["lr"], group["betas"], group["initial_lr"]) == (0.2, (0.9, 0.999), 0.5)
    assert [state["step"] for state in other.optimizer.state.values()] == [3] * len(other.engine.tables)
    run.train(range(3, 6)), other.train(range(3, 6))
    assert all(torch.equal(other.rows()[name], values) for name, values in run.rows().items())
    restored = Run(coalesce=not coalesce)
    restored.optimizer.load_checkpoint_state(other.optimizer.checkpoint_state())
    assert restored.optimizer.param_groups[0]["lr"] == 0.2
    assert [state["step"] for state in restored.optimizer.state.values()] == [6] * len(other.engine.tables)


def test_another_optimizer_or_other_tables_are_refused_and_change_nothing(tmp_path: Path) -> None:
    configs = {**CONFIGS, "b": replace(CONFIGS["b"], optimizer_overrides={"lr": 0.5})}
    run = Run(configs).train(range(2))
    Saver(tmp_path).save(1, run.parts())
    sgd = optim.SGD(Run().engine.parameters(), lr=0.1)
    fewer = Run({name: CONFIGS[name] for name in ("a", "b")})
    for optimizer, message in (
        (sgd, "optimizer: checkpoint Adam, live object SGD"),
        (fewer.optimizer, "table 'c' is in the checkpoint only"),
        (Run().optimizer, r"'a' and 'b' share a parameter group in the live object, but differ in \['lr'\]"),
    ):
        with pytest.raises(CheckpointMismatch, match=message):
            Saver(tmp_path).load({"sparse": optimizer})
        with pytest.raises(ValueError, match=message):
            optimizer.load_checkpoint_state(run.optimizer.checkpoint_state())
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert not optimizer.state


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("tables"),
        lambda meta: meta.update(groups=3),
        lambda meta: meta["tables"]["a"].update(step=-1),
        lambda meta: meta["tables"]["a"].update(step=True),
        lambda meta: meta["tables"]["b"].update(group=1),
        lambda meta: meta["tables"].update(c=None),
        lambda meta: meta["groups"].append([]),
    ],
)
def test_an_invalid_optimizer_state_is_refused(tmp_path: Path, change: Any) -> None:
    run = Run().train(range(2))
    Saver(tmp_path).save(1, run.parts())
    edit_manifest(tmp_path / "step_000001", lambda document: change(document["parts"]["sparse"]["meta"]))
    other = Run()
    with pytest.raises(CorruptCheckpoint, match="part 'sparse'"):
        Saver(tmp_path).load(other.parts())
    assert len(other.engine.tables[0]) == 0
    assert not other.optimizer.state
