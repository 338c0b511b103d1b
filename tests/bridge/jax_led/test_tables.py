"""JaxTables: ids of all kinds, distinct rows, gradients, and training bitwise equal to the torch-led loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.devices import EDGE_IDS
from tests.support.near import assert_near
from tests.support.sharded import configs, global_batch

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import copies, to_jax, to_torch  # noqa: E402
from recis_hybrid.bridge.jax_led import JaxTables  # noqa: E402


def engine_of(**features: Any) -> EmbeddingEngine:
    named = features or {"item": EmbeddingConfig(dim=4, initializer=Normal(0, 1))}
    return EmbeddingEngine(named, optimizer=optim.Adagrad, seed=1)


def words(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ids.view(np.uint32).reshape(*ids.shape, 2)


def rows_of(engine: EmbeddingEngine) -> list[dict[str, torch.Tensor]]:
    return [table.export(number) for table in engine.tables for number in range(len(table.members))]


def assert_equal_tables(one: EmbeddingEngine, other: EmbeddingEngine) -> None:
    for first, second in zip(rows_of(one), rows_of(other), strict=True):
        for name in first:
            assert torch.equal(first[name], second[name]), name


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(st.sampled_from(EDGE_IDS), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=12))
def test_64_bit_ids_survive_as_numpy_torch_or_pairs_of_words(ids: list[int]) -> None:
    assert not jax.config.jax_enable_x64
    array = np.array(ids, np.int64)
    tables = JaxTables(engine_of())
    expected, _ = tables.lookup({"item": torch.from_numpy(array)})
    assert sorted(set(ids)) == sorted(rows_of(tables.engine)[0]["ids"].tolist())  # type: ignore[arg-type]
    for column in (array, words(array), jnp.asarray(words(array)), array.view(np.uint64)):
        vectors, _ = tables.lookup({"item": column}, train=False)
        assert (vectors["item"] == expected["item"]).all()


def test_ids_of_any_shape() -> None:
    tables = JaxTables(engine_of())
    narrow = np.arange(12, dtype=np.int32) - 6
    for shape in ((12,), (4, 3), (2, 3, 2), (0, 3)):
        ids = narrow[: int(np.prod(shape))].reshape(shape)
        expected, _ = tables.lookup({"item": torch.from_numpy(ids)})
        for column in (ids, jnp.asarray(ids), words(ids.astype(np.int64)), jnp.asarray(words(ids.astype(np.int64)))):
            vectors, _ = tables.lookup({"item": column})
            assert vectors["item"].shape == expected["item"].shape
            assert (vectors["item"] == expected["item"]).all()


def test_64_bit_jax_ids_with_x64_on() -> None:
    with jax.enable_x64(True):
        tables = JaxTables(engine_of())
        tables.lookup({"item": jnp.array([2**40, -(2**62)])})
        assert rows_of(tables.engine)[0]["ids"].tolist() == [-(2**62), 2**40]  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [(), ("item",)])
@pytest.mark.parametrize(
    ("column", "error", "message"),
    [
        (np.ones(2, np.float32), TypeError, "ids must be int64 or int32, got torch.float32; cast it"),
        (jnp.ones(2), TypeError, "ids must be int64 or int32, got torch.float32"),
        (jnp.array([True]), TypeError, "ids must be int64 or int32, got torch.bool"),
        (jnp.zeros(2, jnp.int16), TypeError, "ids must be int64 or int32, got torch.int16"),
        (jnp.int32(3), ValueError, r"ids must be \[B\], .*, got \[\]"),
        (jnp.zeros((2, 3), jnp.uint32), ValueError, r"uint32 ids must be pairs of words, \(…, 2\), got \[2, 3\]"),
        (np.zeros(2, np.uint32), ValueError, r"uint32 ids must be pairs of words, \(…, 2\), got \[2\]"),
        (np.array(["a"]), TypeError, "must hold numbers"),
        (None, TypeError, "must be a Tensor"),
    ],
)
def test_bad_ids_are_refused_by_the_feature_s_name(
    rows: tuple[str, ...], column: Any, error: type[Exception], message: str
) -> None:
    tables = JaxTables(engine_of(), rows=rows)
    with pytest.raises(error, match=f"feature 'item'.*{message}"):
        tables.lookup({"item": column})
    assert len(tables.engine.tables[0]) == 0  # type: ignore[attr-defined]


def test_lookups_inside_transformations_are_refused() -> None:
    tables, ids = JaxTables(engine_of()), jnp.array([1, 2])

    def look_up(ids: Any) -> Any:
        return tables.lookup({"item": ids})[0]["item"]

    remedy = r"feature 'item'.*int32\[.*\] that JAX is tracing; .*before the jitted function, with recis_hybrid.bridge"
    for transform in (jax.jit, jax.vmap, jax.make_jaxpr):
        with pytest.raises(TypeError, match=remedy):
            transform(look_up)(ids)
    with pytest.raises(TypeError, match=r"feature 'item'.*uint32\[2,? ?2\] that JAX is tracing"):
        jax.jit(look_up)(jnp.zeros((2, 2), jnp.uint32))


def test_arguments_are_checked() -> None:
    engine = engine_of()
    with pytest.raises(TypeError, match="engine must be an EmbeddingEngine, got a dict"):
        JaxTables({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows must be features of the engine, \['item'\], got \['site'\]"):
        JaxTables(engine, rows=["site"])
    with pytest.raises(TypeError, match="a batch must be a dict of columns"):
        JaxTables(engine).lookup([1, 2])  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="the batch has no column 'item'"):
        JaxTables(engine).lookup({})


def test_bad_gradients_are_refused_and_change_nothing() -> None:
    engine = engine_of()
    tables = JaxTables(engine, engine.make_optimizer(lr=1.0))
    vectors, ctx = tables.lookup({"item": np.array([1, 2])})
    before = rows_of(engine)[0]["embedding"].clone()
    where = "apply_gradients: feature 'item': the gradient must"
    with pytest.raises(ValueError, match=rf"{where} have the shape of the vectors, \[2, 4\], got \[1, 4\]"):
        tables.apply_gradients(ctx, {"item": jnp.ones((1, 4))})
    for gradient in (jnp.ones((2, 4), jnp.bfloat16), np.ones((2, 4), np.float32), None):
        with pytest.raises(TypeError, match=f"{where} be a float32 JAX array, got (bfloat16|float32|None)"):
            tables.apply_gradients(ctx, {"item": gradient})
    with pytest.raises(KeyError, match="no gradient for the features"):
        tables.apply_gradients(ctx, {})
    with pytest.raises(TypeError, match="expected a concrete array"):
        jax.jit(lambda g: tables.apply_gradients(ctx, {"item": g}))(vectors["item"])
    with pytest.raises(TypeError, match="optimizer must be one of recis_hybrid.optim.*got None"):
        JaxTables(engine).apply_gradients(ctx, vectors)
    _, evaluated = tables.lookup({"item": np.array([1, 2])}, train=False)
    with pytest.raises(RuntimeError, match="the lookup ran in evaluation mode"):
        tables.apply_gradients(evaluated, vectors)
    assert torch.equal(rows_of(engine)[0]["embedding"], before)


def test_vectors_and_gradients_share_memory() -> None:
    engine = engine_of(user=EmbeddingConfig(dim=3), item=EmbeddingConfig(dim=3, combiner=None))
    seen: dict[str, dict[str, int]] = {}
    lookup, apply = engine.lookup, engine.apply_gradients

    def spy_lookup(batch: Batch) -> Any:
        values, found = lookup(batch)
        seen["out"] = {name: value.data_ptr() for name, value in values.items()}
        return values, found

    def spy_apply(ctx: Any, gradients: Any, optimizer: Any) -> None:
        seen["in"] = {name: gradient.data_ptr() for name, gradient in gradients.items()}
        apply(ctx, gradients, optimizer)

    engine.lookup, engine.apply_gradients = spy_lookup, spy_apply  # type: ignore[method-assign]
    for rows in ((), ("user", "item")):
        tables = JaxTables(engine, engine.make_optimizer(), rows=rows)
        before = copies()
        vectors, ctx = tables.lookup({"user": np.array([1, 2, 3]), "item": np.array([[4], [5], [4]])})
        assert {name: vector.unsafe_buffer_pointer() for name, vector in vectors.items()} == seen["out"]
        gradients = jax.jit(lambda vectors: jax.tree.map(jnp.cos, vectors))(vectors)
        tables.apply_gradients(ctx, gradients)
        assert {name: each.unsafe_buffer_pointer() for name, each in gradients.items()} == seen["in"]
        assert copies() == before


@pytest.mark.parametrize("rule", [optim.Adagrad, optim.Adam, optim.RowwiseAdagrad])
def test_training_is_bitwise_that_of_torch_with_the_same_gradients(rule: Any) -> None:
    """Compare with autograd, over all combiners, shared, read-only and admitted tables, for several steps."""

    @jax.jit
    def gradients_of(vectors: dict[str, Any]) -> Any:
        return jax.grad(lambda v: sum(jnp.sin(x * (n + 1)).sum() for n, x in enumerate(v.values())))(vectors)

    engines = [EmbeddingEngine(configs(), optimizer=rule, seed=3) for _ in range(2)]
    ours, theirs = engines
    tables, sparse = JaxTables(ours, ours.make_optimizer(lr=0.1)), theirs.make_optimizer(lr=0.1)
    for step in range(4):
        batch = global_batch(step)
        vectors, ctx = tables.lookup(batch)
        gradients = gradients_of(vectors)
        trained = [name for name in vectors if ours.configs[name].trainable]
        tables.apply_gradients(ctx, {name: gradients[name] for name in trained})
        values = theirs(batch)
        again = gradients_of({name: to_jax(value.detach()) for name, value in values.items()})
        torch.autograd.backward([values[name] for name in trained], [to_torch(again[name]) for name in trained])
        sparse.step()
        sparse.zero_grad()
        assert_equal_tables(ours, theirs)


@jax.jit
@jax.value_and_grad
def loss_and_gradients(vectors: dict[str, Any], index: dict[str, Any]) -> Any:
    """Return a loss of the sums of bags, which features with an index compute from their distinct rows."""
    sums = {name: value[index[name]].sum(1) if name in index else value for name, value in vectors.items()}
    return sum(jnp.sin(value).sum() for value in sums.values())


def test_added_gradients_are_those_of_backward() -> None:
    random = np.random.default_rng(0)
    ours, theirs = engine_of(), engine_of()
    tables, optimizer = JaxTables(ours, ours.make_optimizer(lr=0.1)), theirs.make_optimizer(lr=0.1)
    for _ in range(2):
        for count in (9, 5):
            ids, weights = random.integers(0, 6, count), random.normal(0, 1, (count, 4)).astype(np.float32)
            vectors, ctx = tables.lookup({"item": ids})
            tables.add_gradients(ctx, {"item": jnp.asarray(weights)})
            expected = theirs({"item": torch.from_numpy(ids)})["item"]
            np.testing.assert_array_equal(vectors["item"], expected.detach())
            expected.backward(torch.from_numpy(weights))
        tables.optimizer.step()
        optimizer.step()
    assert_equal_tables(ours, theirs)
    with pytest.raises(KeyError, match=r"add_gradients: no gradient for the features \['item'\]"):
        tables.add_gradients(ctx, {})
    with pytest.raises(ValueError, match=r"add_gradients: feature 'item': .* got \[1, 4\]"):
        tables.add_gradients(ctx, {"item": jnp.zeros((1, 4))})
    _, ctx = tables.lookup({"item": ids}, train=False)
    with pytest.raises(RuntimeError, match="add_gradients: the lookup ran in evaluation mode"):
        tables.add_gradients(ctx, {"item": jnp.zeros((5, 4))})


def test_distinct_rows_train_like_pooled_vectors() -> None:
    features = {
        "dense": EmbeddingConfig(dim=4, initializer=Normal(0, 1)),
        "lists": EmbeddingConfig(dim=4, initializer=Normal(0, 1), max_length=5),
    }
    generator = torch.Generator().manual_seed(0)
    ours, theirs = engine_of(**features), engine_of(**features)
    by_rows = JaxTables(ours, ours.make_optimizer(lr=0.1), rows=["dense", "lists"])
    pooled = JaxTables(theirs, theirs.make_optimizer(lr=0.1))
    for count in (3, 40, 9, 0):
        lists = [torch.randint(0, 20, (n % 7,), generator=generator).tolist() for n in range(count)]
        batch = {
            "dense": torch.randint(0, 30, (count, 3), generator=generator),
            "lists": RaggedTensor.from_lists(lists, dtype=torch.int64),
        }

        rows, ctx = by_rows.lookup(batch)
        assert {index.dtype for index in ctx.index.values()} == {jnp.dtype("int32")}
        value, gradients = loss_and_gradients(rows, ctx.index)
        by_rows.apply_gradients(ctx, gradients)
        vectors, other = pooled.lookup(batch)
        expected, wanted = loss_and_gradients(vectors, other.index)
        pooled.apply_gradients(other, wanted)
        assert_near(value, expected)
        for one, two in zip(rows_of(ours), rows_of(theirs), strict=True):
            assert torch.equal(one["ids"], two["ids"])
            assert_near(one["embedding"], two["embedding"], 8 * 64)


def test_size_classes_bound_the_compilations() -> None:
    tables = JaxTables(engine_of(), rows=["item"])
    compilations = 0

    @jax.jit
    def step(vectors: Any, index: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return vectors["item"][index["item"]].sum()

    generator = np.random.default_rng(0)
    sizes = [1, 7, 8, 100, 3, 64, 130, 2, 127, 128, *generator.integers(1, 255, 50)]
    for size in sizes:
        # The same number of ids; the number of distinct ones varies.
        vectors, ctx = tables.lookup({"item": np.arange(256) % size})
        count = vectors["item"].shape[0]
        assert count > size
        assert count & (count - 1) == 0
        assert not np.asarray(vectors["item"])[size:].any()
        step(vectors, ctx.index)
    assert compilations <= 6  # 8, 16 and 128 to 256 rows


def test_pairs_and_rows_are_prefetched_as_the_same_columns() -> None:
    tables = JaxTables(engine_of(), rows=["item"])
    sent: list[Any] = []
    found: list[Any] = []
    engine: Any = tables.engine
    lookup = engine.lookup
    engine.prefetch = sent.append
    engine.lookup = lambda batch: (found.append(batch), lookup(batch))[1]
    batches = [{"item": words(np.array([n, 2**40]))} for n in range(3)]
    for batch in batches[:2]:
        tables.prefetch(batch)
    for batch in batches:
        tables.lookup(batch)
    assert found[0]["item"] is sent[0]["item"]
    assert found[1]["item"] is sent[1]["item"]
    assert found[2]["item"].ids.tolist() == [2, 2**40]


X64 = """
import jax, numpy as np, jax.numpy as jnp
from recis_hybrid import optim
from recis_hybrid.bridge import jax_led
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
engine = EmbeddingEngine({"item": EmbeddingConfig(dim=4)}, optimizer=optim.SGD)
tables = jax_led.JaxTables(engine, engine.make_optimizer(lr=1.0), rows=["item"])
vectors, ctx = tables.lookup({"item": jnp.array([2**62 + 1, 3, 2**62 + 1])})
assert ctx.index["item"].tolist() == [0, 1, 0] and ctx.index["item"].dtype == "int32"
gradients = jax.grad(lambda v: v["item"][ctx.index["item"]].sum())(vectors)
tables.apply_gradients(ctx, gradients)
print(sorted(engine.tables[0].export(0)["ids"].tolist()))
"""


def test_a_program_with_x64(root: Path) -> None:
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-c", X64]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([3, 2**62 + 1]), done.stderr
