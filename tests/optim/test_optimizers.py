"""Sparse optimizers against torch.optim over 50 steps with repeating ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, Unused
from tests.support.devices import on_devices
from tests.support.near import assert_near

IDS = 40


class PlainRowwiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad in plain torch, which has no such optimizer."""

    def __init__(self, params: Any, lr: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad.to_dense()
                total = self.state[weight].setdefault("sum", torch.zeros(weight.size(0), 1))
                total += gradient.square().mean(dim=1, keepdim=True)
                weight -= group["lr"] * gradient / (total.sqrt() + group["eps"])


CASES: dict[str, tuple[Any, Any, dict[str, Any], Callable[[Any], Any]]] = {
    "sgd": (optim.SGD, optim.SGD, {"lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "adagrad": (optim.Adagrad, optim.Adagrad, {"lr": 0.1}, lambda p: torch.optim.Adagrad(p, lr=0.1)),
    "adagrad_from_0.1": (
        optim.Adagrad,
        optim.Adagrad.spec(initial_accumulator_value=0.1),
        {"lr": 0.1, "eps": 1e-8},
        lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8, initial_accumulator_value=0.1),
    ),
    "adam": (optim.Adam, optim.Adam, {"lr": 0.01}, lambda p: torch.optim.SparseAdam(p, lr=0.01)),
    "adagrad_rowwise": (
        optim.RowwiseAdagrad,
        optim.RowwiseAdagrad,
        {"lr": 0.1},
        lambda p: PlainRowwiseAdagrad(p, lr=0.1, eps=1e-8),
    ),
    "adam_betas": (
        optim.Adam,
        optim.Adam,
        {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3},
        lambda p: torch.optim.SparseAdam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-3),
    ),
}


@on_devices
@pytest.mark.parametrize("dim", [1, 6, 16, 64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_agrees_with_torch_over_50_steps(case: str, dim: int, device: str) -> None:
    ours, spec, settings, theirs = CASES[case]
    config = EmbeddingConfig(dim=dim, initializer=Normal(0, 1))
    engine = EmbeddingEngine({"id": config}, optimizer=spec, device=device)
    every = torch.arange(IDS, device=device)
    twin = torch.nn.Embedding(IDS, dim, sparse=True)
    twin.weight.data.copy_(engine({"id": every})["id"].detach())
    optimizer, reference = ours(engine.parameters(), **settings), theirs(list(twin.parameters()))
    # A schedule on both optimizers: learning rates are read in each step.
    schedules = [torch.optim.lr_scheduler.StepLR(o, step_size=20, gamma=0.5) for o in (optimizer, reference)]
    generator = torch.Generator().manual_seed(dim)
    for _ in range(50):
        ids = torch.randint(0, IDS, (30,), generator=generator)
        gradient = torch.randn(30, dim, generator=generator)
        engine({"id": ids.to(device)})["id"].backward(gradient.to(device))
        twin(ids).backward(gradient)
        for each in (optimizer, reference, *schedules):
            each.step()
        for each in (optimizer, reference):
            each.zero_grad()
    assert_near(engine({"id": every})["id"], twin.weight)


DENSE: dict[str, tuple[Any, Any, dict[str, Any], Callable[[Any], Any]]] = {
    "momentum": (
        optim.SGD,
        optim.SGD.spec(momentum=0.9),
        {"lr": 0.05, "momentum": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ),
    "adamw": (
        optim.AdamW,
        optim.AdamW,
        {"lr": 0.01, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ),
    "adamw_without_memory": (
        optim.AdamW,
        optim.AdamW,
        {"lr": 0.01, "betas": (0.0, 0.0)},
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.0, 0.0)),
    ),
}


@on_devices
@pytest.mark.parametrize("dim", [1, 6, 16, 64, 80])
@pytest.mark.parametrize("case", DENSE)
def test_agrees_with_dense_torch_if_every_row_has_a_gradient(case: str, dim: int, device: str) -> None:
    ours, spec, settings, theirs = DENSE[case]
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=dim, initializer=Normal(0, 1))}, optimizer=spec, device=device)
    every = torch.arange(IDS, device=device)
    twin = torch.nn.Embedding(IDS, dim)
    twin.weight.data.copy_(engine({"id": every})["id"].detach())
    optimizer, reference = ours(engine.parameters(), **settings), theirs(list(twin.parameters()))
    generator = torch.Generator().manual_seed(dim)
    for _ in range(50):
        # Every id at least once.
        ids = torch.cat([torch.arange(IDS), torch.randint(0, IDS, (20,), generator=generator)])
        gradient = torch.randn(ids.numel(), dim, generator=generator)
        engine({"id": ids.to(device)})["id"].backward(gradient.to(device))
        twin(ids).backward(gradient)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    assert_near(engine({"id": every})["id"], twin.weight)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow_state", [False, True])
@pytest.mark.parametrize("rule", ["SGD", "Adagrad", "RowwiseAdagrad", "Adam", "AdamW"])
def test_narrow_rows_follow_wide_ones(rule: str, narrow_state: bool, dtype: torch.dtype, device: str) -> None:
    make, values = getattr(optim, rule), []
    for narrow in (False, True):
        config = EmbeddingConfig(
            dim=32,
            initializer=Normal(0, 1),
            dtype=dtype if narrow else torch.float32,
            state_dtype=dtype if narrow and narrow_state else None,
        )
        engine = EmbeddingEngine({"id": config}, optimizer=make, device=device)
        optimizer, generator = make(engine.parameters(), lr=0.01), torch.Generator().manual_seed(1)
        for _ in range(30):
            ids = torch.randint(0, IDS, (60,), generator=generator).to(device)
            engine({"id": ids})["id"].backward(torch.randn(60, 32, generator=generator).to(device))
            optimizer.step()
        values.append(engine.tables[0].export(0)["embedding"].float().cpu())
    spacing = torch.finfo(dtype).eps * values[0].abs().clamp(min=1e-2)
    # 30 steps round up or down randomly, each by less than one spacing; six standard deviations of this random walk.
    assert float(((values[0] - values[1]).abs() / spacing).max()) < 6 * 30**0.5
    # The mean over 1,280 such walks, within about five standard deviations.
    assert float((values[0] - values[1]).mean().abs()) < 0.35 * float(spacing.mean())


def test_a_parameter_that_is_not_an_anchor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Adam: parameter 0 \(shape \[3\]\) is not an embedding table's anchor"):
        optim.Adam([torch.nn.Parameter(torch.zeros(3))])


def test_an_engine_without_the_state_is_refused() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    with pytest.raises(ValueError, match=r"built with \{\}: build it with .*optimizer=optim.Adagrad"):
        optim.Adagrad(engine.parameters())


@pytest.mark.parametrize("overrides", [None, {"momentum": 0.5}])
def test_an_engine_without_momentum_buffers_is_refused_with_the_remedy(overrides: dict[str, float] | None) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, optimizer_overrides=overrides)})
    momentum = 0.5 if overrides else 0.9
    with pytest.raises(ValueError, match=rf"optimizer=optim\.SGD\.spec\(momentum={momentum}\)\)"):
        optim.SGD(engine.parameters(), momentum=0.9)
    optim.SGD(
        EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.SGD.spec(momentum=0.9)).parameters(),
        momentum=0.9,
    )


def test_an_engine_builds_its_optimizer() -> None:
    configs = {"id": EmbeddingConfig(dim=2)}
    engine = EmbeddingEngine(configs, optimizer=optim.SGD.spec(momentum=0.9, lr=0.5))
    optimizer = engine.make_optimizer()
    assert type(optimizer) is optim.SGD
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert engine.make_optimizer(lr=0.1).param_groups[0]["lr"] == 0.1
    assert EmbeddingEngine(configs, optimizer=optim.Adam).make_optimizer().param_groups[0]["lr"] == 1e-3


def test_a_spec_separates_arguments_of_row_state_and_class() -> None:
    engine = EmbeddingEngine(
        {"id": EmbeddingConfig(dim=1)}, optimizer=optim.Adagrad.spec(initial_accumulator_value=0.5, lr=0.2)
    )
    assert engine.make_optimizer().param_groups[0]["lr"] == 0.2
    engine({"id": torch.tensor([7])})
    assert engine.tables[0].export(0)["sum"].tolist() == [[0.5]]
    with pytest.raises(TypeError, match=r"Adagrad.spec: unknown hyperparameters \['momentum'\]; it has \['eps'"):
        optim.Adagrad.spec(momentum=0.9)


def test_an_engine_without_an_optimizer_accepts_stateless_ones() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1)}, optimizer=None)
    with pytest.raises(RuntimeError, match="make_optimizer: the engine was built without an optimizer; build it with"):
        engine.make_optimizer(lr=0.1)
    optimizer = optim.SGD(engine.parameters(), lr=1.0)
    before = engine({"id": torch.tensor([7])})["id"]
    before.sum().backward()
    optimizer.step()
    assert torch.equal(engine({"id": torch.tensor([7])})["id"], before - 1)


def test_an_optimizer_with_different_state_is_refused() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1)}, optimizer=optim.Adam)
    with pytest.raises(ValueError, match="Adagrad needs .*'sum'.*, but the engine was built with .*'exp_avg'"):
        optim.Adagrad(engine.parameters())
    with pytest.raises(ValueError, match="optimizer=optim.SGD.spec"):
        optim.SGD(engine.parameters(), momentum=0.9)


def test_a_table_of_another_engine_is_refused() -> None:
    engine, other = (EmbeddingEngine({"id": EmbeddingConfig(dim=2)}) for _ in range(2))
    _, ctx = engine.lookup({"id": torch.tensor([1])})
    with pytest.raises(ValueError, match="the table 'id' is not among the optimizer's parameters"):
        engine.apply_gradients(ctx, {"id": torch.zeros(1, 2)}, optim.SGD(other.parameters()))


def test_state_of_different_form_is_refused() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1)}, optimizer=optim.Adagrad)
    optim.RowwiseAdagrad(engine.parameters())  # one element, float32: the same form
    config = EmbeddingConfig(dim=1, dtype=torch.bfloat16, state_dtype=torch.bfloat16)
    narrow = EmbeddingEngine({"id": config}, optimizer=optim.Adagrad)
    with pytest.raises(ValueError, match="RowwiseAdagrad needs .*torch.float32.* built with .*torch.bfloat16"):
        optim.RowwiseAdagrad(narrow.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"lr": -1.0}, "SGD: lr must not be negative, got -1.0"), ({"momentum": 0.9}, "SGD needs .*momentum_buffer")],
)
def test_bad_hyperparameters_of_a_table_are_refused(overrides: dict[str, float], message: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, optimizer_overrides=overrides)})
    with pytest.raises(ValueError, match=message):
        optim.SGD(engine.parameters())


def test_named_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"SGD: parameter 0 \(a tuple\) is not an embedding table's anchor"):
        optim.SGD(EmbeddingEngine({"id": EmbeddingConfig(dim=2)}).named_parameters())


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"lr": float("nan")}])
def test_bad_hyperparameters_are_refused(settings: dict[str, Any]) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.Adam)
    with pytest.raises(ValueError, match="must"):
        optim.Adam(engine.parameters(), **settings)


def test_state_dict_keeps_the_step_count() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, optimizer=optim.Adam)
    optimizer = optim.Adam(engine.parameters())
    for _ in range(3):
        engine({"id": torch.tensor([1])})["id"].sum().backward()
        optimizer.step()
    restored = optim.Adam(engine.parameters())
    restored.load_state_dict(optimizer.state_dict())
    assert restored.state[engine.tables[0].anchor]["step"] == 3


def test_a_closure_is_evaluated() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    optimizer = optim.SGD(engine.parameters(), lr=0.1)

    def closure() -> float:
        loss = engine({"id": torch.tensor([1])})["id"].pow(2).sum()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("rule", [optim.SGD, optim.Adagrad, optim.RowwiseAdagrad, optim.Adam, optim.AdamW])
def test_inference_mode_changes_nothing(rule: Any) -> None:
    """Tables and optimizers can be built, used, grown and compacted in inference mode."""
    found = []
    for within in (False, True):
        with torch.inference_mode(within):
            engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)}, optimizer=rule)
            optimizer = rule(engine.parameters(), lr=0.1)
            engine({"id": torch.arange(IDS, IDS + 5000)})
            ids = torch.arange(IDS)
        for step in range(3):
            engine({"id": ids})["id"].square().sum().backward()
            with torch.inference_mode(within and step != 1), torch.no_grad():
                torch.nn.utils.clip_grad_norm_(engine.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                optimizer.load_state_dict(optimizer.state_dict())
                engine.eval()({"id": ids})
                engine.train()
        with torch.inference_mode(within):
            assert engine.evict(Unused(2)) == 5000
            engine.compact()
        engine({"id": ids})["id"].sum().backward()
        optimizer.step()
        found.append(engine.tables[0].export(0))
    for name, column in found[0].items():
        assert torch.equal(column, found[1][name]), name
