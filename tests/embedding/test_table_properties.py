"""Comparison of an engine with a Python dict, over random sequences of all operations that change tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingBlocks, EmbeddingConfig, EmbeddingEngine, Placement, Uniform, Unused
from recis_hybrid.embedding.initializers import table_key
from tests.support import philox
from tests.support.caches import cached
from tests.support.devices import EDGE_IDS

DIM, LR, SEED = 5, 0.5, 11
NAMES = ("a", "b")
ids_of_a_batch = st.lists(
    st.one_of(st.integers(-4, 12), st.sampled_from(EDGE_IDS), st.integers(-(2**63), 2**63 - 1)), max_size=20
)
Row = tuple[np.ndarray, int, int, int]  # embedding, updated step, seen step, frequency


def first_value(name: str, i: int) -> np.ndarray:
    return philox.uniform(table_key(SEED, name), np.array([i]), DIM, -1.0, 1.0)[0]


class TableMachine(RuleBasedStateMachine):
    """Random operations on an engine; ``model`` holds the expected rows."""

    device = "cpu"
    placement: Placement | None = None

    @initialize(coalesce=st.booleans())
    def build(self, coalesce: bool) -> None:
        self.model: dict[tuple[str, int], Row] = {}
        self.step = 0
        self.engine, self.optimizer = self.build_engine(coalesce)

    def build_engine(self, coalesce: bool) -> tuple[EmbeddingEngine, optim.SGD]:
        config = EmbeddingConfig(dim=DIM, initializer=Uniform(-1.0, 1.0), placement=self.placement)
        engine = EmbeddingEngine(dict.fromkeys(NAMES, config), seed=SEED, coalesce=coalesce, device=self.device)
        for table in engine.tables:  # small blocks, so that they grow often
            pinned, cache_bytes = self.placement is not None, getattr(self.placement, "cache_bytes", 0)
            table.store.blocks = EmbeddingBlocks(
                table.layout, table.device, block_rows=8, pinned=pinned, cache_bytes=cache_bytes
            )
        return engine, optim.SGD(engine.parameters(), lr=LR)

    def places(self) -> dict[str, tuple[int, int]]:
        return {m.name: (t, k) for t, table in enumerate(self.engine.tables) for k, m in enumerate(table.members)}

    @rule(a=ids_of_a_batch, b=ids_of_a_batch, seed=st.integers(0, 99), update=st.booleans())
    def train(self, a: list[int], b: list[int], seed: int, update: bool) -> None:
        batch = {"a": torch.tensor(a, dtype=torch.int64), "b": torch.tensor(b, dtype=torch.int64)}
        outputs = self.engine.train()(batch)
        generator = torch.Generator().manual_seed(seed)
        sums: dict[tuple[str, int], np.ndarray] = {}
        gradients = []
        for name, ids in (("a", a), ("b", b)):
            gradients.append(torch.randn(len(ids), DIM, generator=generator))
            for i, out, g in zip(ids, outputs[name].detach().cpu().numpy(), gradients[-1].numpy(), strict=True):
                w, updated, _, frequency = self.model.get((name, i), (first_value(name, i), 0, 0, 0))
                assert np.array_equal(out, w)
                self.model[name, i] = (w, updated, self.step + 1, frequency + 1)
                sums[name, i] = sums.get((name, i), np.zeros(DIM, np.float32)) + g
        if update:
            torch.autograd.backward(list(outputs.values()), [gradient.to(self.device) for gradient in gradients])
            self.optimizer.step()
            self.step += 1
            for key, g in sums.items():
                w, _, seen, frequency = self.model[key]
                self.model[key] = (w - np.float32(LR) * g, self.step, seen, frequency)

    @rule(name=st.sampled_from(NAMES), ids=ids_of_a_batch)
    def evaluate(self, name: str, ids: list[int]) -> None:
        other = torch.empty(0, dtype=torch.int64)
        batch = {n: torch.tensor(ids, dtype=torch.int64) if n == name else other for n in NAMES}
        got = self.engine.eval()(batch)[name].cpu().numpy()
        for i, out in zip(ids, got, strict=True):
            assert np.array_equal(out, self.model[name, i][0] if (name, i) in self.model else first_value(name, i))

    @rule(name=st.sampled_from(NAMES), ids=st.sets(st.integers(-4, 12), max_size=8), value=st.floats(-1, 1, width=32))
    def insert(self, name: str, ids: set[int], value: float) -> None:
        table, member = self.places()[name]
        tensor = torch.tensor(sorted(ids), dtype=torch.int64)
        embedding = torch.full((len(ids), DIM), value)
        self.engine.tables[table].insert(member, tensor, {"embedding": embedding})
        for i in ids:
            _, updated, seen, frequency = self.model.get((name, i), (None, 0, 0, 0))
            self.model[name, i] = (embedding[0].numpy(), updated, max(seen, self.step), frequency)

    @rule(name=st.sampled_from(NAMES), ids=ids_of_a_batch)
    def erase(self, name: str, ids: list[int]) -> None:
        table, member = self.places()[name]
        existing = {i for i in ids if (name, i) in self.model}
        assert self.engine.tables[table].erase(member, torch.tensor(ids, dtype=torch.int64)) == len(existing)
        for i in existing:
            del self.model[name, i]

    @rule(name=st.sampled_from(NAMES))
    def clear(self, name: str) -> None:
        table, member = self.places()[name]
        self.engine.tables[table].clear(member)
        self.model = {key: row for key, row in self.model.items() if key[0] != name}

    @rule(steps=st.integers(1, 4))
    def evict(self, steps: int) -> None:
        remaining = {key: row for key, row in self.model.items() if row[2] > self.step - steps}
        assert self.engine.evict(Unused(steps)) == len(self.model) - len(remaining)
        self.model = remaining

    @rule()
    def compact(self) -> None:
        self.engine.compact()
        for table in self.engine.tables:
            assert table.store.id_map.row_bound == len(table)

    @rule(coalesce=st.booleans())
    def save_and_load(self, coalesce: bool) -> None:
        state = self.engine.checkpoint_state()
        self.engine, self.optimizer = self.build_engine(coalesce)
        self.engine({name: torch.tensor([12345]) for name in NAMES})  # removed by loading the state
        self.engine.load_checkpoint_state(state)

    @invariant()
    def rows_equal_the_model(self) -> None:
        for name, (table, member) in self.places().items():
            columns = {column: values.cpu() for column, values in self.engine.tables[table].export(member).items()}
            expected = sorted(i for n, i in self.model if n == name)
            assert columns["ids"].tolist() == expected
            for at, i in enumerate(expected):
                w, *meta = self.model[name, i]
                assert np.array_equal(columns["embedding"][at].numpy(), w)
                assert [int(columns[c][at]) for c in ("updated_step", "seen_step", "frequency")] == meta
        assert sum(len(table) for table in self.engine.tables) == len(self.model)


TestTables = TableMachine.TestCase
TestTables.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class CachedTableMachine(TableMachine):
    """The same with few records in a GPU cache, which lookups replace and every other operation sees through."""

    device = "emulated"
    placement = cached(1, None, dim=DIM)


TestCachedTables = pytest.mark.emulated(CachedTableMachine.TestCase)
TestCachedTables.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
