"""Each rule against torch.optim, or plain torch where torch has none, over steps with repeating ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import Constant, EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.saver import Saver
from tests.optim import plain_rules
from tests.support.devices import on_devices
from tests.support.near import OF_ADAM, assert_near

IDS, STEPS = 24, 20

ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
WITH_TORCH: dict[str, tuple[Any, dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (optim.SGD, {"lr": 0.1, "weight_decay": 0.2}, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2)),
    "nesterov": (
        optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.2, nesterov=True),
    ),
    "adagrad": (
        optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.2},
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.05, weight_decay=0.2),
    ),
    "adagrad_sum": (
        optim.AdagradSum,
        {"lr": 0.1, "lr_decay": 0.05},
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.05),
    ),
    "rmsprop": (
        optim.RMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-4, "weight_decay": 0.2},
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, eps=1e-4, weight_decay=0.2),
    ),
    "adam_l2": (optim.AdamL2, ADAM, lambda p: torch.optim.Adam(p, **ADAM)),
    "amsgrad": (optim.AMSGrad, ADAM, lambda p: torch.optim.Adam(p, **ADAM, amsgrad=True)),
}
ADAGRAD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.2}
PLAIN: dict[str, tuple[Any, dict[str, Any], plain_rules.Rule]] = {
    "adamw_tf": (optim.AdamWTF, ADAM, plain_rules.adamw_tf),
    "rowwise_adam": (optim.RowwiseAdam, ADAM, plain_rules.rowwise_adam),
    "lamb": (optim.LAMB, ADAM, plain_rules.lamb),
    "lion": (optim.Lion, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}, plain_rules.lion),
    "ftrl": (optim.FTRL, {"lr": 0.1, "beta": 0.5, "l1": 0.3, "l2": 0.2}, plain_rules.ftrl),
    "rowwise_adagrad": (optim.RowwiseAdagrad, ADAGRAD, plain_rules.rowwise_adagrad),
    "decoupled": (
        optim.RowwiseAdagrad,
        {**ADAGRAD, "weight_decay_mode": "decoupled"},
        plain_rules.rowwise_adagrad,
    ),
    "counter": (optim.RowwiseAdagrad, {**ADAGRAD, "counter_halflife": 4.0}, plain_rules.rowwise_adagrad),
    "decoupled_counter": (
        optim.RowwiseAdagrad,
        {**ADAGRAD, "counter_halflife": 4.0, "weight_decay_mode": "decoupled"},
        plain_rules.rowwise_adagrad,
    ),
}
OPTIMIZERS = {name: case[:2] for name, case in [*WITH_TORCH.items(), *PLAIN.items()]} | {
    "plain_sgd": (optim.SGD, {}),
    "momentum": (optim.SGD, {"momentum": 0.9}),
    "plain_adagrad": (optim.Adagrad, {}),
    "plain_rowwise_adagrad": (optim.RowwiseAdagrad, {}),
    "adam": (optim.Adam, {}),
    "adamw": (optim.AdamW, {}),
}


def make(kind: Any, settings: dict[str, Any], device: str, **config: Any) -> tuple[EmbeddingEngine, Any]:
    config = {"dim": 4, "initializer": Normal(0, 1), **config}
    engine = EmbeddingEngine({"id": EmbeddingConfig(**config)}, optimizer=kind.spec(**settings), device=device)
    return engine, engine.make_optimizer()


def gradients_of(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return random gradients, some of them zeros."""
    return torch.randn(count, dim, generator=generator) * (torch.rand(count, 1, generator=generator) > 0.2)


@on_devices
@pytest.mark.parametrize("dim", [1, 6, 16, 80])
@pytest.mark.parametrize("case", WITH_TORCH)
def test_a_rule_is_that_of_torch_if_every_row_has_a_gradient(case: str, dim: int, device: str) -> None:
    kind, settings, theirs = WITH_TORCH[case]
    engine, optimizer = make(kind, settings, device, dim=dim)
    every, twin = torch.arange(IDS, device=device), torch.nn.Embedding(IDS, dim)
    twin.weight.data.copy_(engine({"id": every})["id"].detach())
    reference, generator = theirs(list(twin.parameters())), torch.Generator().manual_seed(dim)
    for _ in range(STEPS):
        ids = torch.cat([torch.arange(IDS), torch.randint(0, IDS, (20,), generator=generator)])
        gradient = gradients_of(ids.numel(), dim, generator)
        engine({"id": ids.to(device)})["id"].backward(gradient.to(device))
        twin(ids).backward(gradient)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    assert_near(engine({"id": every})["id"], twin.weight, OF_ADAM)


@on_devices
@pytest.mark.parametrize("dim", [1, 6, 16, 80, 1030])
@pytest.mark.parametrize("case", PLAIN)
def test_a_rule_is_its_formula(case: str, dim: int, device: str) -> None:
    kind, settings, rule = PLAIN[case]
    engine, optimizer = make(kind, settings, device, dim=dim)
    every = torch.arange(IDS, device=device)
    weights = engine({"id": every})["id"].detach().cpu().clone()
    state = {
        field.name: torch.full((IDS, field.width or dim), field.first_value) for field in engine.tables[0].layout.state
    }
    last, generator = torch.zeros(IDS, 1), torch.Generator().manual_seed(dim)
    of = SimpleNamespace(**{name: value for name, value in optimizer.param_groups[0].items() if name != "params"})
    for step in range(1, (STEPS if dim < 1000 else 4) + 1):
        ids = torch.randint(0, IDS, (20,), generator=generator)
        gradient = gradients_of(20, dim, generator)
        engine({"id": ids.to(device)})["id"].backward(gradient.to(device))
        optimizer.step()
        optimizer.zero_grad()
        rows, inverse = ids.unique(return_inverse=True)
        summed = torch.zeros(len(rows), dim).index_add_(0, inverse, gradient)
        part, parts = weights[rows], {name: values[rows] for name, values in state.items()}
        rule(part, summed, parts, of, step, step - last[rows])
        weights[rows], last[rows] = part, float(step)
        for name, values in parts.items():
            state[name][rows] = values
    assert_near(engine({"id": every})["id"], weights, OF_ADAM)
    exported = engine.tables[0].export(0, every)
    for name, values in state.items():
        assert_near(exported[name].cpu(), values, OF_ADAM, where=name)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_narrow_rows_and_states_round_the_result_of_a_wide_step(case: str, dtype: torch.dtype, device: str) -> None:
    kind, settings = OPTIMIZERS[case]
    found = []
    for narrow in (False, True):
        given = {"dtype": dtype, "state_dtype": dtype} if narrow else {}
        # Both start at a number that the narrow types have.
        engine, optimizer = make(kind, settings, device, dim=24, initializer=Constant(0.5), **given)
        ids = torch.arange(IDS, device=device)
        gradient = gradients_of(IDS, 24, torch.Generator().manual_seed(1)).to(device)
        engine({"id": ids})["id"].backward(gradient)
        optimizer.step()
        found.append(engine.tables[0].export(0, ids))
    for name, wide in found[0].items():
        if not wide.is_floating_point():
            assert torch.equal(wide, found[1][name]), name
            continue
        values = found[1][name]
        spacing = torch.finfo(values.dtype).eps * wide.abs().clamp(min=torch.finfo(values.dtype).smallest_normal)
        assert float(((values.float() - wide).abs() / spacing).max()) <= 1.001, name


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_resumed_run_is_bitwise_the_same(case: str, tmp_path: Path) -> None:
    kind, settings = OPTIMIZERS[case]

    def train(engine: EmbeddingEngine, optimizer: Any, steps: range) -> None:
        for step in steps:
            ids = torch.randint(0, IDS, (20,), generator=torch.Generator().manual_seed(step))
            engine({"id": ids})["id"].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = make(kind, settings, "cpu")
    train(*straight, range(6))
    first = make(kind, settings, "cpu")
    train(*first, range(3))
    Saver(tmp_path).save(3, {"engine": first[0], "optimizer": first[1]})
    resumed = make(kind, {**settings, "lr": 0.123}, "cpu")
    assert Saver(tmp_path).load({"engine": resumed[0], "optimizer": resumed[1]}) == 3
    assert resumed[1].checkpoint_state().meta == first[1].checkpoint_state().meta
    train(*resumed, range(3, 6))
    ids = torch.arange(IDS)
    for name, values in straight[0].tables[0].export(0, ids).items():
        assert torch.equal(values, resumed[0].tables[0].export(0, ids)[name]), name


def test_a_table_has_hyperparameters_of_its_own() -> None:
    configs = {
        "plain": EmbeddingConfig(dim=4, initializer=Constant(1.0)),
        "decays": EmbeddingConfig(
            dim=4,
            initializer=Constant(1.0),
            optimizer_overrides={"weight_decay": 0.5, "weight_decay_mode": "decoupled"},
        ),
        "other": EmbeddingConfig(dim=4, initializer=Constant(1.0), optimizer=optim.Lion.spec(lr=0.25)),
    }
    engine = EmbeddingEngine(configs, optimizer=optim.RowwiseAdagrad)
    optimizer = engine.make_optimizer(lr=0.5)
    batch = {name: torch.tensor([7]) for name in configs}
    torch.stack([part.sum() for part in engine(batch).values()]).sum().backward()
    optimizer.step()
    found = {name: float(part.detach()[0, 0]) for name, part in engine(batch).items()}
    assert_near(torch.tensor([found[name] for name in configs]), torch.tensor([0.5, 0.25, 0.75]))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (optim.SGD, {"nesterov": True}, "SGD: nesterov=True needs a momentum"),
        (optim.SGD, {"weight_decay": -1.0}, "SGD: weight_decay must not be negative"),
        (optim.Adagrad, {"lr_decay": -1.0}, "Adagrad: lr_decay must not be negative"),
        (optim.AdagradSum, {"eps": -1.0}, "AdagradSum: eps must not be negative"),
        (optim.RowwiseAdagrad, {"weight_decay_mode": "l1"}, r"weight_decay_mode must be one of \['l2', 'decoupled'\]"),
        (optim.RMSprop, {"alpha": 1.0}, r"RMSprop: alpha must be in \[0, 1\)"),
        (optim.FTRL, {"lr": 0.0}, "FTRL: lr must be above 0"),
        (optim.Lion, {"betas": (0.9, 1.0)}, r"Lion: betas must be in \[0, 1\)"),
        (optim.LAMB, {"weight_decay": -1.0}, "LAMB: weight_decay must not be negative"),
        (optim.AMSGrad, {"betas": 0.9}, "AMSGrad: betas must be two numbers"),
    ],
)
def test_bad_hyperparameters_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=kind)
    with pytest.raises((TypeError, ValueError), match=message):
        kind(engine.parameters(), **settings)


def test_a_half_life_needs_counters() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.RowwiseAdagrad)
    with pytest.raises(ValueError, match=r"optim\.RowwiseAdagrad\.spec\(counter_halflife=5\)"):
        optim.RowwiseAdagrad(engine.parameters(), counter_halflife=5)


def test_a_schedule_that_ends_at_zero_is_refused_by_ftrl() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.FTRL)
    optimizer = engine.make_optimizer(lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    engine({"id": torch.tensor([1])})["id"].sum().backward()
    with pytest.raises(ValueError, match="FTRL: lr must be above 0"):
        optimizer.step()


def test_state_dicts_from_before_a_hyperparameter_existed_are_loaded() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.SGD)
    optimizer = engine.make_optimizer(lr=0.1)
    old = optimizer.state_dict()
    for name in ("weight_decay", "nesterov"):
        del old["param_groups"][0][name]
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    engine({"id": torch.tensor([1])})["id"].sum().backward()
    optimizer.step()
