"""Exponential moving averages of dense parameters."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recis_hybrid.metrics import MSE
from recis_hybrid.pipelines import EMA, Callback, Evaluate, PeriodicCheckpoint, Train, Trainer, evaluate
from recis_hybrid.saver import Saver
from tests.support.near import assert_near
from tests.support.small import Model, make_batches, make_step

TRAINED = ["tower.0.weight", "tower.0.bias", "tower.2.weight", "tower.2.bias"]


class Values(Callback):
    """The values of parameters before the first step and after each."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.values: list[dict[str, Any]] = []

    def before_step(self, trainer: Any, batches: Any) -> None:
        if not self.values:
            self.after_step(trainer)

    def after_step(self, trainer: Any) -> None:
        self.values.append({name: each.detach().double().numpy() for name, each in self.module.named_parameters()})


def reference(values: list[Any], decay: float) -> torch.Tensor:
    average = values[0]
    for n, value in enumerate(values[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value
    return torch.from_numpy(np.asarray(average)).float()


def clones(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in module.named_parameters()}


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_averages_equal_the_definition(decay: float) -> None:
    step = make_step()
    ema, values = EMA(step.model, decay), Values(step.model)
    Trainer(step, make_batches(), callbacks=[ema, values]).fit([Train(max_steps=12)])
    assert list(ema.averages) == TRAINED
    assert ema.updates == 12
    for name, average in ema.averages.items():
        found = [each[name] for each in values.values]
        terms = reference([np.abs(each) for each in found], decay)
        assert_near(average, reference(found, decay), terms=terms, where=name)


def test_evaluations_use_the_averages_and_give_the_parameters_back() -> None:
    step = make_step()
    assert isinstance(step.model, Model)
    ema, metrics = EMA(step.model, 0.9), {"mse": MSE()}
    trainer = Trainer(step, make_batches(), make_batches(2, seed=1), metrics=metrics, callbacks=[ema])
    trainer.fit([Train(max_steps=6)])
    trained = clones(step.model.tower)
    trainer.fit([Evaluate(), Evaluate(name="ema", within=ema.averaged)])
    assert all(torch.equal(value, trained[name]) for name, value in step.model.tower.named_parameters())
    for name, average in ema.averages.items():
        step.model.get_parameter(name).data = average.clone()
    assert trainer.figures["ema"] == evaluate(step, make_batches(2, seed=1), metrics) != trainer.figures["eval"]


def test_an_evaluation_that_raises_gives_the_parameters_back() -> None:
    step = make_step()
    ema = EMA(step.model)
    trainer = Trainer(step, make_batches(), [{"id": torch.ones(2, dtype=torch.int64)}], metrics={"mse": MSE()})
    Trainer(step, make_batches(), callbacks=[ema]).fit([Train(max_steps=2)])
    trained = clones(step.model)
    with pytest.raises(KeyError, match="label"):
        trainer.fit([Evaluate(within=ema.averaged)])
    assert all(torch.equal(value, trained[name]) for name, value in step.model.named_parameters())


@pytest.mark.parametrize("saves_first", [False, True])
def test_a_resumed_run_has_the_same_averages_bitwise(tmp_path: Path, saves_first: bool) -> None:
    def run(folder: str, steps: int) -> EMA:
        step, periodic = make_step(), PeriodicCheckpoint(steps=5)
        ema = EMA(step.model, 0.8)
        callbacks = [periodic, ema] if saves_first else [ema, periodic]
        trainer = Trainer(step, make_batches(), saver=Saver(tmp_path / folder), callbacks=callbacks, seed=1)
        trainer.fit([Train(max_steps=steps)], resume="latest")
        return ema

    uninterrupted = run("whole", 12)
    run("resumed", 5)
    gc.collect()  # the saver, which would otherwise lock the folder
    resumed = run("resumed", 12)
    assert resumed.updates == uninterrupted.updates == 12
    assert all(torch.equal(value, uninterrupted.averages[name]) for name, value in resumed.averages.items())


def test_frozen_parameters_get_averages_when_they_are_unfrozen() -> None:
    step = make_step()
    assert isinstance(step.model, Model)
    assert isinstance(step.model.tower, nn.Sequential)
    head = step.model.tower[2].requires_grad_(False)
    ema, values = EMA(step.model, 0.7), Values(step.model)
    trainer = Trainer(step, make_batches(), callbacks=[ema, values])
    trainer.fit([Train(max_steps=3)])
    assert list(ema.averages) == TRAINED[:2]
    trainer.fit([Train(max_steps=3, unfreeze=[head])])
    assert list(ema.averages) == TRAINED
    # It was constant before, so that the definition holds from the start.
    name = "tower.2.weight"
    assert_near(ema.averages[name], reference([each[name] for each in values.values], 0.7))


def test_averages_of_bfloat16_parameters_are_float32() -> None:
    tower = nn.Linear(4, 1, dtype=torch.bfloat16)
    ema = EMA(tower, 0.999)
    ema.updates = 10**6
    trainer: Any = SimpleNamespace(steps_done=0)
    ema.before_step(trainer, [])
    before = clones(tower)["weight"].float()
    with torch.no_grad():
        tower.weight.add_(1)
    trainer.steps_done = 1
    ema.after_step(trainer)
    assert_near(ema.averages["weight"], before + 0.001 * (tower.weight.detach().float() - before))
    with ema.averaged():
        assert tower.weight.dtype is torch.bfloat16
        assert torch.equal(tower.weight.detach(), ema.averages["weight"].bfloat16())


def test_a_state_of_another_model_is_refused() -> None:
    ema = EMA(nn.Linear(2, 1))
    ema.before_step(SimpleNamespace(steps_done=0), [])  # type: ignore[arg-type]
    state = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match=r"'weight' with shape \[1, 2\], but the module has one of shape \[1, 3\]"):
        EMA(nn.Linear(3, 1)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"'weight' with shape \[1, 2\], but the module has no such parameter"):
        EMA(nn.ReLU()).load_state_dict(state)
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"EMA: decay must be from 0 to less than 1, got {decay}"):
            EMA(nn.ReLU(), decay)
    with pytest.raises(TypeError, match="EMA: module must be a torch.nn.Module"):
        EMA("tower")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Evaluate: within must be a function that returns a context"):
        Evaluate(within=ema)  # type: ignore[arg-type]


@pytest.mark.jax
def test_parameters_of_jax_towers_are_averaged() -> None:
    pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    from recis_hybrid.bridge import JaxTower, OptaxOptimizer
    from recis_hybrid.pipelines import TorchStep

    tower = JaxTower(lambda params, x: x @ params["w"], {"w": np.ones((3,), np.float32)})
    optimizer = OptaxOptimizer(tower.named_parameters(), optax.sgd(0.1))
    draw = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(8, 3, generator=draw), "label": torch.ones(8)} for _ in range(4)]

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, batch: Any) -> Any:
            return self.tower(batch["x"])

    step = TorchStep(Tower(), nn.functional.mse_loss, [optimizer])
    ema, values = EMA(step.model, 0.5), Values(step.model)
    trainer = Trainer(step, batches, batches, metrics={"mse": MSE()}, callbacks=[ema, values])
    figures = trainer.fit([Train(epochs=2), Evaluate(), Evaluate(name="ema", within=ema.averaged)])
    assert_near(ema.averages["tower.w"], reference([each["tower.w"] for each in values.values], 0.5))
    scores = [batch["x"] @ ema.averages["tower.w"] for batch in batches]
    errors = torch.cat([score - batch["label"] for score, batch in zip(scores, batches, strict=True)])
    assert figures["ema"]["mse"] == pytest.approx(float(errors.square().mean()), rel=1e-5)
    assert figures["ema"]["mse"] != figures["eval"]["mse"]
