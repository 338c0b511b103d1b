"""Comparison of an engine with a Python dict, over random sequences of all operations that change tables."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from recis_hybrid import ops
from recis_hybrid.checkpointing import rank_of_bucket
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, IdMap, Placement, Uniform
from recis_hybrid.embedding.sweeps import CompactionSweep, EvictionSweep
from recis_hybrid.embedding.table import blocks, store
from recis_hybrid.saver import Saver
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from tests.support.caches import cached
from tests.support.chunks import hash_of, tiny_chunks
from tests.support.devices import EDGE_IDS
from tests.support.ranks import all_of
from tests.support.rows import assert_every_row_is_used_or_free
from tests.support.schedules import SOAK
from tests.support.table_model import TableModel
from tests.support.table_rules import EVICTIONS, GATES, RULES, EvictionCase, Row, Unwanted

DIM, SEED = 5, 11
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("a", "b", "gated")
ids_of_a_batch = st.lists(
    st.one_of(st.integers(-4, 12), st.sampled_from(EDGE_IDS), st.integers(-(2**63), 2**63 - 1)), max_size=12
)
evictions = st.one_of(
    st.sampled_from(sorted(EVICTIONS)),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from(sorted(EVICTIONS)), min_size=1),
)
"""A rule for all tables, or some tables with a rule each."""
few_ids = st.sets(st.one_of(st.integers(-4, 12), st.sampled_from(EDGE_IDS)), max_size=8)


@dataclass
class Eviction:
    """An eviction that is spread over calls."""

    drawn: str | dict[str, str]
    sweep: EvictionSweep
    cases: dict[str, EvictionCase]
    """Rules that decide about the rows of each share."""
    ranked: dict[str, Unwanted]
    """Results of the rules that ranked all rows at the beginning."""
    since: int
    """Steps done at the beginning."""

    def skip(self, name: str) -> None:
        """Drop a table that was cleared."""
        self.cases.pop(name, None)
        self.ranked.pop(name, None)


@dataclass
class Saved:
    """Expected contents of a checkpoint."""

    model: dict[str, TableModel]
    step: int
    incremental: bool
    eviction: tuple[Eviction, str] | None
    """An eviction in progress, with its state."""
    is_verified: bool = False


class TableMachine(RuleBasedStateMachine):
    """Random operations on an engine, and on the model of its tables."""

    device = "cpu"
    steps = 0
    """Operations of all runs of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.patches = ExitStack()
        # Tables that grow often: small blocks, and maps that are small and grow in place.
        self.patches.enter_context(tiny_chunks(2, 3))
        self.patches.enter_context(mock.patch.object(store, "IdMap", functools.partial(IdMap, capacity=64)))
        self.patches.enter_context(mock.patch.object(blocks, "_rows_of_a_block", return_value=8))
        self.now = 1000.0
        clock = SimpleNamespace(time=lambda: self.now)
        self.patches.enter_context(mock.patch("recis_hybrid.embedding.eviction.time", clock))

    def teardown(self) -> None:
        self.patches.close()
        if hasattr(self, "saver"):
            self.saver.wait()
        shutil.rmtree(self.root)

    @initialize(
        rule=st.sampled_from(sorted(RULES)),
        gate=st.sampled_from(sorted(GATES)),
        zeros=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        coalesce=st.booleans(),
        asynchronous=st.booleans(),
        keep=st.sampled_from([1, 2, None]),
    )
    def build(
        self,
        rule: str,
        gate: str,
        zeros: bool,
        dtype: torch.dtype,
        coalesce: bool,
        asynchronous: bool,
        keep: int | None,
    ) -> None:
        self.rule, self.dtype, self.zeros = RULES[rule], dtype, zeros
        self.admission, model = GATES[gate]
        self.model = {
            name: TableModel(
                name, DIM, SEED, dtype, self.rule, model() if model is not None and name == "gated" else None, zeros
            )
            for name in NAMES
        }
        self.step, self.asynchronous = 0, asynchronous
        self.engine, self.optimizer = self.build_engine(coalesce)
        self.forget_sweeps()
        self.make_saver = functools.partial(Saver, self.root / "run", keep=keep, async_save=asynchronous)
        self.saver = self.make_saver()
        self.saved: dict[int, Saved] = {}
        self.incremental = False
        """True if the next incremental save can build on an earlier checkpoint."""

    def forget_sweeps(self) -> None:
        self.eviction: Eviction | None = None
        self.compaction: CompactionSweep | None = None

    def placement(self) -> Placement | None:
        """Return the placement of the tables."""
        return None

    def build_engine(self, coalesce: bool, device: str = "", seed: int = SEED) -> tuple[EmbeddingEngine, Any]:
        """Return an empty engine of the same tables, and its optimizer; elsewhere on another device."""
        config = functools.partial(
            EmbeddingConfig,
            dim=DIM,
            dtype=self.dtype,
            initializer=Uniform(-1.0, 1.0),
            unknown="zeros" if self.zeros else "first_value",
            placement=None if device else self.placement(),
        )
        configs = {name: config(admission=self.admission if name == "gated" else None) for name in NAMES}
        engine = EmbeddingEngine(
            configs,
            optimizer=self.rule.spec,
            seed=seed,
            coalesce=coalesce,
            device=device or self.device,
            group=False,
        )
        return engine, engine.make_optimizer()

    def place(self, name: str) -> tuple[Any, int]:
        """Return the logical table of a member table, and its number there."""
        return next((t, k) for t in self.engine.tables for k, m in enumerate(t.members) if m.name == name)

    def batch(self, **ids: list[int]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(ids.get(name, []), dtype=torch.int64, device=self.device) for name in NAMES}

    def parts(self) -> dict[str, object]:
        return {"engine": self.engine, "sparse": self.optimizer}

    # Training

    def train_on(self, batch: dict[str, list[int]], seed: int, update: str) -> None:
        """Look up a batch, and update its rows: ``backward``, twice ``accumulate``, ``functional``, or not at all."""
        self.engine.train()
        generator = torch.Generator().manual_seed(seed)
        sums: dict[str, dict[int, np.ndarray]] = {name: {} for name in NAMES}
        for _ in range(2 if update == "accumulate" else 1):
            if update == "functional":
                outputs, lookup = self.engine.lookup(self.batch(**batch))
            else:
                outputs = self.engine(self.batch(**batch))
            gradients = {}
            for name in NAMES:
                ids = batch.get(name, [])
                expected = self.model[name].look_up(ids, self.step + 1)
                assert np.array_equal(outputs[name].detach().double().cpu().numpy(), expected), name
                gradients[name] = torch.randn(len(ids), DIM, generator=generator)
                for i, g in zip(ids, gradients[name].numpy(), strict=True):
                    if i in self.model[name].rows:  # gradients of ids that are not admitted are dropped
                        sums[name][i] = sums[name].get(i, np.zeros(DIM, np.float32)) + g  # in this order
            on_device = {name: gradient.to(self.device) for name, gradient in gradients.items()}
            if update == "functional":
                self.engine.apply_gradients(lookup, on_device, self.optimizer)
            elif update:
                torch.autograd.backward(list(outputs.values()), list(on_device.values()))
        if not update:
            return
        if update != "functional":
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.step += 1
        for name in NAMES:
            summed = {i: g.astype(np.float64) for i, g in sums[name].items()}
            self.model[name].update(summed, self.step, self.columns(self.engine, name))

    @rule(
        a=ids_of_a_batch,
        b=ids_of_a_batch,
        gated=ids_of_a_batch,
        seed=st.integers(0, 99),
        update=st.sampled_from(["backward", "backward", "accumulate", "functional", ""]),
    )
    def train(self, a: list[int], b: list[int], gated: list[int], seed: int, update: str) -> None:
        self.train_on({"a": a, "b": b, "gated": gated}, seed, update)

    @rule(name=st.sampled_from(NAMES), first=st.integers(-(2**63), 2**63 - 1), count=st.integers(20, 60))
    def grow(self, name: str, first: int, count: int) -> None:
        """Train on many new ids, far from each other."""
        ids = [(first + k * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for k in range(count)]
        self.train_on({name: ids}, 0, "backward")

    @rule(name=st.sampled_from(NAMES), ids=ids_of_a_batch)
    def evaluate(self, name: str, ids: list[int]) -> None:
        got = self.engine.eval()(self.batch(**{name: ids}))[name]
        assert np.array_equal(got.double().cpu().numpy(), self.model[name].vectors(ids))

    @rule(how=st.sampled_from(["erase", "evict", "compact", "clear"]))
    def use_after_removal(self, how: str) -> None:
        """Apply the gradients of a lookup whose rows were removed or moved since."""
        _, lookup = self.engine.train().lookup(self.batch(a=[3, 3, -1]))
        self.age()
        self.model["a"].look_up([3, 3, -1], self.step + 1)
        table, member = self.place("a")
        if how == "erase":
            assert table.erase(member, torch.tensor([3])) == self.model["a"].erase([3])
        elif how == "clear":
            self.clear("a")
        else:
            self.evict("unused for 1") if how == "evict" else self.compact()
        gradients = {name: torch.ones(3 if name == "a" else 0, DIM, device=self.device) for name in NAMES}
        with pytest.raises(RuntimeError, match="rows were cleared, erased or moved since"):
            self.engine.apply_gradients(lookup, gradients, self.optimizer)

    @rule(rule=st.sampled_from(sorted(name for name, case in EVICTIONS.items() if not case.timed)))
    def refuse_while_gradients_are_pending(self, rule: str) -> None:
        output = self.engine.train()(self.batch(a=[5]))["a"]
        self.age()
        self.model["a"].look_up([5], self.step + 1)
        output.sum().backward()
        with pytest.raises(RuntimeError, match="call the optimizer's step or zero_grad first"):
            self.engine.evict(EVICTIONS[rule].rule)
        self.optimizer.zero_grad()

    # Changes of rows

    @rule(name=st.sampled_from(NAMES), ids=few_ids, value=st.floats(-1, 1, width=16), meta=st.booleans())
    def insert(self, name: str, ids: set[int], value: float, meta: bool) -> None:
        table, member = self.place(name)
        columns = {"embedding": torch.full((len(ids), DIM), value)}
        numbers = (self.step, self.step // 2, 7) if meta else None
        if numbers is not None:
            names = ("updated_step", "seen_step", "frequency")
            columns |= {column: torch.full((len(ids),), n) for column, n in zip(names, numbers, strict=True)}
        table.insert(member, torch.tensor(sorted(ids), dtype=torch.int64), columns)
        stored = torch.full((DIM,), value).to(self.dtype).double().numpy()
        self.model[name].insert(ids, {"embedding": stored}, numbers, self.step)

    @rule(name=st.sampled_from(NAMES), ids=ids_of_a_batch)
    def erase(self, name: str, ids: list[int]) -> None:
        table, member = self.place(name)
        assert table.erase(member, torch.tensor(ids, dtype=torch.int64)) == self.model[name].erase(ids)

    @rule(name=st.sampled_from([*NAMES, None]))
    def clear(self, name: str | None) -> None:
        """Clear a member table, or all that are coalesced with ``a``."""
        table, member = self.place(name or "a")
        table.clear(None if name is None else member)
        for each in [m.name for m in table.members] if name is None else [name]:
            self.model[each].clear()
            if name is None and self.eviction is not None:
                self.eviction.skip(each)

    @rule(seconds=st.sampled_from([1.0, 5.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def drawn_rules(self, drawn: str | dict[str, str]) -> tuple[Any, dict[str, EvictionCase]]:
        """Return rules as the engine takes them, and by name of the member table."""
        if isinstance(drawn, str):
            return EVICTIONS[drawn].rule, dict.fromkeys(NAMES, EVICTIONS[drawn])
        cases = {name: EVICTIONS[rule] for name, rule in drawn.items()}
        return {name: case.rule for name, case in cases.items()}, cases

    def unwanted(self, cases: dict[str, EvictionCase], step: int) -> dict[str, Unwanted]:
        size = self.engine.tables[0].layout.record_bytes
        return {name: self.model[name].unwanted(case, step, self.now, size) for name, case in cases.items()}

    @rule(drawn=evictions)
    def evict(self, drawn: str | dict[str, str]) -> None:
        """Evict from all tables, or from some by different rules."""
        rules, cases = self.drawn_rules(drawn)
        unwanted = self.unwanted(cases, self.step)
        assert self.engine.evict(rules) == sum(self.model[name].evict(each) for name, each in unwanted.items())

    @rule(drawn=evictions, rows=st.integers(1, 60), calls=st.integers(0, 3))
    def begin_eviction(self, drawn: str | dict[str, str], rows: int, calls: int) -> None:
        rules, cases = self.drawn_rules(drawn)
        ranked = {name: case for name, case in cases.items() if case.ranks}
        others = {name: case for name, case in cases.items() if not case.ranks}
        sweep = self.engine.evict(rules, rows_per_call=rows)
        self.eviction = Eviction(drawn, sweep, others, self.unwanted(ranked, self.step), self.step)
        self.continue_eviction(calls)

    @precondition(lambda self: self.eviction is not None)
    @rule(calls=st.integers(1, 4))
    def continue_eviction(self, calls: int) -> None:
        for _ in range(calls):
            if (eviction := self.eviction) is None:
                return
            number, count, since = eviction.sweep.done, eviction.sweep.calls, eviction.since
            if number == count:
                assert next(eviction.sweep, None) is None
                self.eviction = None
                return
            evicted = 0
            for name, unwanted in {**self.unwanted(eviction.cases, since), **eviction.ranked}.items():
                member = self.place(name)[1]

                def due(i: int, row: Row, member: int = member, share: Any = (number, count, since)) -> bool:
                    return (hash_of(i, member) >> 32) * share[1] >> 32 == share[0] and row.seen <= share[2]

                evicted += self.model[name].evict(unwanted, due)
            assert next(eviction.sweep) == evicted

    @rule(rows=st.integers(1, 60))
    def begin_compaction(self, rows: int) -> None:
        self.compaction = self.engine.compact(rows_per_call=rows)

    @precondition(lambda self: self.compaction is not None)
    @rule()
    def continue_compaction(self) -> None:
        assert self.compaction is not None
        if next(self.compaction, None) is None:
            self.compaction = None

    @rule()
    def compact(self) -> None:
        self.engine.compact()
        for table in self.engine.tables:
            assert table.store.id_map.row_bound == len(table)

    # Checkpoints

    @rule(coalesce=st.booleans())
    def copy_state(self, coalesce: bool) -> None:
        """Load the state into another engine, and go on with that one."""
        self.age()
        states = self.engine.checkpoint_state(), self.optimizer.checkpoint_state()
        self.engine, self.optimizer = self.build_engine(coalesce, seed=9)
        self.forget_sweeps()
        self.engine(self.batch(a=[12345], gated=[1, 1]))  # removed by loading the state
        self.engine.load_checkpoint_state(states[0])
        self.optimizer.load_checkpoint_state(states[1])
        self.saver.wait()
        del self.saver
        self.saver, self.incremental = self.make_saver(), False

    def age(self) -> None:
        """Age the state of admission, as lookups and saves do."""
        for model in self.model.values():
            if model.gate is not None:
                model.gate.age(self.step)

    @rule(delta=st.sampled_from([True, True, True, False]))
    def save(self, delta: bool) -> None:
        """Save; other operations may run before a save in the background ends."""
        number = max(self.saved, default=0) + 1
        self.age()
        self.saver.save(number, self.parts(), delta=delta)
        eviction = (
            None
            if self.eviction is None
            else (
                replace(self.eviction, cases=dict(self.eviction.cases), ranked=dict(self.eviction.ranked)),
                json.dumps(self.eviction.sweep.state_dict()),
            )
        )
        self.saved[number] = Saved(copy.deepcopy(self.model), self.step, delta and self.incremental, eviction)
        self.incremental |= delta
        if not self.asynchronous:
            self.finish_saves()

    def finish_saves(self) -> list[int]:
        """Wait for the last save, load it into another engine, and return the checkpoints that were kept."""
        self.saver.wait()
        number, steps = max(self.saved), self.saver.steps()
        assert number in steps
        saved = self.saved[number]
        if not saved.is_verified:
            link = StoredCheckpoint(self.root / "run", number).manifest.previous
            assert (link is not None) == saved.incremental
            engine, _ = self.build_engine(number % 2 == 0, "cpu", seed=9)
            Saver(self.root / "run").load({"engine": engine}, number)
            for name in NAMES:
                self.compare(engine, name, saved.model[name])
            saved.is_verified = True
        return steps

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), fresh=st.booleans(), coalesce=st.booleans())
    def load(self, data: Any, fresh: bool, coalesce: bool) -> None:
        """Load any checkpoint that was kept, into this engine or another."""
        number = data.draw(st.sampled_from(self.finish_saves()))
        if fresh:
            self.copy_state(coalesce)
        self.saver.load(self.parts(), number)
        self.forget_sweeps()
        saved = self.saved[number]
        self.model, self.step = copy.deepcopy(saved.model), saved.step
        self.incremental |= saved.incremental
        self.resume_eviction(saved)

    def resume_eviction(self, saved: Saved) -> None:
        """Continue with the eviction in progress when a checkpoint was saved."""
        if saved.eviction is None:
            return
        eviction, state = saved.eviction
        sweep = self.engine.evict(self.drawn_rules(eviction.drawn)[0], rows_per_call=1)
        sweep.load_state_dict(json.loads(state))
        self.eviction = replace(eviction, sweep=sweep, cases=dict(eviction.cases), ranked=dict(eviction.ranked))

    @precondition(lambda self: self.saved)
    @rule(size=st.sampled_from([2, 3]), coalesce=st.booleans())
    def reshard(self, size: int, coalesce: bool) -> None:
        """Load the last checkpoint on several ranks, save it there, and load that checkpoint."""
        self.finish_saves()
        number = max(self.saved)
        model = self.saved[number].model

        def read_and_write(rank: int, group: dist.ProcessGroup) -> None:
            engine, optimizer = self.build_engine(coalesce, "cpu", seed=rank)
            parts = {"engine": engine, "sparse": optimizer}
            Saver(self.root / "run", group=group).load(parts, number)
            for name in NAMES:
                self.compare(engine, name, model[name], lambda i: _owner(i, size) == rank)
            Saver(self.root / "resharded", group=group).save(number, parts)

        all_of(size, read_and_write, seconds=300)
        Saver(self.root / "resharded").load(self.parts(), number)
        self.forget_sweeps()
        shutil.rmtree(self.root / "resharded")
        self.model, self.step = copy.deepcopy(model), self.saved[number].step
        self.resume_eviction(self.saved[number])
        self.incremental = False
        del self.saver
        self.saver = self.make_saver()

    # Comparison

    def columns(self, engine: EmbeddingEngine, name: str) -> dict[str, torch.Tensor]:
        table, member = next((t, k) for t in engine.tables for k, m in enumerate(t.members) if m.name == name)
        return {column: values.cpu() for column, values in table.export(member).items()}

    def compare(self, engine: EmbeddingEngine, name: str, model: TableModel, owns: Any = lambda i: True) -> None:
        """Assert that a table of an engine equals its model, for the ids that it owns."""
        table, member = next((t, k) for t in engine.tables for k, m in enumerate(t.members) if m.name == name)
        gate = table.store.gate
        counts = None if gate is None else {n: values.tolist() for n, values in gate.state_dict(member).items()}
        model.check(self.columns(engine, name), counts, owns)

    @invariant()
    def rows_equal_the_model(self) -> None:
        type(self).steps += 1
        for name in NAMES:
            self.compare(self.engine, name, self.model[name])
        assert sum(len(table) for table in self.engine.tables) == sum(len(m.rows) for m in self.model.values())
        assert all(table.step == self.step for table in self.engine.tables)
        for table in self.engine.tables:
            assert_every_row_is_used_or_free(table)


def _owner(i: int, size: int) -> int:
    return int(rank_of_bucket(ops.id_map.bucket_of(torch.tensor([i])), size))


class EmulatedTableMachine(TableMachine):
    """The kernels of CUDA."""

    device = "emulated"


class CachedTableMachine(EmulatedTableMachine):
    """With few records in a GPU cache, which lookups replace and every other operation sees through."""

    def placement(self) -> Placement:
        return cached(1, self.rule.spec, dim=DIM, dtype=self.dtype)


class DiskTableMachine(TableMachine):
    """With few records in memory, and the others on disk."""

    def placement(self) -> Placement:
        return Placement(blocks="disk", path=self.root, cache_bytes=80 * 512)


STEPS = 30
"""Operations of a sequence."""
# Sequences of a run in CI, and of `make soak` for each unit of SOAK, which come to 100,000 operations.
MACHINES = [
    pytest.param(TableMachine, 18, 160, id="cpu"),
    pytest.param(EmulatedTableMachine, 3, 14, id="emulated", marks=pytest.mark.emulated),
    pytest.param(CachedTableMachine, 1, 5, id="cached", marks=pytest.mark.emulated),
    pytest.param(DiskTableMachine, 3, 5, id="disk"),
]


@pytest.mark.parametrize(("machine", "in_ci", "in_soak"), MACHINES)
def test_tables_behave_like_a_dict(machine: type[TableMachine], in_ci: int, in_soak: int) -> None:
    machine.steps = 0
    examples = in_ci if SOAK == 1 else in_soak * SOAK
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    if SOAK > 1:
        assert machine.steps >= 0.75 * examples * STEPS  # some sequences are shorter
