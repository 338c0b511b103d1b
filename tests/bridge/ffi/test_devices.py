"""Lookups and updates inside jit on an accelerator: schedules, lack of memory, what is queued, and refused devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, Placement
from recis_hybrid.ops import _library
from tests.support import emulated
from tests.support.devices import late_streams
from tests.support.jit_tables import TorchTables, assert_equal_tables, engine_of, words
from tests.support.near import assert_near
from tests.support.schedules import Schedule, on_schedules

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import ffi  # noqa: E402
from recis_hybrid.bridge.ffi.native import handlers  # noqa: E402
from recis_hybrid.bridge.ffi.tables import is_known_to_jax  # noqa: E402


@on_schedules(4)
def test_steps_and_failures_under_schedules(schedule: Schedule) -> None:
    configs = {
        "one": EmbeddingConfig(dim=4, initializer=Normal(0, 1)),
        "bag": EmbeddingConfig(dim=4, initializer=Normal(0, 1), combiner="mean", table="shared"),
        "each": EmbeddingConfig(dim=4, initializer=Normal(0, 1), combiner=None, table="shared"),
        "odd": EmbeddingConfig(dim=3, initializer=Normal(0, 1), placement=Placement(id_map="cuda", blocks="pinned")),
    }
    with schedule.running():
        random = np.random.default_rng(schedule.seed)
        ours, theirs = (EmbeddingEngine(configs, optimizer=optim.Adam, device="emulated") for _ in range(2))
        tables = ffi.JitTables(ours, ours.make_optimizer(lr=0.1))
        outside = TorchTables(theirs, theirs.make_optimizer(lr=0.1))

        @jax.jit
        def step(ids: Any, token: Any) -> Any:
            vectors, ctx, token = ffi.lookup(tables, ids, None, token)
            gradients = jax.tree.map(lambda vector: vector * 0.5 + 0.25, vectors)
            return vectors, gradients, ffi.update(tables, ctx, gradients, token)

        def draw(low: int) -> dict[str, Any]:
            shapes = {"one": 100, "bag": (20, 3), "each": (10, 2), "odd": 100}
            return {name: random.integers(low, low + 200, shape) for name, shape in shapes.items()}

        def check(ids: dict[str, Any], room: int) -> None:
            found, gradients, token = step({name: words(part) for name, part in ids.items()}, tables.begin(room))
            tables.end(token)
            tables.wait()
            expected, ctx = outside.lookup(ids)
            outside.apply_gradients(ctx, gradients)
            assert all((found[name] == expected[name]).all() for name in configs)

        for turn in range(3):
            check(draw(50 * turn), room=400)
            if turn == 1:  # the next new ids get the rows of these
                for engine in (ours, theirs):
                    assert all(table.erase(0, torch.arange(50, 150, device="emulated")) for table in engine.tables)
        assert_equal_tables(ours, theirs)

        # More new ids than there is room for: the kernels insert some of them, and withdraw them again.
        limit = max(int(0.75 * table.store.id_map.capacity) for table in ours.tables)
        many = {**draw(0), "one": np.arange(1000, 1000 + limit)}
        with pytest.raises(RuntimeError, match="had more new ids than there was room for"):
            check(many, room=0)
        assert_equal_tables(ours, theirs)
        check(many, room=limit + 400)
        assert_equal_tables(ours, theirs)


def simple_step(tables: ffi.JitTables) -> Any:
    @jax.jit
    def step(ids: Any, token: Any) -> Any:
        vectors, ctx, token = ffi.lookup(tables, {"item": ids}, None, token)
        return ffi.update(tables, ctx, vectors, token)

    return step


@pytest.mark.emulated
def test_a_step_queues_kernels_only() -> None:
    engine = engine_of(optim.Adagrad, device="emulated")
    tables = ffi.JitTables(engine, engine.make_optimizer(lr=0.1))
    step, ids = simple_step(tables), words(np.arange(50))
    tables.end(jax.block_until_ready(step(ids, tables.begin(room=50))))
    token = tables.begin(room=50)
    emulated.clear_counts()
    token = jax.block_until_ready(step(ids, token))
    counts = emulated.counts()
    tables.end(token)
    # Of the lookup: start, insert, commit, first values, undo, sources, keys, order, last group, gather, end, clear; of
    # the update: start, update, end.
    assert counts["launches"] == 15
    assert counts["cub_calls"] == 3
    assert not any(counts[name] for name in counts if name not in ("launches", "cub_calls"))


@pytest.mark.emulated
def test_lack_of_memory_leaves_tables_whole() -> None:
    engine, whole = (engine_of(optim.Adagrad, device="emulated") for _ in range(2))
    tables, outside = ffi.JitTables(engine, engine.make_optimizer(lr=0.1)), TorchTables(whole)
    step, ids = simple_step(tables), np.arange(600)  # several chunks of gradients
    reasons = []
    for number in range(1, 30):
        token = tables.begin(room=700)
        with emulated.failing_allocation(number):
            try:
                tables.end(jax.block_until_ready(step(words(ids), token)))
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                reasons.append(str(error))
                continue
        tables.wait()
        break
    assert len(reasons) > 10
    assert all("out of device memory" in reason for reason in reasons)
    assert engine.tables[0].step == 1
    # Rows that a failed step has inserted had their first values.
    first, _ = outside.lookup({"item": ids})
    vectors, _, token = ffi.lookup(tables, {"item": ids}, None, tables.begin(room=0), train=False)
    tables.end(token)
    state = torch.from_numpy(first["item"]).square()
    expected = torch.from_numpy(first["item"]) - 0.1 * torch.from_numpy(first["item"]) / (state.sqrt() + 1e-10)
    assert_near(vectors["item"], expected)


@pytest.mark.emulated
def test_tables_wait_for_what_torch_has_queued() -> None:
    with late_streams("emulated", 2):
        engine = engine_of(optim.SGD, device="emulated")
        outside, tables = TorchTables(engine), ffi.JitTables(engine, engine.make_optimizer(lr=0.1))
        for number in range(3):  # grows while earlier lookups are queued
            ids = np.arange(600 * number, 600 * (number + 1))
            engine.lookup({"item": torch.from_numpy(ids)})
            tables.end(simple_step(tables)(words(ids), tables.begin(room=600)))
        found, _ = outside.lookup({"item": np.arange(1800)}, train=False)
    fresh, _ = TorchTables(engine_of(optim.SGD)).lookup({"item": np.arange(1800)}, train=False)
    assert_near(found["item"], 0.9 * fresh["item"])


@pytest.mark.emulated
def test_devices_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EmbeddingConfig(dim=4)
    cached = EmbeddingConfig(dim=4, placement=Placement(id_map="cuda", blocks="pinned", cache_bytes=1 << 20))
    with pytest.raises(NotImplementedError, match="table item: a cache of records is not supported inside jit"):
        ffi.JitTables(EmbeddingEngine({"item": cached}, device="emulated"))
    mixed = {"a": config, "b": EmbeddingConfig(dim=8, placement=Placement(id_map="cpu", blocks="cpu"))}
    with pytest.raises(NotImplementedError, match=r"all tables must be on one device, got \['cpu', 'emulated:0'\]"):
        ffi.JitTables(EmbeddingEngine(mixed, device="emulated"))
    monkeypatch.delitem(_library.TABLE_KERNELS, "emulated")
    with pytest.raises(NotImplementedError, match="table item: it is on emulated:0, for which no library is loaded"):
        ffi.JitTables(engine_of(None, device="emulated"))


def test_functions_for_other_devices_are_refused() -> None:
    tables = ffi.JitTables(engine_of(None))
    look_up = jax.jit(lambda token: ffi.lookup(tables, {"item": np.arange(3)}, None, token)[2])
    token = tables.begin(room=3)
    with pytest.raises(NotImplementedError, match=r"the table is of the platform cpu, but .* compiled for cuda"):
        look_up.trace(token).lower(lowering_platforms=("cuda",))
    tables._chain = handlers("cpu").Chain(_library.TABLE_KERNELS["cpu"], tables._state.address, 1, 3)
    with pytest.raises(Exception, match="tables are on cuda:3, but the function runs on the CPU"):
        jax.block_until_ready(ffi.lookup(tables, {"item": np.arange(3)}, None, tables.begin(room=3)))


def test_jax_must_have_the_device() -> None:
    assert is_known_to_jax(torch.device("cpu"))
    assert is_known_to_jax(torch.device("cuda")) == any(device.platform == "gpu" for device in jax.devices())


def test_calls_outside_a_lease_are_refused() -> None:
    tables = ffi.JitTables(engine_of(None))
    look_up = jax.jit(lambda token: ffi.lookup(tables, {"item": np.arange(3)}, None, token)[2])
    token = look_up(tables.begin(room=3))
    tables.end(token)
    tables.wait()
    with pytest.raises(Exception, match="the tables are not lent: lookups and updates run between"):
        jax.block_until_ready(look_up(token))
    assert len(tables.engine.tables[0]) == 3
