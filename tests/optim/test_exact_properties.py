"""Exact optimizers beside dense ones of torch, over random sequences of all operations that read or change tables."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, Rows
from recis_hybrid.saver import Saver
from tests.support.near import ROUNDINGS, assert_near
from tests.support.schedules import SOAK

IDS, DIM, LR = 16, 4, 0.05
NAMES = ("a", "b")
EVERY = torch.arange(IDS)
# With a smaller eps, coupled decay takes weights to 0 at a constant rate, and rounding decides on which side they end.
ADAM = {"betas": (0.8, 0.95), "eps": 0.2}
CASES: dict[str, tuple[Any, dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (optim.SGD, {"weight_decay": 0.2}, torch.optim.SGD),
    "momentum": (optim.SGD, {"momentum": 0.8}, torch.optim.SGD),
    "momentum_decay": (optim.SGD, {"momentum": 0.8, "weight_decay": 0.1}, torch.optim.SGD),
    "adagrad": (optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1, "eps": 0.2}, torch.optim.Adagrad),
    "rmsprop": (optim.RMSprop, {"weight_decay": 0.1, "alpha": 0.9, "eps": 0.2}, torch.optim.RMSprop),
    "adam": (optim.AdamL2, ADAM, torch.optim.Adam),
    "adam_l2": (optim.AdamL2, {**ADAM, "weight_decay": 0.1}, torch.optim.Adam),
    "adamw": (optim.AdamW, {**ADAM, "weight_decay": 0.1}, torch.optim.AdamW),
}
ids_of_a_batch = st.lists(st.integers(0, IDS - 1), max_size=6).map(lambda ids: torch.tensor(ids, dtype=torch.int64))
few_ids = st.sets(st.integers(0, IDS - 1), max_size=4).map(lambda ids: torch.tensor(sorted(ids), dtype=torch.int64))
names = st.sampled_from(NAMES)
seeds = st.integers(0, 2**16)


class Dense:
    """The matrix of a table, and one whose rows no gradient has ever reached."""

    def __init__(self, case: str, weight: Tensor) -> None:
        _, hyperparameters, make = CASES[case]
        self.weights = [torch.nn.Parameter(weight.clone()) for _ in range(2)]
        self.optimizer = make(self.weights, lr=LR, **hyperparameters)

    def step(self, gradient: Tensor, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        for weight, each in zip(self.weights, (gradient, torch.zeros_like(gradient)), strict=True):
            weight.grad = each
        self.optimizer.step()

    def forget(self, ids: Tensor) -> None:
        """Let rows be as if they had never been met."""
        met, unmet = (self.optimizer.state[weight] for weight in self.weights)
        with torch.no_grad():
            self.weights[0][ids] = self.weights[1][ids]
            for name, values in met.items():
                if isinstance(values, Tensor) and values.dim() == 2:
                    values[ids] = unmet[name][ids]

    def write(self, ids: Tensor, values: Tensor) -> None:
        with torch.no_grad():
            self.weights[0][ids] = values

    @property
    def rows(self) -> Tensor:
        return self.weights[0].detach()


class ExactMachine(RuleBasedStateMachine):
    """Two member tables of one logical table."""

    @initialize(case=st.sampled_from(sorted(CASES)))
    def begin(self, case: str) -> None:
        self.case, self.saved = case, False
        self.folder = tempfile.TemporaryDirectory()
        self.saver = Saver(Path(self.folder.name))
        self.engine, self.optimizer = self.make()
        first = self.engine({name: EVERY for name in NAMES})
        self.dense = {name: Dense(case, first[name].detach()) for name in NAMES}
        self.engine, self.optimizer = self.make()
        self.met: dict[str, set[int]] = {name: set() for name in NAMES}
        self.lr, self.count = LR, 0

    def make(self) -> tuple[EmbeddingEngine, Any]:
        kind, hyperparameters, _ = CASES[self.case]
        config = EmbeddingConfig(dim=DIM, initializer=Normal(0, 1))
        engine = EmbeddingEngine(dict.fromkeys(NAMES, config), optimizer=kind.spec(**hyperparameters))
        return engine, engine.make_optimizer(lr=LR, exact=True)

    def near(self, got: Tensor, name: str, ids: Tensor) -> None:
        assert_near(got.detach(), self.dense[name].rows[ids], ROUNDINGS, where=f"{self.case}, {name}")

    @rule(a=ids_of_a_batch, b=ids_of_a_batch, seed=seeds, lookups=st.integers(1, 2))
    def train(self, a: Tensor, b: Tensor, seed: int, lookups: int) -> None:
        """Do a step with the gradients of one or two lookups."""
        self.engine.train()
        generator, batch = torch.Generator().manual_seed(seed), {"a": a, "b": b}
        gradients = {name: torch.zeros(IDS, DIM) for name in NAMES}
        for _ in range(lookups):
            outputs = self.engine(batch)
            for name, ids in batch.items():
                self.near(outputs[name], name, ids)
                gradient = torch.randn(len(ids), DIM, generator=generator)
                outputs[name].backward(gradient, retain_graph=True)
                gradients[name].index_add_(0, ids, gradient)
                self.met[name] |= set(ids.tolist())
        self.step(gradients)

    @rule(steps=st.integers(1, 12))
    def miss(self, steps: int) -> None:
        """Do steps in which no row has a gradient."""
        for _ in range(steps):
            self.step({name: torch.zeros(IDS, DIM) for name in NAMES})

    def step(self, gradients: dict[str, Tensor]) -> None:
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, dense in self.dense.items():
            dense.step(gradients[name], self.lr)

    @rule(lr=st.sampled_from([0.0, 0.01, 0.05, 0.1]))
    def schedule(self, lr: float) -> None:
        self.lr = lr

    @rule()
    def evaluate(self) -> None:
        """Look all ids up, also those without a row."""
        outputs = self.engine.eval()({name: EVERY for name in NAMES})
        for name in NAMES:
            self.near(outputs[name], name, EVERY)

    @rule(name=names)
    def export(self, name: str) -> None:
        table = self.engine.tables[0]
        columns = table.export(NAMES.index(name))
        assert columns["ids"].tolist() == sorted(self.met[name])
        if len(columns["ids"]):
            self.near(columns["embedding"], name, columns["ids"])

    @rule(name=names, ids=few_ids)
    def erase(self, name: str, ids: Tensor) -> None:
        self.engine.tables[0].erase(NAMES.index(name), ids)
        self.forget(name, ids)

    @rule(remainder=st.integers(0, 4), rows=st.sampled_from([None, 2]))
    def evict(self, remainder: int, rows: int | None) -> None:
        def chosen(rows: Rows) -> Tensor:
            return rows.ids % 5 == remainder

        if rows is None:
            self.engine.evict(chosen)
        else:
            list(self.engine.evict(chosen, rows_per_call=rows))
        for name in NAMES:
            self.forget(name, EVERY[remainder::5])

    def forget(self, name: str, ids: Tensor) -> None:
        self.met[name] -= set(ids.tolist())
        self.dense[name].forget(ids)

    @rule(name=names, ids=few_ids, value=st.floats(-2, 2, width=32))
    def insert(self, name: str, ids: Tensor, value: float) -> None:
        """Write embeddings; new rows have missed no step and have no moments."""
        fresh = torch.tensor([i for i in ids.tolist() if i not in self.met[name]], dtype=torch.int64)
        values = torch.full((len(ids), DIM), value)
        self.engine.tables[0].insert(NAMES.index(name), ids, {"embedding": values})
        dense = self.dense[name]
        dense.write(ids, values)
        for state in dense.optimizer.state[dense.weights[0]].values():
            if isinstance(state, Tensor) and state.dim() == 2:
                state[fresh] = 0.0
        self.met[name] |= set(ids.tolist())

    @rule()
    def compact(self) -> None:
        self.engine.compact()

    @rule(delta=st.booleans())
    def save(self, delta: bool) -> None:
        self.count += 1
        self.saver.save(self.count, {"engine": self.engine, "sparse": self.optimizer}, delta=delta)
        self.saved = True

    @rule(delta=st.booleans())
    def restart(self, delta: bool) -> None:
        """Save, and go on with a new engine."""
        self.save(delta)
        self.engine, self.optimizer = self.make()
        self.saver.load({"engine": self.engine, "sparse": self.optimizer})

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


def test_exact_optimizers_behave_like_dense_ones() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        ExactMachine,
        settings=settings(
            max_examples=15 * SOAK,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
