"""Tokens: order, loops, gradients, refused transformations, failures, and waiting."""

from __future__ import annotations

import functools
import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.embedding.eviction import Unused
from tests.support.chunks import tiny_chunks
from tests.support.devices import on_devices
from tests.support.jit_tables import TorchTables, assert_equal_tables, engine_of, rows_of, words
from tests.support.programs import run_code

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import ffi  # noqa: E402

IDS = np.array([3, 3, 5, 2**40], np.int64)


def tables_of(optimizer: Any = optim.Adagrad, device: str = "cpu", **settings: Any) -> ffi.JitTables:
    engine = engine_of(optimizer, device=device, **settings)
    return ffi.JitTables(engine, None if optimizer is None else engine.make_optimizer(lr=0.1))


def gradient_of(vectors: Any) -> Any:
    return jax.grad(lambda vectors: jnp.sin(vectors["item"]).sum())(vectors)


def train(tables: ffi.JitTables, ids: Any, token: Any) -> Any:
    vectors, ctx, token = ffi.lookup(tables, {"item": ids}, None, token)
    return ffi.update(tables, ctx, gradient_of(vectors), token)


def trained_outside(steps: int, ids: Any = IDS, optimizer: Any = optim.Adagrad, device: str = "cpu") -> EmbeddingEngine:
    engine = engine_of(optimizer, device=device)
    tables = TorchTables(engine, engine.make_optimizer(lr=0.1))
    gradient = jax.jit(gradient_of)
    for _ in range(steps):
        vectors, ctx = tables.lookup({"item": ids})
        tables.apply_gradients(ctx, gradient(vectors))
    return engine


def calls_of(tables: ffi.JitTables, function: Any) -> int:
    """Return how many lookups and updates a jitted function of a token runs."""
    token = tables.begin(room=100)
    before = tables._state.read().serial
    last = jax.block_until_ready(jax.jit(function)(token))
    calls = tables._state.read().serial - before
    tables.end(last)
    return calls


# Order and loops


def test_equal_calls_are_merged_without_a_token_and_not_with_one() -> None:
    tables = tables_of(None)

    def parallel(token: Any) -> Any:
        (_, _, one), (_, _, two) = (ffi.lookup(tables, {"item": IDS}, None, token) for _ in range(2))
        return jnp.maximum(one, two)

    def chained(token: Any) -> Any:
        for _ in range(2):
            _, _, token = ffi.lookup(tables, {"item": IDS}, None, token)
        return token

    assert calls_of(tables, parallel) == 1
    assert calls_of(tables, chained) == 2


def test_a_call_is_moved_out_of_a_loop_without_a_token_and_not_with_one() -> None:
    tables = tables_of(None)

    def constant(token: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            return jnp.maximum(carry, ffi.lookup(tables, {"item": IDS}, None, token)[2])

        return jax.lax.fori_loop(0, 5, body, token)

    def carried(token: Any) -> Any:
        return jax.lax.fori_loop(0, 5, lambda _, token: ffi.lookup(tables, {"item": IDS}, None, token)[2], token)

    assert calls_of(tables, constant) == 1
    assert calls_of(tables, carried) == 5


@on_devices
def test_scan_and_fori_loop_update_once_an_iteration(device: str) -> None:
    batches = np.stack([IDS, IDS + 1, IDS * 7, IDS])
    expected = engine_of(optim.Adam, device=device)
    outside = TorchTables(expected, expected.make_optimizer(lr=0.1))
    gradient = jax.jit(gradient_of)
    for batch in batches:
        vectors, ctx = outside.lookup({"item": batch})
        outside.apply_gradients(ctx, gradient(vectors))

    scanned, looped = tables_of(optim.Adam, device), tables_of(optim.Adam, device)

    @jax.jit
    def scan(batches: Any, token: Any) -> Any:
        return jax.lax.scan(lambda token, ids: (train(scanned, ids, token), None), token, batches)[0]

    @jax.jit
    def loop(batches: Any, token: Any) -> Any:
        return jax.lax.fori_loop(0, len(batches), lambda i, token: train(looped, batches[i], token), token)

    for tables, function in ((scanned, scan), (looped, loop)):
        tables.end(function(words(batches), tables.begin(room=16)))
        assert tables.engine.tables[0].step == 4
        assert_equal_tables(tables.engine, expected)


def test_cond_runs_one_branch() -> None:
    tables = tables_of()
    step = jax.jit(
        lambda flag, token: jax.lax.cond(flag, lambda token: train(tables, IDS, token), lambda token: token, token)
    )
    token = tables.begin(room=9)
    for flag in (True, False, True):
        token = step(flag, token)
    tables.end(token)
    assert_equal_tables(tables.engine, trained_outside(2))


@on_devices
def test_a_lookup_after_an_update_sees_it(device: str) -> None:
    tables = tables_of(optim.SGD, device)

    @jax.jit
    def step(token: Any) -> Any:
        before, ctx, token = ffi.lookup(tables, {"item": IDS[1:]}, None, token)
        token = ffi.update(tables, ctx, {"item": jnp.ones((3, 4))}, token)
        after, _, token = ffi.lookup(tables, {"item": IDS[1:]}, None, token, train=False)
        return before["item"] - jnp.float32(0.1), after["item"], token

    expected, after, token = step(tables.begin(room=3))
    tables.end(token)
    assert (after == expected).all()


@on_devices
def test_one_lease_serves_several_functions(device: str) -> None:
    tables = tables_of(device=device)
    step = jax.jit(lambda token: train(tables, IDS, token))
    token = tables.begin(room=9)
    for _ in range(3):
        token = step(token)
    tables.end(token)
    assert_equal_tables(tables.engine, trained_outside(3, device=device))


# Gradients


def loss_of(tables: ffi.JitTables, weight: Any, token: Any, ids: Any = IDS) -> Any:
    vectors, _, token = ffi.lookup(tables, {"item": ids}, None, token)
    return jnp.sin(vectors["item"] * weight).sum()


@on_devices
def test_the_gradient_of_the_token_is_the_token_of_the_update(device: str) -> None:
    tables = tables_of(device=device)
    step = jax.jit(jax.value_and_grad(lambda *arguments: loss_of(tables, *arguments), argnums=(0, 1)))
    loss, (of_weight, token) = step(1.0, tables.begin(room=4))
    tables.end(token)
    values = rows_of(engine_before())[0]["embedding"]
    position = torch.tensor([0, 0, 1, 2])
    np.testing.assert_allclose(loss, values[position].sin().sum(), rtol=1e-5)
    np.testing.assert_allclose(of_weight, (values[position] * values[position].cos()).sum(), rtol=1e-5)
    assert_equal_tables(tables.engine, trained_outside(1, device=device))


def engine_before() -> EmbeddingEngine:
    engine = engine_of(optim.Adagrad)
    TorchTables(engine).lookup({"item": IDS})
    return engine


@on_devices
def test_several_lookups_in_a_loss_update_in_reverse_order(device: str) -> None:
    tables = tables_of(optim.SGD, device)

    def loss(token: Any) -> Any:
        first, _, token = ffi.lookup(tables, {"item": IDS[1:3]}, None, token)
        second, _, token = ffi.lookup(tables, {"item": IDS[1:]}, None, token)
        return first["item"].sum() + 2 * second["item"].sum()

    before = rows_of(engine_before())[0]["embedding"]
    tables.end(jax.jit(jax.grad(loss))(tables.begin(room=3)))
    after = rows_of(tables.engine)[0]["embedding"].cpu()
    torch.testing.assert_close(after, before - 0.1 * torch.tensor([[3.0], [3.0], [2.0]]))
    assert tables.engine.tables[0].step == 2


def test_gradients_inside_scan() -> None:
    tables = tables_of()

    @jax.jit
    def steps(token: Any) -> Any:
        def body(token: Any, ids: Any) -> Any:
            return jax.grad(lambda token: loss_of(tables, 1.0, token, ids))(token), None

        return jax.lax.scan(body, token, words(np.stack([IDS] * 3)))[0]

    tables.end(steps(tables.begin(room=9)))
    assert_equal_tables(tables.engine, trained_outside(3))


@pytest.mark.parametrize("jit", [jax.jit, lambda function: function], ids=["jit", "no jit"])
def test_second_derivatives_are_refused(jit: Any) -> None:
    tables = tables_of()
    gradient = jax.grad(lambda token: loss_of(tables, 1.0, token))
    with pytest.raises(TypeError, match="table item: cannot be differentiated here.*jax.grad.* only"):
        jit(jax.grad(lambda token: gradient(token)[0]))(tables.begin(room=4))


def test_forward_mode_is_refused_by_jax() -> None:
    tables = tables_of()
    token = tables.begin(room=4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda token: loss_of(tables, 1.0, token), (token,), (token,))


def test_differentiating_an_update_is_refused() -> None:
    tables = tables_of()
    token = tables.begin(room=4)
    with pytest.raises(TypeError, match="bridge.ffi.update: table item"):
        jax.grad(lambda token: train(tables, IDS, token)[0])(token)


# Transformations over several devices or elements


def test_vmap_is_refused() -> None:
    tables = tables_of()
    token = tables.begin(room=4)
    with pytest.raises(NotImplementedError, match="bridge.ffi.lookup: table item: vmap would run"):
        jax.vmap(lambda ids: ffi.lookup(tables, {"item": ids}, None, token)[0]["item"])(jnp.zeros((2, 3), jnp.int32))
    _, ctx, token = ffi.lookup(tables, {"item": IDS}, None, token)
    with pytest.raises(NotImplementedError, match="bridge.ffi.update: table item: vmap would run"):
        jax.vmap(lambda gradient: ffi.update(tables, ctx, {"item": gradient}, token))(jnp.zeros((2, 4, 4)))


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_platforms", "cpu")
from jax.sharding import NamedSharding, PartitionSpec
from tests.bridge.ffi.test_tokens import tables_of, IDS
from recis_hybrid.bridge import ffi

tables = tables_of()
token = tables.begin(room=8)
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
ids = jnp.arange(4)
look_up = lambda ids, token: ffi.lookup(tables, {"item": ids}, None, token)[0]["item"]
sharded = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("x")))

def both(token):
    return jnp.stack([token, token])

def mapped(**more):
    specs = {"mesh": mesh, "in_specs": (PartitionSpec("x"), PartitionSpec()), "out_specs": PartitionSpec("x")}
    return jax.jit(jax.shard_map(look_up, **specs, **more))

for name, call in {
    "shard_map": lambda: mapped()(ids, token),
    "unchecked": lambda: mapped(check_vma=False)(ids, token),
    "sharded": lambda: jax.jit(look_up)(sharded, token),
    "pmap": lambda: jax.pmap(look_up)(ids.reshape(2, 2), both(token)),
}.items():
    try:
        call()
    except NotImplementedError as error:
        print(name, "|", error)
print(jax.jit(look_up)(ids, token).shape)
"""


def test_several_devices_are_refused(tmp_path: Path) -> None:
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = run_code(PROGRAM, folder=tmp_path, environment=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    for line, name in zip(lines, ("shard_map", "unchecked", "sharded", "pmap"), strict=False):
        assert line.startswith(f"{name} | bridge.ffi.lookup: table item: "), line
        assert "belongs to one device" in line
    assert lines[-1] == "(4, 4)"


# Failures


@on_devices
@pytest.mark.parametrize(("limit", "room"), [("slots", 5), ("rows", 1000)])
def test_too_many_new_ids_raise_and_change_nothing(
    device: str, limit: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recis_hybrid.embedding.table.blocks._BLOCK_BYTES", 1)  # the fewest rows in a block, 1024
    tables = tables_of(optim.SGD, device)
    table = tables.engine.tables[0]
    step = jax.jit(lambda batches, token: jax.lax.scan(lambda t, ids: (train(tables, ids, t), None), token, batches)[0])
    tables.end(step(words(np.arange(5)[None]), tables.begin(room=room)))
    rows, slots = table.store.blocks.capacity, int(0.75 * table.store.id_map.capacity)
    assert (slots < rows) == (limit == "slots")
    free = min(rows, slots) - len(table)
    before = trained_outside(1, np.arange(5), optim.SGD, device)
    assert_equal_tables(tables.engine, before)
    many = np.arange(10, 10 + free + 1)
    token = step(words(many[None]), tables.begin(room=0))
    assert float(token[1]) == 1
    tables.end(token)
    with pytest.raises(RuntimeError, match=r"table item: a lookup inside jit had more new ids .*begin\(room=\)"):
        tables.wait()
    assert_equal_tables(tables.engine, before)
    assert table.step == 1
    tables.end(step(words(many[:-1][None]), tables.begin(room=0)))
    assert len(table) == 5 + free == min(rows, slots)
    tables.end(step(words(many[None]), tables.begin(room=1)))
    assert len(table) == 6 + free
    assert table.step == 3


def test_a_program_cannot_overfill_a_table_that_is_growing() -> None:
    """Lines of its map are moved in proportion to the ids for which there is room, and others would overtake that."""
    room = 30
    batches = np.random.default_rng(0).integers(-(2**63), 2**63, (50, room + 1))
    refused = 0
    with tiny_chunks(16, 4):
        tables = tables_of()
        table, step = tables.engine.tables[0], jax.jit(functools.partial(train, tables))
        for batch in batches:
            token = tables.begin(room=room)
            if table._store.id_map.slots.work_to_do:
                tables.end(step(words(batch), token))
                with pytest.raises(RuntimeError, match="had more new ids than there was room for"):
                    tables.wait()
                assert len(table) % room == 0
                token = tables.begin(room=room)
                refused += 1
            tables.end(step(words(batch[:room]), token))
    assert refused > 10
    assert table.ids(0).tolist() == np.sort(batches[:, :room].ravel()).tolist()


@on_devices
def test_a_full_table_still_takes_known_ids(device: str) -> None:
    tables = tables_of(optim.SGD, device)
    store = tables.engine.tables[0].store
    step = jax.jit(lambda ids, token: train(tables, ids, token))
    tables.end(step(words(np.arange(3)), tables.begin(room=3)))
    slots = int(0.75 * store.id_map.capacity)
    tables.end(step(words(np.arange(slots)), tables.begin(room=slots)))
    known = np.tile(np.arange(slots), 3)
    tables.end(step(words(known), tables.begin(room=0)))
    tables.wait()
    assert len(tables.engine.tables[0]) == slots


def test_no_table_changes_after_the_first_failure() -> None:
    configs = {name: EmbeddingConfig(dim=dim, initializer=Normal(0, 1)) for name, dim in (("a", 4), ("b", 8))}
    engine = EmbeddingEngine(configs, optimizer=optim.SGD, seed=1)
    tables = ffi.JitTables(engine, engine.make_optimizer(lr=1.0))
    small, large = np.arange(3), np.arange(1 << 21)

    def look_up(a: Any, b: Any, token: Any) -> Any:
        vectors, ctx, token = ffi.lookup(tables, {"a": a, "b": b}, None, token)
        return ffi.update(tables, ctx, vectors, token)

    tables.end(jax.jit(look_up)(words(small), words(small), tables.begin(room=3)))
    before = rows_of(engine)
    tables.end(jax.jit(look_up)(words(small), words(large), tables.begin(room=0)))
    with pytest.raises(RuntimeError, match="table b: a lookup inside jit had more new ids"):
        tables.wait()
    for first, second in zip(before, rows_of(engine), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in ("ids", "embedding", "updated_step"))


@on_devices
def test_a_token_used_twice_is_found(device: str) -> None:
    tables = tables_of(device=device)

    @jax.jit
    def step(token: Any) -> Any:
        vectors, ctx, later = ffi.lookup(tables, {"item": IDS}, None, token)
        later = ffi.update(tables, ctx, gradient_of(vectors), later)
        return later + ffi.lookup(tables, {"item": IDS[:2]}, None, token)[2]

    tables.end(step(tables.begin(room=9)))
    with pytest.raises(RuntimeError, match="table item: .* got a token that is not that of the call before"):
        tables.wait()
    assert tables.engine.tables[0].step < 2


@on_devices
def test_an_old_token_is_found(device: str) -> None:
    tables = tables_of(device=device)
    step = jax.jit(lambda token: train(tables, IDS, token))
    first = tables.begin(room=9)
    tables.end(step(first))
    tables.begin(room=9)
    tables.end(step(first))
    with pytest.raises(RuntimeError, match="not that of the call before"):
        tables.wait()
    assert_equal_tables(tables.engine, trained_outside(1, device=device))


@on_devices
def test_a_dropped_update_is_found(device: str) -> None:
    tables = tables_of(device=device)

    @jax.jit
    def forgetful(token: Any) -> Any:
        vectors, ctx, token = ffi.lookup(tables, {"item": IDS}, None, token)
        ffi.update(tables, ctx, vectors, token)
        return token

    tables.end(forgetful(tables.begin(room=9)))
    with pytest.raises(RuntimeError, match="tables item had no update.*must be an output of the jitted"):
        tables.wait()
    assert tables.engine.tables[0].step == 0


@on_devices
def test_a_token_that_is_not_the_last_is_found(device: str) -> None:
    tables = tables_of(device=device)

    @jax.jit
    def step(token: Any) -> Any:
        vectors, ctx, early = ffi.lookup(tables, {"item": IDS}, None, token)
        return early, ffi.update(tables, ctx, vectors, early)

    early, _ = jax.block_until_ready(step(tables.begin(room=9)))
    tables.end(early)
    with pytest.raises(RuntimeError, match="used after the token that end got"):
        tables.wait()


@on_devices
def test_a_lookup_from_before_an_eviction_is_refused(device: str) -> None:
    tables = tables_of(device=device)
    look_up = jax.jit(lambda token: ffi.lookup(tables, {"item": IDS}, None, token))
    vectors, ctx, token = look_up(tables.begin(room=9))
    update = jax.jit(lambda ctx, vectors, token: ffi.update(tables, ctx, vectors, token))
    tables.end(update(ctx, vectors, token))
    tables.engine.tables[0].erase(0, torch.tensor([5], device=device))
    before = rows_of(tables.engine)[0]
    tables.end(update(ctx, vectors, tables.begin(room=9)))
    with pytest.raises(RuntimeError, match="table item: an update inside jit got a lookup from before rows"):
        tables.wait()
    assert torch.equal(rows_of(tables.engine)[0]["embedding"], before["embedding"])


def compiled_lookup(tables: ffi.JitTables, token: Any) -> Any:
    return jax.jit(lambda token: ffi.lookup(tables, {"item": IDS}, None, token)[2]).lower(token).compile()


def test_a_compiled_function_outlives_its_tables() -> None:
    tables = tables_of(None)
    token = tables.begin(room=9)
    look_up = compiled_lookup(tables, token)
    tables.end(look_up(token))
    tables.wait()
    del tables
    gc.collect()
    with pytest.raises(Exception, match="the JitTables of this compiled function no longer exist"):
        jax.block_until_ready(look_up(token))


# Waiting


@on_devices
def test_torch_waits_for_the_last_token(device: str) -> None:
    tables = tables_of(device=device)
    engine = tables.engine
    steps = 200 if device == "cpu" else 20

    @jax.jit
    def long(token: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, token: train(tables, IDS, token), token)

    tables.end(long(tables.begin(room=9)))
    with torch.no_grad():
        engine.eval()
        found = engine({"item": torch.from_numpy(IDS)})["item"].cpu()
    expected = rows_of(trained_outside(steps, device=device))[0]
    assert torch.equal(found[1:], expected["embedding"].cpu())
    assert engine.tables[0].step == steps
    assert rows_of(engine)[0]["frequency"].tolist() == [2 * steps, steps, steps]


@pytest.mark.parametrize(
    "use",
    [
        lambda engine: engine({"item": torch.from_numpy(IDS)}),
        lambda engine: engine.evict(Unused(steps=1)),
        lambda engine: engine.tables[0].export(0),
        lambda engine: engine.checkpoint_state(),
        lambda engine: engine.compact(),
        len,
    ],
    ids=["lookup", "evict", "export", "save", "compact", "len"],
)
def test_torch_may_not_use_lent_tables(use: Any) -> None:
    tables = tables_of()
    token = tables.begin(room=9)
    engine = tables.engine.tables[0] if use is len else tables.engine
    with pytest.raises(RuntimeError, match=r"item are lent to JAX since JitTables.begin; pass the last token"):
        use(engine)
    tables.end(jax.jit(lambda token: train(tables, IDS, token))(token))
    use(engine)


def test_pending_gradients_are_refused() -> None:
    tables = tables_of()
    tables.engine({"item": torch.from_numpy(IDS)})["item"].sum().backward()
    with pytest.raises(RuntimeError, match="table item: a lookup inside jax.jit would detach pending gradients"):
        tables.begin(room=1)
    tables.optimizer.step()
    tables.end(tables.begin(room=1))


@on_devices
def test_an_abandoned_call_does_not_block_the_next(device: str) -> None:
    tables = tables_of(device=device)
    tables.begin(room=9)  # the program failed before the jitted call
    tables.end(jax.jit(lambda token: train(tables, IDS, token))(tables.begin(room=9)))
    assert_equal_tables(tables.engine, trained_outside(1, device=device))


@on_devices
def test_steps_of_abandoned_calls_count(device: str) -> None:
    tables = tables_of(optim.Adam, device)
    step = jax.jit(lambda token: train(tables, IDS, token))
    token = jax.block_until_ready(step(tables.begin(room=9)))  # not given to end
    last = step(tables.begin(room=9))
    tables.end(last)
    assert_equal_tables(tables.engine, trained_outside(2, optimizer=optim.Adam, device=device))
    assert tables.engine.tables[0].step == 2
    tables.begin(room=9)
    tables.end(step(token))
    with pytest.raises(RuntimeError, match="not that of the call before"):
        tables.wait()


def test_calls_of_several_threads_on_their_own_tables() -> None:
    many = [tables_of() for _ in range(4)]

    def run(tables: ffi.JitTables) -> None:
        step = jax.jit(lambda token: train(tables, IDS, token))
        for _ in range(5):
            tables.end(step(tables.begin(room=9)))
        tables.wait()

    threads = [threading.Thread(target=run, args=(tables,)) for tables in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = trained_outside(5)
    for tables in many:
        assert_equal_tables(tables.engine, expected)
