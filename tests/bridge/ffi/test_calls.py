"""Lookups and updates inside jit: the same results as JaxTables outside of it, bit by bit; ids, shapes, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.ragged import RaggedTensor
from tests.support.devices import EDGE_IDS, late_streams, on_devices
from tests.support.jit_tables import TorchTables, assert_equal_tables, engine_of, rows_of, words
from tests.support.near import assert_near
from tests.support.programs import run_code

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import ffi, to_torch  # noqa: E402
from recis_hybrid.bridge.jax_led import JaxTables  # noqa: E402

OPTIMIZERS = {
    "sgd": optim.SGD,
    "momentum": optim.SGD.spec(momentum=0.9),
    "adagrad": optim.Adagrad.spec(initial_accumulator_value=0.1),
    "rowwise": optim.RowwiseAdagrad,
    "adam": optim.Adam.spec(betas=(0.8, 0.95)),
    "adamw": optim.AdamW.spec(weight_decay=0.1),
    "adagrad_decay": optim.Adagrad.spec(lr_decay=0.5, weight_decay=0.1),
    "amsgrad": optim.AMSGrad.spec(weight_decay=0.1),
    "counter": optim.RowwiseAdagrad.spec(weight_decay=0.1, counter_halflife=2.0),
}


def features(**settings: Any) -> dict[str, EmbeddingConfig]:
    init = Normal(0, 1)
    return {
        "one": EmbeddingConfig(dim=16, initializer=init, **settings),
        "bag": EmbeddingConfig(dim=16, initializer=init, combiner="mean", **settings),
        "list": EmbeddingConfig(dim=16, initializer=init, combiner="sqrtn", table="shared", **settings),
        "each": EmbeddingConfig(dim=16, initializer=init, combiner=None, table="shared", **settings),
        "wide": EmbeddingConfig(dim=5, initializer=init, **settings),
    }


def batch_of(random: np.random.Generator) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    ids = {
        "one": random.integers(-(2**63), 2**63 - 1, 7),
        "bag": random.integers(0, 30, (7, 4)),
        "list": random.integers(0, 30, 20),
        "each": random.integers(0, 30, (7, 3)),
        "wide": random.integers(0, 9, (7, 2, 3)),
    }
    return ids, np.array([0, 3, 3, 9, 10, 15, 15, 20])


def loss_of(vectors: Any) -> Any:
    return sum((jnp.sin(vectors[name]) ** 2).sum() for name in sorted(vectors))


def step_of(tables: Any) -> Any:
    @jax.jit
    def step(ids: Any, offsets: Any, token: Any) -> Any:
        vectors, ctx, token = ffi.lookup(tables, ids, {"list": offsets}, token)
        gradients = jax.grad(loss_of)(vectors)
        return vectors, gradients, ffi.update(tables, ctx, gradients, token)

    return step


@on_devices
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float32, None), (torch.bfloat16, torch.bfloat16)])
def test_training_is_that_of_tables_outside_jit(
    device: str, optimizer: Any, dtype: torch.dtype, state_dtype: torch.dtype | None
) -> None:
    configs = features(dtype=dtype, state_dtype=state_dtype)
    ours, theirs = (EmbeddingEngine(configs, optimizer=optimizer, seed=3, device=device) for _ in range(2))
    tables = ffi.JitTables(ours, ours.make_optimizer(lr=0.1))
    outside = (JaxTables if device == "cpu" else TorchTables)(theirs, theirs.make_optimizer(lr=0.1))
    step = step_of(tables)
    random = np.random.default_rng(0)
    with late_streams(device):
        for _ in range(3):
            ids, offsets = batch_of(random)
            inputs = {name: words(part) for name, part in ids.items()}
            found, gradients, token = step(inputs, words(offsets), tables.begin(room=200))
            tables.end(token)
            ragged = RaggedTensor(torch.from_numpy(ids["list"]), torch.from_numpy(offsets))
            expected, ctx = outside.lookup({**ids, "list": ragged})
            outside.apply_gradients(ctx, gradients)
            assert sorted(found) == sorted(expected)
            for name, vectors in expected.items():
                assert found[name].shape == vectors.shape, name
                assert (found[name] == vectors).all(), name
        assert_equal_tables(ours, theirs)
    assert [table.step for table in ours.tables] == [table.step for table in theirs.tables] == [3, 3]


def test_tables_have_their_own_optimizers() -> None:
    own = {"adam": None, "adagrad": optim.Adagrad.spec(lr=0.3), "rowwise": optim.RowwiseAdagrad}
    configs = {name: EmbeddingConfig(dim=4, optimizer=optimizer) for name, optimizer in own.items()}
    engines = [EmbeddingEngine(configs, optimizer=optim.Adam, seed=3) for _ in range(3)]
    optimizers = [engine.make_optimizer(lr=0.1) for engine in engines]
    inside, outside = ffi.JitTables(engines[0], optimizers[0]), JaxTables(engines[1], optimizers[1])

    @jax.jit
    def step(ids: Any, token: Any) -> Any:
        vectors, ctx, token = ffi.lookup(inside, ids, None, token)
        return ffi.update(inside, ctx, jax.grad(loss_of)(vectors), token)

    ids = dict.fromkeys(own, np.array([1, 2**60, -3], np.int64))
    for _ in range(3):
        inside.end(step({name: words(part) for name, part in ids.items()}, inside.begin(room=3)))
        vectors, ctx = outside.lookup(ids)
        gradients = jax.jit(jax.grad(loss_of))(vectors)
        outside.apply_gradients(ctx, gradients)
        values = engines[2]({name: torch.from_numpy(part) for name, part in ids.items()})
        torch.autograd.backward(list(values.values()), [to_torch(gradients[name]) for name in values])
        optimizers[2].step()
    for engine in engines[:2]:
        assert_equal_tables(engine, engines[2])
    assert sorted(engines[0].tables[2].export(0))[1:] == ["frequency", "ids", "seen_step", "sum", "updated_step"]


@on_devices
def test_ids_past_the_last_offset_are_not_used(device: str) -> None:
    engine = engine_of(optim.SGD, device=device, combiner="mean")
    tables = ffi.JitTables(engine, engine.make_optimizer(lr=1.0))

    @jax.jit
    def step(ids: Any, ends: Any, token: Any) -> Any:
        vectors, ctx, token = ffi.lookup(tables, {"item": ids}, {"item": ends}, token)
        gradients = {"item": jnp.ones_like(vectors["item"])}
        return vectors["item"], ffi.update(tables, ctx, gradients, token)

    for first in (10, 20):
        ids = np.arange(first, first + 6)
        vectors, token = step(words(ids), jnp.array([0, 1, 1, 3]), tables.begin(room=6))
        tables.end(token)
        rows = rows_of(tables.engine)[0]
        assert rows["ids"].tolist()[-3:] == ids[:3].tolist()
        after = rows["embedding"][-3:].cpu()
        before = after + torch.tensor([[1.0], [0.5], [0.5]])
        expected = torch.stack([before[0], torch.zeros(4), before[1:].mean(0)])
        assert_near(vectors, expected)
        assert rows["frequency"].tolist()[-3:] == [1, 1, 1]


@on_devices
def test_the_optimizer_goes_on_through_torch(device: str) -> None:
    ours, theirs = engine_of(optim.Adam, device=device), engine_of(optim.Adam, device=device)
    mine, other = ours.make_optimizer(lr=0.1), theirs.make_optimizer(lr=0.1)
    tables = ffi.JitTables(ours, mine)
    ids = np.array([1, 2, 2**60], np.int64)
    step = jax.jit(lambda ids, token: _step(tables, ids, token))
    tables.end(step(words(ids), tables.begin(room=3)))
    batch = {"item": torch.from_numpy(ids)}
    for engine, optimizer, steps in ((ours, mine, 1), (theirs, other, 2)):
        for _ in range(steps):
            engine(batch)["item"].sin().sum().backward()
            optimizer.step()
    assert_equal_tables(ours, theirs)
    assert mine.state_dict()["state"] == other.state_dict()["state"]


def _step(tables: Any, ids: Any, token: Any) -> Any:
    vectors, ctx, token = ffi.lookup(tables, {"item": ids}, None, token)
    return ffi.update(tables, ctx, jax.grad(lambda v: jnp.sin(v["item"]).sum())(vectors), token)


@on_devices
def test_learning_rates_are_read_at_each_begin(device: str) -> None:
    engine = engine_of(optim.SGD, device=device)
    optimizer = engine.make_optimizer(lr=0.5)
    tables = ffi.JitTables(engine, optimizer)
    ids = np.array([7], np.int64)

    @jax.jit
    def step(token: Any) -> Any:
        vectors, ctx, token = ffi.lookup(tables, {"item": ids}, None, token)
        return vectors["item"], ffi.update(tables, ctx, {"item": jnp.ones((1, 4))}, token)

    values = []
    for rate in (0.5, 0.25, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        vectors, token = step(tables.begin(room=1))
        tables.end(token)
        values.append(vectors)
    assert (values[1] == values[0] - 0.5).all()
    assert (values[2] == values[1] - 0.25).all()


@on_devices
@settings(deadline=None, max_examples=15)
@given(st.lists(st.one_of(st.sampled_from(EDGE_IDS), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=12))
def test_64_bit_ids_survive_while_x64_is_off(device: str, ids: list[int]) -> None:
    assert not jax.config.jax_enable_x64
    array = np.array(ids, np.int64)
    tables = ffi.JitTables(engine_of(None, device=device))
    _, _, token = ffi.lookup(tables, {"item": array}, None, tables.begin(room=len(ids)))
    tables.end(token)
    assert rows_of(tables.engine)[0]["ids"].tolist() == sorted(set(ids))
    expected, _ = TorchTables(tables.engine).lookup({"item": array}, train=False)
    vectors, _, token = ffi.lookup(tables, {"item": words(array)}, None, tables.begin(room=0), train=False)
    tables.end(token)
    assert (vectors["item"] == expected["item"]).all()


def test_int32_ids_keep_their_sign() -> None:
    tables = ffi.JitTables(engine_of(None))
    ids = jnp.array([-1, 2**31 - 1, -(2**31), 0], jnp.int32)
    tables.end(ffi.lookup(tables, {"item": ids}, None, tables.begin(room=4))[2])
    assert rows_of(tables.engine)[0]["ids"].tolist() == [-(2**31), -1, 0, 2**31 - 1]


def test_ids_with_x64() -> None:
    tables = ffi.JitTables(engine_of(None))
    with jax.enable_x64(True):
        signed, unsigned = jnp.array([2**62, -5]), jnp.array([2**64 - 1], jnp.uint64)
        look_up = jax.jit(lambda ids, token: ffi.lookup(tables, {"item": ids}, None, token)[2])
        tables.end(look_up(unsigned, look_up(signed, tables.begin(room=3))))
        tables.wait()
    assert rows_of(tables.engine)[0]["ids"].tolist() == [-5, -1, 2**62]


@on_devices
def test_evaluation_inserts_nothing_and_reads_first_values(device: str) -> None:
    engine = engine_of(None, device=device)
    tables = ffi.JitTables(engine)
    ids = np.arange(5)
    vectors, ctx, token = ffi.lookup(tables, {"item": ids}, None, tables.begin(room=0), train=False)
    tables.end(token)
    assert len(engine.tables[0]) == 0
    inserted, _ = TorchTables(engine).lookup({"item": ids})
    assert (vectors["item"] == inserted["item"]).all()
    assert ctx.contexts[0].size == 0


@on_devices
def test_unknown_ids_may_count_as_zeros(device: str) -> None:
    engine = engine_of(None, device=device, unknown="zeros")
    tables = ffi.JitTables(engine)
    TorchTables(engine).lookup({"item": np.array([1])})
    vectors, _, token = ffi.lookup(tables, {"item": np.array([1, 2])}, None, tables.begin(room=0), train=False)
    tables.end(token)
    assert (vectors["item"][0] != 0).all()
    assert (vectors["item"][1] == 0).all()


def test_large_calls_run_in_several_threads_alike() -> None:
    random = np.random.default_rng(1)
    ids = random.integers(0, 20_000, 30_000)
    ours, theirs = engine_of(optim.Adagrad, dim=32), engine_of(optim.Adagrad, dim=32)
    tables, outside = ffi.JitTables(ours, ours.make_optimizer(lr=0.1)), JaxTables(theirs, theirs.make_optimizer(lr=0.1))
    tables.end(jax.jit(lambda ids, token: _step(tables, ids, token))(words(ids), tables.begin(room=20_000)))
    vectors, ctx = outside.lookup({"item": ids})
    outside.apply_gradients(ctx, jax.jit(jax.grad(lambda v: jnp.sin(v["item"]).sum()))(vectors))
    assert_equal_tables(ours, theirs)


def test_subnormal_numbers_are_kept() -> None:
    """XLA's threads treat them as zeros."""
    ours, theirs = engine_of(optim.Adam, dim=64), engine_of(optim.Adam, dim=64)
    tables = ffi.JitTables(ours, ours.make_optimizer(lr=0.1))
    outside = JaxTables(theirs, theirs.make_optimizer(lr=0.1))
    ids, tiny = np.arange(2000), jnp.full((2000, 64), 1e-21)  # the squares are subnormal

    @jax.jit
    def step(token: Any) -> Any:
        _, ctx, token = ffi.lookup(tables, {"item": ids}, None, token)
        return ffi.update(tables, ctx, {"item": tiny}, token)

    tables.end(step(tables.begin(room=2000)))
    _, found = outside.lookup({"item": ids})
    outside.apply_gradients(found, {"item": tiny})
    assert rows_of(ours)[0]["exp_avg_sq"].min() > 0
    assert_equal_tables(ours, theirs)


@on_devices
def test_empty_batches(device: str) -> None:
    engine = engine_of(optim.Adagrad, device=device)
    tables = ffi.JitTables(engine, engine.make_optimizer())
    vectors, ctx, token = ffi.lookup(tables, {"item": np.zeros(0, np.int64)}, None, tables.begin(room=0))
    tables.end(ffi.update(tables, ctx, vectors, token))
    tables.wait()
    assert vectors["item"].shape == (0, 4)
    assert engine.tables[0].step == 1


@on_devices
def test_frozen_features_take_no_gradient(device: str) -> None:
    configs = {"item": EmbeddingConfig(dim=4), "frozen": EmbeddingConfig(dim=4, trainable=False)}
    engine = EmbeddingEngine(configs, optimizer=optim.SGD, device=device)
    tables = ffi.JitTables(engine, engine.make_optimizer(lr=1.0))
    ids = np.array([1, 2])
    vectors, ctx, token = ffi.lookup(tables, {"item": ids, "frozen": ids}, None, tables.begin(room=2))
    tables.end(ffi.update(tables, ctx, {"item": vectors["item"]}, token))
    assert sorted(len(table) for table in engine.tables) == [0, 2]


@pytest.mark.parametrize(
    ("ids", "offsets", "kind", "message"),
    [
        ({}, None, KeyError, r"no ids for the features \['item'\]"),
        ({"item": np.arange(3), "other": np.arange(3)}, None, KeyError, r"\['other'\] are not features"),
        ({"item": np.ones(3, np.float32)}, None, TypeError, "feature 'item': ids must be int32, pairs .* got float32"),
        ({"item": [1, 2]}, None, TypeError, "feature 'item': ids must be int32"),
        ({"item": np.ones(3, np.uint32)}, None, ValueError, r"feature 'item': ids: uint32 must be pairs of words"),
        ({"item": np.ones((1, 1, 1, 1), np.int64)}, None, ValueError, r"must be \[B\], \[B, L\] or \[B, L, K\]"),
        ({"item": np.ones((2, 2), np.int64)}, {"item": np.arange(3)}, ValueError, r"ids with offsets must be \[n\]"),
        ({"item": np.arange(3)}, {"item": np.ones(2, np.float32)}, TypeError, "feature 'item': offsets must be int32"),
    ],
)
def test_bad_ids_are_refused_by_name(ids: Any, offsets: Any, kind: type[Exception], message: str) -> None:
    tables = ffi.JitTables(engine_of(None))
    token = tables.begin(room=9)
    with pytest.raises(kind, match=message):
        ffi.lookup(tables, ids, offsets, token)


@on_devices
def test_offsets_outside_the_ids_are_refused(device: str) -> None:
    tables = ffi.JitTables(engine_of(None, device=device))
    look_up = jax.jit(lambda ids, ends, token: ffi.lookup(tables, {"item": ids}, {"item": ends}, token)[2])
    for ends in ([0, 4], [0, 2, 1], [-1, 2], [1, 2], [1]):
        tables.end(look_up(jnp.arange(3), jnp.array(ends), tables.begin(room=9)))
        with pytest.raises(
            RuntimeError, match="table item: .* offsets of a feature must start with 0, must not decrease"
        ):
            tables.wait()
    assert len(tables.engine.tables[0]) == 0


@pytest.mark.parametrize(
    ("gradients", "kind", "message"),
    [
        ({}, KeyError, r"no gradient for the features \['item'\]"),
        ({"item": np.ones((3, 4), np.float32), "x": np.ones(3)}, KeyError, r"got gradients for \['x'\]"),
        ({"item": np.ones((3, 4), np.float16)}, TypeError, "'item': the gradient must be float32 .* got float16"),
        ({"item": np.ones((2, 4), np.float32)}, ValueError, r"'item': .* \[3, 4\] .* got float32 \[2, 4\]"),
    ],
)
def test_bad_gradients_are_refused_by_name(gradients: Any, kind: type[Exception], message: str) -> None:
    engine = engine_of(optim.SGD)
    tables = ffi.JitTables(engine, engine.make_optimizer())
    _, ctx, token = ffi.lookup(tables, {"item": np.arange(3)}, None, tables.begin(room=3))
    with pytest.raises(kind, match=message):
        ffi.update(tables, ctx, gradients, token)


def test_updates_need_an_optimizer_and_a_training_lookup() -> None:
    engine = engine_of(optim.SGD)
    gradient = {"item": np.ones((1, 4), np.float32)}
    tables = ffi.JitTables(engine)
    _, ctx, token = ffi.lookup(tables, {"item": np.arange(1)}, None, tables.begin(room=3))
    with pytest.raises(RuntimeError, match="no optimizer"):
        ffi.update(tables, ctx, gradient, token)
    tables.end(token)
    tables = ffi.JitTables(engine, engine.make_optimizer())
    _, ctx, token = ffi.lookup(tables, {"item": np.arange(1)}, None, tables.begin(room=3), train=False)
    with pytest.raises(RuntimeError, match="train=False"):
        ffi.update(tables, ctx, gradient, token)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combiner": "max"}, "feature 'item': inside jit the combiner must be one of .* got 'max'"),
        ({"combiner": "tile", "max_length": 2}, "feature 'item': inside jit the combiner must be"),
        ({"max_length": 2}, "feature 'item': max_length is not supported"),
        ({"weights": "w"}, "feature 'item': weights is not supported"),
    ],
)
def test_unsupported_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        ffi.JitTables(engine_of(None, **settings))


def test_a_frozen_feature_of_a_trained_table_is_refused_in_jit_but_not_outside() -> None:
    configs = {name: EmbeddingConfig(dim=4, table="t", trainable=name == "a") for name in "ab"}
    engine = EmbeddingEngine(configs, optimizer=optim.SGD)
    with pytest.raises(NotImplementedError, match="feature 'b': trainable=False in a table that other features train"):
        ffi.JitTables(engine)
    tables = JaxTables(engine, engine.make_optimizer(lr=1.0))
    vectors, ctx = tables.lookup({"a": np.array([1]), "b": np.array([1])})
    tables.apply_gradients(ctx, {name: jnp.ones((1, 4)) for name in "ab"})
    after, _ = tables.lookup({"a": np.array([1]), "b": np.array([1])}, train=False)
    assert (after["b"] == vectors["b"] - 1).all()


def test_wrong_arguments_are_refused() -> None:
    engine = engine_of(optim.SGD)
    with pytest.raises(TypeError, match="engine must be an EmbeddingEngine"):
        ffi.JitTables(EmbeddingEngine)  # type: ignore[arg-type]
    tables = ffi.JitTables(engine, engine.make_optimizer())
    for token in (None, 1.0, jnp.zeros(2, jnp.int32), jnp.zeros(3)):
        with pytest.raises(TypeError, match="token must be the float32"):
            ffi.lookup(tables, {"item": np.arange(3)}, None, token)
    with pytest.raises(RuntimeError, match="the tables are not lent"):
        tables.end(jnp.zeros(2))


def test_optimizers_without_a_rule_are_refused() -> None:
    class Own(optim.Custom):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        @staticmethod
        def update(rows: Any, gradients: Any, state: Any, settings: Any, step: int) -> None:
            rows -= gradients

    engine = engine_of(Own)
    with pytest.raises(TypeError, match="Own cannot update tables inside jax.jit"):
        ffi.JitTables(engine, engine.make_optimizer())


def test_the_error_without_handlers_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['recis_hybrid._xla'] = None\n"
        "from recis_hybrid import embedding; from recis_hybrid.bridge import ffi\n"
        "ffi.JitTables(embedding.EmbeddingEngine({'item': embedding.EmbeddingConfig(dim=2)}))"
    )
    done = run_code(code, folder=tmp_path)
    assert "ImportError: recis_hybrid.bridge.ffi: the XLA handlers recis_hybrid._xla could not" in done.stderr
    assert "pip install jax pybind11" in done.stderr
