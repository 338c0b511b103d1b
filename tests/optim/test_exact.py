"""``exact=True``: the results of an optimizer that changes every row of a dense matrix in every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import Constant, EmbeddingConfig, EmbeddingEngine, Normal, Placement, SmallNorm
from recis_hybrid.saver import Saver
from tests.optim import plain_rules
from tests.support.devices import on_devices
from tests.support.near import ROUNDINGS, assert_near

IDS, STEPS, BATCH = 40, 200, 6


def torch_step(make: Callable[..., torch.optim.Optimizer], weight: Tensor, **settings: Any) -> Callable[..., None]:
    optimizer = make([weight], **settings)

    def step(gradient: Tensor, lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = gradient
        optimizer.step()

    return step


def plain_step(rule: plain_rules.Rule, weight: Tensor, **settings: Any) -> Callable[..., None]:
    state = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    of, t = SimpleNamespace(**settings), 0

    def step(gradient: Tensor, lr: float) -> None:
        nonlocal t
        t, of.lr = t + 1, lr
        with torch.no_grad():
            rule(weight, gradient, state, of, t, torch.ones(len(weight), 1))

    return step


ADAM = {"betas": (0.9, 0.98), "eps": 1e-4}
DECAY = {**ADAM, "weight_decay": 0.1}
# With a smaller eps, coupled decay takes weights to 0 at a constant rate, and rounding decides on which side they end.
COUPLED = {"eps": 0.2, "weight_decay": 0.1}
CASES: dict[str, tuple[Any, dict[str, Any], Callable[..., Callable[..., None]]]] = {
    "sgd": (optim.SGD, {"weight_decay": 0.2}, partial(torch_step, torch.optim.SGD)),
    "momentum": (optim.SGD, {"momentum": 0.9}, partial(torch_step, torch.optim.SGD)),
    "momentum_decay": (
        optim.SGD,
        {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
        partial(torch_step, torch.optim.SGD),
    ),
    "adagrad": (optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.01}, partial(torch_step, torch.optim.Adagrad)),
    "adagrad_still": (optim.Adagrad, {"lr_decay": 0.01}, partial(torch_step, torch.optim.Adagrad)),
    "rmsprop": (optim.RMSprop, {"alpha": 0.95, "eps": 1e-4}, partial(torch_step, torch.optim.RMSprop)),
    "rmsprop_decay": (
        optim.RMSprop,
        {"alpha": 0.95, **COUPLED},
        partial(torch_step, torch.optim.RMSprop),
    ),
    "adam": (optim.AdamL2, ADAM, partial(torch_step, torch.optim.Adam)),
    "adam_l2": (optim.AdamL2, {**ADAM, **COUPLED}, partial(torch_step, torch.optim.Adam)),
    "adamw": (optim.AdamW, DECAY, partial(torch_step, torch.optim.AdamW)),
    "amsgrad": (optim.AMSGrad, ADAM, partial(torch_step, torch.optim.Adam, amsgrad=True)),
    "amsgrad_decay": (optim.AMSGrad, {**ADAM, **COUPLED}, partial(torch_step, torch.optim.Adam, amsgrad=True)),
    "adamw_tf": (optim.AdamWTF, {**ADAM, "weight_decay": 0.01}, partial(plain_step, plain_rules.adamw_tf)),
    "sparse_adam": (optim.Adam, ADAM, partial(plain_step, plain_rules.adamw_tf, weight_decay=0.0)),
    "lion": (optim.Lion, {"betas": (0.8, 0.9), "weight_decay": 0.1}, partial(plain_step, plain_rules.lion)),
}


class Dense:
    """A matrix of all ids, trained by an optimizer that changes every row in every step."""

    def __init__(self, case: str, weight: Tensor) -> None:
        self.weight = torch.nn.Parameter(weight.clone())
        _, settings, make = CASES[case]
        self._step = make(self.weight, **settings)

    def step(self, ids: Tensor, gradient: Tensor, lr: float) -> None:
        self._step(torch.zeros_like(self.weight).index_add_(0, ids, gradient), lr)


def make(case: str, device: str = "cpu", **config: Any) -> tuple[EmbeddingEngine, Any]:
    kind, settings, _ = CASES[case]
    config = {"dim": 8, "initializer": Normal(0, 1), **config}
    engine = EmbeddingEngine({"id": EmbeddingConfig(**config)}, optimizer=kind.spec(**settings), device=device)
    return engine, engine.make_optimizer(exact=True)


def first_values(case: str, **config: Any) -> Tensor:
    """Return the values with which the rows of all ids start."""
    return make(case, **config)[0]({"id": torch.arange(IDS)})["id"].detach()


def lr_of(case: str, step: int) -> float:
    return (0.01 if case == "lion" else 0.05) / (1 + step / 50)


def do_step(case: str, engine: EmbeddingEngine, optimizer: Any, step: int, dense: Dense | None = None) -> None:
    """Train on ids of which most come back after several steps, and some late for the first time."""
    device, generator = engine.tables[0].device, torch.Generator().manual_seed(step)
    ids = (torch.rand(BATCH, generator=generator) ** 2 * min(IDS - 2, 10 + step // 4)).long()
    dim = engine.tables[0].layout.dim
    gradient = torch.randn(BATCH, dim, generator=generator)
    optimizer.param_groups[0]["lr"] = lr_of(case, step)
    vectors = engine({"id": ids.to(device)})["id"]
    if dense is not None:
        assert_near(vectors.cpu(), dense.weight[ids], where=f"step {step}")
        dense.step(ids, gradient, lr_of(case, step))
    vectors.backward(gradient.to(device))
    optimizer.step()
    optimizer.zero_grad()


@on_devices
@pytest.mark.parametrize("dim", [3, 16, 1030])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_a_dense_optimizer(case: str, dim: int, device: str) -> None:
    engine, optimizer = make(case, device, dim=dim)
    dense = Dense(case, first_values(case, dim=dim))
    for step in range(STEPS if dim < 1000 else 40):
        do_step(case, engine, optimizer, step, dense)
    met = engine.tables[0].ids(0)
    evaluated = engine.eval()({"id": met})["id"]
    assert_near(evaluated.cpu(), dense.weight[met.cpu()])
    unmet = torch.tensor([IDS - 1])
    assert_near(engine({"id": unmet.to(device)})["id"].cpu(), dense.weight[unmet])
    assert torch.equal(engine.tables[0].export(0, met)["embedding"], evaluated)


@pytest.mark.parametrize("case", CASES)
def test_a_row_that_misses_thousands_of_steps_is_that_of_a_dense_optimizer(case: str) -> None:
    engine, optimizer = make(case, dim=4)
    dense = Dense(case, first_values(case, dim=4))
    for step in range(3000):
        ids = torch.tensor([0, 1] if step % 1500 == 0 else [2])
        gradient = torch.full((len(ids), 4), 0.5 - 0.3 * (step % 4))
        optimizer.param_groups[0]["lr"] = lr_of(case, step)
        engine({"id": ids})["id"].backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        dense.step(ids, gradient, lr_of(case, step))
    # The dense optimizer rounds 3,000 times, and the errors mostly cancel.
    assert_near(engine.eval()({"id": torch.tensor([0, 1, 2])})["id"], dense.weight[:3], 4 * ROUNDINGS)
    assert_near(engine.train()({"id": torch.tensor([0, 1, 2, 5])})["id"], dense.weight[[0, 1, 2, 5]], 4 * ROUNDINGS)


@on_devices
def test_evaluation_and_exports_do_not_change_rows(device: str) -> None:
    engine, optimizer = make("adam_l2", device)
    for step in range(20):
        do_step("adam_l2", engine, optimizer, step)
    table = engine.tables[0]
    rows = table.rows(0, table.ids(0))
    before = table.store.blocks.columns(rows)
    evaluated = engine.eval()({"id": torch.cat([table.ids(0), table.ids(0), torch.tensor([-7], device=device)])})["id"]
    exported = table.export(0)
    after = table.store.blocks.columns(rows)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(evaluated[: len(rows)], exported["embedding"])
    assert torch.equal(evaluated[: len(rows)], evaluated[len(rows) : 2 * len(rows)])
    assert not torch.equal(before["embedding"], exported["embedding"])
    assert (exported["updated_step"] == 20).all()


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("case", ["adamw", "adam_l2", "momentum", "lion", "sgd"])
def test_training_resumes_bitwise(case: str, incremental: bool, tmp_path: Path) -> None:
    engine, optimizer = make(case)
    saver = Saver(tmp_path)
    for step in range(90):
        do_step(case, engine, optimizer, step)
        if step in (30, 50):
            saver.save(step, {"engine": engine, "sparse": optimizer}, delta=incremental)
    resumed, other = make(case)
    Saver(tmp_path).load({"engine": resumed, "sparse": other})
    for step in range(51, 90):
        do_step(case, resumed, other, step)
    ours, theirs = (each.tables[0].export(0) for each in (engine, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(*(each.eval()({"id": torch.arange(IDS)})["id"] for each in (engine, resumed)))


def test_a_saved_row_is_that_of_a_dense_optimizer(tmp_path: Path) -> None:
    engine, optimizer = make("adamw")
    dense = Dense("adamw", first_values("adamw"))
    for step in range(30):
        do_step("adamw", engine, optimizer, step, dense)
    Saver(tmp_path).save(1, {"engine": engine})
    reader = EmbeddingEngine({"id": EmbeddingConfig(dim=8, initializer=Normal(0, 1))}, optimizer=optim.AdamW)
    Saver(tmp_path).load({"engine": reader})
    met = engine.tables[0].ids(0)
    assert_near(reader.eval()({"id": met})["id"], dense.weight[met])


def test_a_state_dict_has_the_steps() -> None:
    engine, optimizer = make("adam_l2")
    for step in range(10):
        do_step("adam_l2", engine, optimizer, step)
    other, second = make("adam_l2")
    other.tables[0].load(0, *_split(engine.tables[0].export(0)))
    other.tables[0].step = engine.tables[0].step
    second.load_state_dict(optimizer.state_dict())
    for step in range(10, 30):
        do_step("adam_l2", engine, optimizer, step)
        do_step("adam_l2", other, second, step)
    assert torch.equal(*(each.eval()({"id": torch.arange(IDS)})["id"] for each in (engine, other)))


def _split(columns: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return columns.pop("ids"), columns


def test_a_lookup_before_a_step_of_other_rows_is_updated_after_it() -> None:
    """Look a batch up before the step of the batch before it, as reading ahead does."""
    engine, optimizer = make("adamw")
    dense = Dense("adamw", first_values("adamw"))
    engine({"id": torch.arange(4)})["id"].backward(torch.ones(4, 8))
    _, early = engine.lookup({"id": torch.arange(2, 6)})
    optimizer.step()
    engine.apply_gradients(early, {"id": torch.ones(4, 8)}, optimizer)
    for ids in (torch.arange(4), torch.arange(2, 6)):
        dense.step(ids, torch.ones(4, 8), 1e-3)
    assert_near(engine.eval()({"id": torch.arange(6)})["id"], dense.weight[:6])


def test_rows_of_bfloat16_follow_within_their_rounding() -> None:
    engine, optimizer = make("adamw", dtype=torch.bfloat16)
    dense = Dense("adamw", first_values("adamw", dtype=torch.bfloat16))
    for step in range(100):
        do_step("adamw", engine, optimizer, step)
        generator = torch.Generator().manual_seed(step)
        ids = (torch.rand(BATCH, generator=generator) ** 2 * min(IDS - 2, 10 + step // 4)).long()
        dense.step(ids, torch.randn(BATCH, 8, generator=generator), lr_of("adamw", step))
    met = engine.tables[0].ids(0)
    found = engine.eval()({"id": met})["id"]
    assert (found - dense.weight[met]).abs().mean() < 0.02 * dense.weight[met].abs().mean()


def test_on_disk_rows_are_those_in_memory(tmp_path: Path) -> None:
    engines = []
    for placement in (None, Placement(blocks="disk", path=tmp_path, cache_bytes=64 * 160)):
        engine, optimizer = make("adam_l2", placement=placement)
        for step in range(60):
            do_step("adam_l2", engine, optimizer, step)
        engines.append(engine)
    assert torch.equal(*(each.eval()({"id": torch.arange(IDS)})["id"] for each in engines))


def test_rows_inserted_with_values_have_missed_nothing() -> None:
    engine, optimizer = make("adam_l2")
    for step in range(10):
        do_step("adam_l2", engine, optimizer, step)
    table, ids = engine.tables[0], torch.tensor([0, 1000])
    before = table.export(0, ids[:1])["exp_avg"]
    table.insert(0, ids, {"embedding": torch.full((2, 8), 2.0)})
    assert torch.equal(engine.eval()({"id": ids})["id"], torch.full((2, 8), 2.0))
    assert torch.equal(table.export(0, ids)["exp_avg"], torch.cat([before, torch.zeros(1, 8)]))
    do_step("adam_l2", engine.train(), optimizer, 10)
    decayed = engine.eval()({"id": ids[1:]})["id"]
    assert ((decayed < 2.0) & (decayed > 1.9)).all()


def test_an_evicted_id_comes_back_as_if_it_had_never_been_met() -> None:
    engine, optimizer = make("adamw")
    dense = Dense("adamw", first_values("adamw"))
    for step in range(30):
        do_step("adamw", engine, optimizer, step)
        dense.step(torch.tensor([IDS - 1]), torch.zeros(1, 8), lr_of("adamw", step))
    engine.tables[0].erase(0, torch.tensor([0]))
    assert_near(engine({"id": torch.tensor([0])})["id"], dense.weight[:1])


def test_eviction_by_norm_sees_present_values() -> None:
    kind, settings = optim.SGD, {"weight_decay": 0.5}
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4, initializer=Constant(1.0))}, optimizer=kind)
    optimizer = engine.make_optimizer(lr=0.1, exact=True, **settings)
    engine({"id": torch.arange(4)})
    for _ in range(60):  # .95 ** 60 < .05
        engine({"id": torch.tensor([3])})["id"].backward(torch.full((1, 4), -0.5))
        optimizer.step()
    assert engine.evict(SmallNorm(0.2)) == 3
    assert engine.tables[0].ids(0).tolist() == [3]


def test_without_exact_rows_catch_up_once_and_then_no_more() -> None:
    engine, optimizer = make("adamw")
    for step in range(10):
        do_step("adamw", engine, optimizer, step)
    before = engine.eval()({"id": torch.arange(10)})["id"]
    engine.train()
    plain = engine.make_optimizer()
    assert_near(engine.eval()({"id": torch.arange(10)})["id"], before)
    engine.train()
    ids = torch.tensor([3])
    for _ in range(5):
        engine({"id": ids})["id"].backward(torch.ones(1, 8))
        plain.step()
        plain.zero_grad()
    others = [i for i in range(10) if i != 3 and before[i].any()]
    assert torch.equal(engine.eval()({"id": torch.tensor(others)})["id"], before[others])


@pytest.mark.parametrize("kind", [optim.LAMB, optim.RowwiseAdam])
def test_optimizers_with_norms_refuse(kind: Any) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)}, optimizer=kind)
    with pytest.raises(ValueError, match=rf"{kind.__name__}: exact=True is not available.*AdamW"):
        engine.make_optimizer(exact=True)


def test_exact_must_be_a_bool() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)}, optimizer=optim.AdamW)
    with pytest.raises(TypeError, match="AdamW: exact must be"):
        engine.make_optimizer(exact="yes")


def test_a_rule_for_a_program_without_torch_is_refused() -> None:
    engine, optimizer = make("adamw")
    with pytest.raises(TypeError, match=r"AdamW with exact=True cannot update tables inside jax\.jit"):
        optimizer.rule(engine.tables[0].anchor)
