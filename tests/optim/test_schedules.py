"""Learning-rate schedules of torch work on sparse optimizers, and are saved with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.saver import Saver
from tests.support.near import OF_ADAM, assert_near

IDS = torch.tensor([3, -5, 7])
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "warm-up, then cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 8)], [3]
    ),
}


def sgd(momentum: float, spec_momentum: float) -> tuple[EmbeddingEngine, torch.optim.Optimizer]:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=3)}, optimizer=optim.SGD.spec(momentum=spec_momentum))
    return engine, optim.SGD(engine.parameters(), lr=0.1, momentum=momentum)


def adam(kind: Any) -> tuple[EmbeddingEngine, torch.optim.Optimizer]:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=3)}, optimizer=kind)
    return engine, kind(engine.parameters(), lr=0.1)


def gradients(seed: int, steps: int) -> torch.Tensor:
    return torch.randn(steps, len(IDS), 3, generator=torch.Generator().manual_seed(seed))


def train(engine: EmbeddingEngine, optimizer: torch.optim.Optimizer, schedule: Any, steps: torch.Tensor) -> None:
    for gradient in steps:
        optimizer.zero_grad()
        engine({"id": IDS})["id"].backward(gradient)
        optimizer.step()
        schedule.step()


def rows(engine: EmbeddingEngine) -> torch.Tensor:
    engine.eval()
    values = engine({"id": IDS})["id"].clone()
    engine.train()
    return values


def dense(weight: torch.Tensor, make: Callable[[Any], Any], schedule: Any, steps: torch.Tensor) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight)
    optimizer = make([parameter])
    scheduler = schedule(optimizer)
    for gradient in steps:
        parameter.grad = gradient.clone()
        optimizer.step()
        scheduler.step()
    return parameter.detach()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", ["sgd with buffer", "sgd with momentum", "adam", "adamw"])
def test_schedules_work_as_on_torch_optimizers(schedule: str, rule: str) -> None:
    # "sgd with buffer": the engine has momentum buffers, but momentum is 0 until the schedule sets it.
    engine, optimizer = {
        "sgd with buffer": lambda: sgd(0.0, 0.9),
        "sgd with momentum": lambda: sgd(0.9, 0.9),
        "adam": lambda: adam(optim.Adam),
        "adamw": lambda: adam(optim.AdamW),
    }[rule]()
    make = {
        "sgd with buffer": lambda p: torch.optim.SGD(p, lr=0.1),
        "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    }[rule]
    first = rows(engine)
    steps = gradients(0, 10)
    train(engine, optimizer, SCHEDULES[schedule](optimizer), steps)
    expected = dense(first, make, SCHEDULES[schedule], steps)
    assert_near(rows(engine), expected, OF_ADAM)


@pytest.mark.parametrize("schedule", ["one cycle", "cyclic"])
def test_a_cycled_momentum_without_a_buffer_is_ignored_with_a_warning(schedule: str) -> None:
    engine, optimizer = sgd(0.0, 0.0)
    first = rows(engine)
    steps = gradients(1, 10)
    with pytest.warns(
        UserWarning, match="SGD: rows of the table id have no momentum_buffer, so the momentum 0.9.* set by a schedule"
    ) as warned:
        train(engine, optimizer, SCHEDULES[schedule](optimizer), steps)
    assert len(warned) == 1
    without = {
        "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12, cycle_momentum=False),
        "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    }[schedule]
    expected = dense(first, lambda p: torch.optim.SGD(p, lr=0.1), without, steps)
    assert_near(rows(engine), expected)
    with pytest.raises(ValueError, match=r"SGD needs .*momentum_buffer.*spec\(momentum=0.9\)"):
        optim.SGD(engine.parameters(), momentum=0.9)  # an explicit momentum is not ignored


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_continues_from_a_checkpoint(schedule: str, tmp_path: Path) -> None:
    steps = gradients(2, 8)

    def build() -> tuple[EmbeddingEngine, torch.optim.Optimizer, Any]:
        engine, optimizer = sgd(0.0, 0.9)
        return engine, optimizer, SCHEDULES[schedule](optimizer)

    whole = build()
    train(*whole, steps)
    first, again = build(), build()
    train(*first, steps[:4])
    names = ("engine", "optimizer", "schedule")
    Saver(tmp_path).save(4, dict(zip(names, first, strict=True)))
    Saver(tmp_path).load(dict(zip(names, again, strict=True)), 4)
    train(*again, steps[4:])
    assert torch.equal(rows(again[0]), rows(whole[0]))
    assert again[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]
