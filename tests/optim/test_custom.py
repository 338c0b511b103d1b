"""Optimizers with a rule in Python: on every device and placement, and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, Placement, StateField
from recis_hybrid.saver import Saver
from tests.support.devices import on_devices
from tests.support.near import assert_near

IDS, DIM = 30, 6


class Momentum(optim.Custom):
    """SGD with momentum, and a count of the updates of each row."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @staticmethod
    def row_state() -> tuple[StateField, ...]:
        return StateField("buffer"), StateField("updates", width=1, dtype=torch.float32)

    @staticmethod
    def update(
        rows: Tensor, gradients: Tensor, state: dict[str, Tensor], settings: Mapping[str, Any], step: int
    ) -> None:
        state["buffer"].mul_(settings["momentum"]).add_(gradients)
        state["updates"] += 1
        rows -= settings["lr"] * state["buffer"]


class Returning(optim.Custom):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @staticmethod
    def update(rows: Tensor, gradients: Tensor, state: Any, settings: Any, step: int) -> Tensor:  # type: ignore[override]
        return rows - gradients


def train(engine: EmbeddingEngine, optimizer: torch.optim.Optimizer, steps: range) -> None:
    device = engine.tables[0].device
    for step in steps:
        ids = torch.randint(0, IDS, (12,), generator=torch.Generator().manual_seed(step)).to(device)
        engine({"id": ids})["id"].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(kind: Any, device: str = "cpu", **config: Any) -> tuple[EmbeddingEngine, Any]:
    config = {"dim": DIM, "initializer": Normal(0, 1), **config}
    engine = EmbeddingEngine({"id": EmbeddingConfig(**config)}, optimizer=kind, device=device)
    return engine, engine.make_optimizer(lr=0.05)


def rows_of(engine: EmbeddingEngine) -> dict[str, Tensor]:
    return engine.tables[0].export(0)


@on_devices
def test_a_rule_in_python_is_that_in_cpp(device: str) -> None:
    (engine, optimizer), (twin, reference) = make(Momentum, device), make(optim.SGD.spec(momentum=0.9), device)
    train(engine, optimizer, range(8)), train(twin, reference, range(8))
    found, expected = rows_of(engine), rows_of(twin)
    assert_near(found["embedding"], expected["embedding"])
    assert_near(found["buffer"], expected["momentum_buffer"])
    for name in ("updated_step", "seen_step", "frequency"):
        assert torch.equal(found[name], expected[name]), name
    assert found["updates"].sum() == sum(
        len(set(torch.randint(0, IDS, (12,), generator=torch.Generator().manual_seed(step)).tolist()))
        for step in range(8)
    )


@on_devices
def test_narrow_rows_and_states_are_rounded(device: str) -> None:
    narrow = {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16}
    engine, optimizer = make(Momentum, device, **narrow)
    before = engine({"id": torch.arange(IDS, device=device)})["id"].detach()
    engine({"id": torch.arange(IDS, device=device)})["id"].sum().backward()
    optimizer.step()
    found = rows_of(engine)
    assert found["buffer"].dtype == torch.bfloat16
    assert bool((found["buffer"] == 1).all())
    wide = before - 0.05
    spacing = torch.finfo(torch.bfloat16).eps * wide.abs()
    assert bool(((found["embedding"].float() - wide).abs() <= spacing).all())
    mean = (found["embedding"].float() - wide).mean()
    assert float(mean.abs()) < 0.3 * float(spacing.mean())  # rounded up and down
    again, second = make(Momentum, device, **narrow)
    again({"id": torch.arange(IDS, device=device)})["id"].sum().backward()
    second.step()
    assert torch.equal(rows_of(again)["embedding"], found["embedding"])


def test_tables_on_disk_are_updated(tmp_path: Path) -> None:
    (engine, optimizer), (plain, other) = (
        make(Momentum, placement=placement)
        for placement in (Placement(blocks="disk", path=str(tmp_path), cache_bytes=1 << 20), None)
    )
    train(engine, optimizer, range(6)), train(plain, other, range(6))
    for name, values in rows_of(plain).items():
        assert torch.equal(values, rows_of(engine)[name]), name


def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path) -> None:
    straight = make(Momentum)
    train(*straight, range(6))
    first = make(Momentum)
    train(*first, range(3))
    Saver(tmp_path).save(3, {"engine": first[0], "optimizer": first[1]})
    resumed = make(Momentum)
    Saver(tmp_path).load({"engine": resumed[0], "optimizer": resumed[1]})
    train(*resumed, range(3, 6))
    for name, values in rows_of(straight[0]).items():
        assert torch.equal(values, rows_of(resumed[0])[name]), name


def test_one_table_may_have_such_an_optimizer() -> None:
    configs = {
        "native": EmbeddingConfig(dim=2),
        "python": EmbeddingConfig(dim=2, optimizer=Momentum.spec(lr=0.5)),
    }
    engine = EmbeddingEngine(configs, optimizer=optim.SGD)
    optimizer, batch = engine.make_optimizer(lr=0.25), {name: torch.tensor([3]) for name in configs}
    before = engine(batch)
    torch.stack([part.sum() for part in before.values()]).sum().backward()
    optimizer.step()
    after = engine(batch)
    assert_near(before["native"] - after["native"], torch.full((1, 2), 0.25), 1024)
    assert_near(before["python"] - after["python"], torch.full((1, 2), 0.5), 1024)
    assert optimizer.param_groups[1]["optimizer"] == "Momentum"


def test_a_rule_that_returns_new_rows_is_refused() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=Returning)
    optimizer = engine.make_optimizer()
    engine({"id": torch.tensor([1])})["id"].sum().backward()
    with pytest.raises(TypeError, match=r"Returning\.update must change rows and state in place and return None"):
        optimizer.step()


def test_a_rule_in_python_has_no_form_for_jit() -> None:
    engine, optimizer = make(Momentum)
    with pytest.raises(TypeError, match=r"Momentum cannot update tables inside jax\.jit; use an optimizer of"):
        optimizer.rule(engine.tables[0].anchor)
