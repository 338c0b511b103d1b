"""Feature functions in JAX: bitwise the torch operators, inside and outside jit, with and without x64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid import ops
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.gather import Bags
from recis_hybrid.ops.update import Gradients
from tests.support.devices import EDGE_IDS
from tests.support.jit_tables import engine_of, rows_of, words

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
jnp = jax.numpy
from recis_hybrid.bridge import ffi  # noqa: E402

COUNT = 12  # one shape for all examples, so that each function is compiled once
EDGES = np.array([*EDGE_IDS, 7, -7, 2**31 - 1, -(2**31)], np.int64)
COMBINERS = {"sum": ops.gather.SUM, "mean": ops.gather.MEAN, "sqrtn": ops.gather.SQRTN, "max": ops.gather.MAX}
MODULI = (1, 10, 2**31, 2**31 + 1, 2**63, 2**64 - 1)
ids_of_64_bits = st.lists(
    st.one_of(st.sampled_from(EDGE_IDS), st.integers(-(2**63), 2**63 - 1)), min_size=COUNT, max_size=COUNT
)
floats = st.lists(st.floats(width=32), min_size=COUNT, max_size=COUNT)
jit_hash = jax.jit(ffi.hash_ids, static_argnames="kind")
jit_mod = jax.jit(ffi.mod_ids, static_argnames="modulus")
jit_reduce = jax.jit(ffi.segment_reduce, static_argnames="combiner")


def joined(pairs: Any) -> np.ndarray[Any, Any]:
    """Return the int64 ids of pairs of words."""
    assert pairs.dtype == np.uint32
    return np.ascontiguousarray(pairs).view(np.int64)[..., 0]


@settings(deadline=None, max_examples=30)
@given(ids_of_64_bits, st.sampled_from(sorted(ops.hash.HASH_KINDS)))
def test_hashes_are_those_of_the_operator(listed: list[int], kind: Any) -> None:
    ids = np.array(listed, np.int64)
    expected = ops.hash.hash_ids(torch.from_numpy(ids), kind).numpy()
    assert not jax.config.jax_enable_x64
    np.testing.assert_array_equal(joined(jit_hash(words(ids), kind)), expected)
    np.testing.assert_array_equal(joined(ffi.hash_ids(ids, kind)), expected)
    with jax.enable_x64(True):
        for each in (ids, jnp.asarray(ids), jnp.asarray(ids.view(np.uint64))):
            found = jit_hash(each, kind)
            assert found.dtype == np.int64
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(joined(ffi.hash_ids(words(ids), kind)), expected)


@settings(deadline=None, max_examples=30)
@given(ids_of_64_bits, st.sampled_from(MODULI))
def test_remainders_are_those_of_unsigned_integers(listed: list[int], modulus: int) -> None:
    ids = np.array(listed, np.int64)
    expected = [(each % 2**64) % modulus for each in listed]
    theirs = ops.transform.mod_ids(torch.from_numpy(ids), modulus)
    assert [each % 2**64 for each in theirs.tolist()] == expected
    found = jit_mod(words(ids), modulus)
    if modulus > 2**31:
        found = joined(found)
    else:
        assert found.dtype == np.int32
    np.testing.assert_array_equal(np.asarray(found, np.int64), theirs.numpy())
    with jax.enable_x64(True):
        found = jit_mod(jnp.asarray(ids), modulus)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, theirs.numpy())
        assert jit_mod(words(ids), modulus).dtype == (np.int64 if modulus <= 2**31 else np.uint32)


def test_int32_ids_keep_their_sign() -> None:
    ids = np.array([-1, 2**31 - 1, -(2**31), 0], np.int64)
    narrow = jnp.asarray(ids.astype(np.int32))
    expected = ops.hash.hash_ids(torch.from_numpy(ids)).numpy()
    np.testing.assert_array_equal(joined(ffi.hash_ids(narrow)), expected)
    np.testing.assert_array_equal(ffi.mod_ids(narrow, 1000), (ids.astype(np.uint64) % 1000).astype(np.int32))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(ffi.hash_ids(narrow), expected)


BOUNDARIES = [-np.inf, -3.5, 0.0, 0.0, 0.1, 1e30]


@settings(deadline=None, max_examples=30)
@given(floats, st.booleans())
def test_buckets_of_floats_are_those_of_the_operator(listed: list[float], right: bool) -> None:
    values = np.array([*listed[:-2], np.nan, np.float32(0.1)], np.float32)
    theirs = ops.transform.bucketize(torch.from_numpy(values), torch.tensor(BOUNDARIES), right=right).numpy()
    np.testing.assert_array_equal(theirs[:-2], np.searchsorted(np.float32(BOUNDARIES), values[:-2], _side(right)))
    find = jax.jit(lambda values: ffi.bucketize(values, BOUNDARIES, right=right))
    found = find(values)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, theirs)
    with jax.enable_x64(True):
        wide = values.astype(np.float64)
        found = find(wide)
        assert found.dtype == np.int64
        limits = torch.tensor(BOUNDARIES, dtype=torch.float64)
        np.testing.assert_array_equal(found, ops.transform.bucketize(torch.from_numpy(wide), limits, right=right))
        np.testing.assert_array_equal(find(values), theirs)


@settings(deadline=None, max_examples=30)
@given(ids_of_64_bits, st.lists(st.sampled_from([*EDGE_IDS, 2**40]), max_size=8), st.booleans())
def test_buckets_of_integers_are_compared_with_64_bits(listed: list[int], limits: list[int], right: bool) -> None:
    ids, limits = np.array(listed, np.int64), sorted(limits)
    expected = np.searchsorted(np.array(limits, np.int64), ids, _side(right))
    torch_limits = torch.tensor(limits, dtype=torch.int64)
    np.testing.assert_array_equal(ops.transform.bucketize(torch.from_numpy(ids), torch_limits, right=right), expected)
    np.testing.assert_array_equal(ffi.bucketize(words(ids), limits, right=right), expected)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            ffi.bucketize(jnp.asarray(ids), np.array(limits, np.int64), right=right), expected
        )


def _side(right: bool) -> Any:
    # numpy's side is the end of the equal boundaries after which the value goes; `right` is torch's.
    return "right" if right else "left"


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "hash_ids": ffi.hash_ids,
    "mod_ids": lambda ids: ffi.mod_ids(ids, 1000),
    "mod_ids, wide": lambda ids: ffi.mod_ids(ids, 2**40),
    "bucketize": lambda ids: ffi.bucketize(ids, [-5, 0, 2**33]),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_elementwise_functions_in_vmap_and_scan(function: Any) -> None:
    ids = words(EDGES.reshape(3, 4))
    expected = function(ids)
    assert expected.shape[:2] == (3, 4)
    for mapped in (
        jax.vmap(function),
        jax.vmap(function, in_axes=1, out_axes=1),
        jax.jit(jax.vmap(jax.vmap(function))),
        lambda ids: jax.lax.scan(lambda carry, row: (carry, function(row)), 0, ids)[1],
        lambda ids: jax.lax.map(function, ids),
    ):
        found = mapped(ids)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    for empty in (ids[:0], ids[:, :0]):
        assert function(empty).shape == (*empty.shape[:2], *expected.shape[2:])
    with jax.enable_x64(True):
        wide = jnp.asarray(EDGES.reshape(3, 4))
        np.testing.assert_array_equal(jax.jit(jax.vmap(function))(wide), function(wide))


def test_many_elements_in_several_threads() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(-(2**63), 2**63 - 1, 200_000)
    tensor = torch.from_numpy(ids)
    np.testing.assert_array_equal(joined(jit_hash(words(ids), "murmur")), ops.hash.hash_ids(tensor, "murmur"))
    np.testing.assert_array_equal(jit_mod(words(ids), 12345), ops.transform.mod_ids(tensor, 12345))
    values = random.normal(0, 1, (64, 4, 500)).astype(np.float32)
    limits = np.sort(random.normal(0, 1, 100)).astype(np.float32)
    found = jax.jit(lambda values: ffi.bucketize(values, limits))(values)
    np.testing.assert_array_equal(found, ops.transform.bucketize(torch.from_numpy(values), torch.from_numpy(limits)))


def test_buckets_have_no_gradient() -> None:
    def loss(x: Any) -> Any:
        return (x * ffi.bucketize(x, [0.0, 1.0])).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.array([-1.0, 0.5, 3.0])), [0.0, 1.0, 2.0])


def test_hashed_ids_are_looked_up() -> None:
    engine = engine_of(None)
    tables = ffi.JitTables(engine)

    @jax.jit
    def look_up(ids: Any, token: Any) -> Any:
        return ffi.lookup(tables, {"item": ffi.hash_ids(ids)}, None, token)[2]

    tables.end(look_up(words(EDGES), tables.begin(room=len(EDGES))))
    assert rows_of(engine)[0]["ids"].tolist() == sorted(ops.hash.hash_ids(torch.from_numpy(EDGES)).tolist())


def test_xla_merges_equal_calls_and_drops_unused_ones() -> None:
    def function(ids: Any) -> Any:
        ffi.mod_ids(ids, 3)
        return ffi.hash_ids(ids), ffi.hash_ids(ids)

    compiled = jax.jit(function).lower(words(EDGES)).compile().as_text()
    assert compiled.count('custom_call_target="recis_hash_ids"') == 1
    assert "recis_mod_ids" not in compiled


def pooled(values: torch.Tensor, offsets: torch.Tensor, combiner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return combined rows and winners by the operator that pools the rows of tables."""
    (rows, dim), bags = values.shape, offsets.shape[0] - 1
    width = -(-dim // 4) * 4
    records = torch.zeros(rows + 1, width + 4)  # metadata follows the values of a row
    records[:rows, :dim] = values
    blocks = Blocks(torch.tensor([records.data_ptr()]), 40, width * 4, width * 4 + 16)
    out, winners = torch.empty(bags, dim), torch.empty(bags, dim, dtype=torch.int32)
    bag = Bags([rows], [bags], [offsets], [], [combiner], [0])
    numbers, none = torch.arange(rows), torch.empty(0, 5, dtype=torch.int64)
    ops.gather.gather_bags(blocks, 0, dim, numbers, bag, [], [], none, out, [0], winners)
    return out, winners


def spread(gradient: torch.Tensor, offsets: torch.Tensor, rows: int, combiner: int, winners: Any) -> torch.Tensor:
    """Return the gradient of each row by the operators that update tables."""
    out = torch.zeros(rows, gradient.shape[1])
    if combiner == ops.gather.MAX:
        ops.gather.spread_max(offsets, winners, gradient, out)
        return out
    bags = Bags([rows], [len(gradient)], [offsets], [], [combiner], [0])
    groups = ops.gather.group_rows(torch.arange(rows), [0], rows, bags)
    sums = torch.empty(rows, gradient.shape[1])
    ops.update.reduce_rows(Gradients([gradient], groups), sums)
    count = int(groups.count)
    out[groups.unique[:count]] = sums[:count]
    return out


def reference(values: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], combiner: str) -> np.ndarray[Any, Any]:
    """Return combined rows, by numpy in float32."""
    out = np.zeros((len(offsets) - 1, values.shape[1]), np.float32)
    for bag, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        for row in values[begin:end]:
            out[bag] += row
        count = np.float32(end - begin)
        if combiner == "max" and end > begin:
            out[bag] = values[begin:end].max(0)
        elif combiner in ("mean", "sqrtn") and end > begin:
            out[bag] *= np.float32(1) / (count if combiner == "mean" else np.sqrt(count))
    return out


ROWS, BAGS = 9, 6


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, ROWS), min_size=BAGS - 1, max_size=BAGS - 1),
    st.sampled_from(sorted(COMBINERS)),
    st.sampled_from([1, 5, 16]),
    st.integers(0, 2**32 - 1),
)
def test_bags_and_gradients_are_those_of_the_operators(ends: list[int], combiner: Any, dim: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    offsets = np.array([0, *sorted(ends), ROWS], np.int64)
    values = random.choice(random.normal(0, 1, 20).astype(np.float32), (ROWS, dim))  # some are equal
    weights = random.choice(np.array([-1.5, 0.0, 0.3], np.float32), (BAGS, dim))
    combined, gradient = vjp_of(values, words(offsets), weights, combiner)
    np.testing.assert_array_equal(combined, reference(values, offsets, combiner))
    tensors = torch.from_numpy(values), torch.from_numpy(offsets), COMBINERS[combiner]
    theirs, winners = pooled(*tensors)
    assert np.asarray(combined).tobytes() == theirs.numpy().tobytes()
    expected = spread(torch.from_numpy(weights), tensors[1], ROWS, COMBINERS[combiner], winners)
    assert np.asarray(gradient).tobytes() == expected.numpy().tobytes()
    np.testing.assert_array_equal(ffi.segment_reduce(values, offsets, combiner), combined)
    with jax.enable_x64(True):
        found = vjp_of(values, jnp.asarray(offsets), weights, combiner)
        np.testing.assert_array_equal(found[0], combined)
        np.testing.assert_array_equal(found[1], gradient)


def _vjp_of(values: Any, offsets: Any, weights: Any, combiner: str) -> tuple[Any, Any]:
    combined, backward = jax.vjp(lambda values: ffi.segment_reduce(values, offsets, combiner), values)
    return combined, backward(weights)[0]


vjp_of = jax.jit(_vjp_of, static_argnums=3)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_rows_outside_all_bags_and_nan(combiner: Any) -> None:
    values = np.array([[7.0], [1.0], [np.nan], [3.0], [9.0]], np.float32)
    offsets = np.array([1, 2, 4], np.int32)
    combined, gradient = vjp_of(values, offsets, np.ones((2, 1), np.float32), combiner)
    np.testing.assert_array_equal(combined, np.array([[1.0], [np.nan]], np.float32))
    assert gradient[0, 0] == gradient[4, 0] == 0
    third = {"sum": 1.0, "mean": 0.5, "sqrtn": np.float32(1) / np.sqrt(np.float32(2)), "max": 1.0}[combiner]
    assert gradient[2, 0] == third
    assert gradient[3, 0] == (0 if combiner == "max" else third)


@pytest.mark.parametrize("combiner", COMBINERS)
def test_bags_in_vmap_and_scan(combiner: Any) -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, ROWS, 2, 4)).astype(np.float32)
    offsets = np.array([0, 4, 4, ROWS], np.int32)

    def reduce(part: Any) -> Any:
        return ffi.segment_reduce(part, offsets, combiner)

    def both(part: Any) -> Any:
        combined, backward = jax.vjp(reduce, part)
        return combined, backward(2 * combined)[0]

    expected = [jnp.stack(parts) for parts in zip(*map(both, values), strict=True)]
    for mapped in (jax.vmap(both), jax.jit(jax.vmap(both)), jax.jit(lambda values: jax.lax.map(both, values))):
        for found, wanted in zip(mapped(values), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(jax.vmap(reduce, in_axes=2, out_axes=2)(values[0]), reduce(values[0]))
    # A Jacobian maps over the gradients alone.
    rows = values[0, :, 0]
    jacobian = jax.jacrev(reduce)(rows)
    for bag in range(3):
        for column in range(4):
            gradient = jax.grad(lambda rows, at=(bag, column): reduce(rows)[at])(rows)
            np.testing.assert_array_equal(jacobian[bag, column], gradient)


def test_long_bags_and_many_threads() -> None:
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (70_000, 24)).astype(np.float32)
    offsets = np.sort(random.integers(0, 70_000, 2_000))
    offsets = np.array([0, 20_000, *offsets[offsets > 20_000], 70_000])
    weights = random.normal(0, 1, (len(offsets) - 1, 24)).astype(np.float32)
    combined, gradient = vjp_of(values, words(offsets), weights, "mean")
    theirs, _ = pooled(torch.from_numpy(values), torch.from_numpy(offsets), ops.gather.MEAN)
    np.testing.assert_array_equal(combined, theirs)
    expected = spread(torch.from_numpy(weights), torch.from_numpy(offsets), 70_000, ops.gather.MEAN, None)
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0, 0)])
@pytest.mark.parametrize("combiner", ["mean", "max"])
def test_bags_without_elements(shape: tuple[int, int], combiner: Any) -> None:
    values = np.ones(shape, np.float32)
    for offsets in (np.zeros(1, np.int32), np.zeros(4, np.int32)):
        weights = np.ones((len(offsets) - 1, shape[1]), np.float32)
        combined, gradient = vjp_of(values, offsets, weights, combiner)
        np.testing.assert_array_equal(combined, np.zeros_like(weights))
        np.testing.assert_array_equal(gradient, np.zeros(shape))
    assert ffi.segment_reduce(np.ones(3, np.float32), np.array([0, 3]), "sum").tolist() == [3.0]


NAN = np.array([0.0, np.nan], np.float32)
IDS = np.arange(3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ffi.hash_ids(IDS, "md5"), ValueError, r"hash_ids: kind must be one of \['farm', .* got 'md5'"),
        (lambda: ffi.hash_ids([1, 2]), TypeError, "ffi.hash_ids: ids must be int32, pairs .* got a list"),
        (lambda: ffi.hash_ids(NAN), TypeError, "ffi.hash_ids: ids must be int32, pairs .* got float32"),
        (lambda: ffi.hash_ids(np.ones(3, np.uint32)), ValueError, r"ids: uint32 must be pairs of words, .* got \[3\]"),
        (lambda: ffi.mod_ids(IDS, 0), ValueError, r"mod_ids: modulus must be from 1 to 18446744073709551615, got 0"),
        (lambda: ffi.mod_ids(IDS, -3), ValueError, "mod_ids: modulus must be from 1 .* got -3"),
        (lambda: ffi.mod_ids(IDS, 2**64), ValueError, "mod_ids: modulus must be from 1"),
        (lambda: ffi.mod_ids(IDS, 2.5), TypeError, "mod_ids: modulus must be an int"),
        (lambda: ffi.bucketize(NAN, [1.0, 0.0]), ValueError, "boundaries must not decrease, got 1.0 and then 0.0 at 1"),
        (lambda: ffi.bucketize(NAN, NAN), ValueError, "boundaries must be numbers, got NaN at 1"),
        (lambda: ffi.bucketize(NAN, [[1.0]]), ValueError, r"boundaries must be \[K\], got \[1, 1\]"),
        (lambda: ffi.bucketize(IDS, [0.5]), TypeError, "boundaries must be integers .* got float64"),
        (lambda: ffi.bucketize(IDS, np.array([2**63], np.uint64)), ValueError, "boundaries must be below 2.63"),
        (lambda: ffi.bucketize(IDS.astype(np.uint64), [1]), TypeError, "values must be .* got uint64"),
        (lambda: ffi.bucketize(NAN.astype(np.float64), [1.0]), TypeError, "values must be .* got float64"),
        (lambda: ffi.bucketize(NAN.astype(np.float16), [1.0]), TypeError, "values must be .* got float16"),
        (lambda: jax.jit(ffi.bucketize)(NAN, NAN), TypeError, "boundaries must be known .* jax.numpy.searchsorted"),
        (lambda: ffi.segment_reduce(NAN, [0, 1]), TypeError, "ffi.segment_reduce: offsets must be int32"),
        (lambda: ffi.segment_reduce(NAN, np.array([0, 3])), ValueError, "within the 2 rows of the values, got 3 at 1"),
        (lambda: ffi.segment_reduce(NAN, np.array([1, 0])), ValueError, "offsets must not decrease .* got 0 at 1"),
        (lambda: ffi.segment_reduce(NAN, np.array([-1, 0], np.int32)), ValueError, "got -1 at 0"),
        (lambda: ffi.segment_reduce(NAN, np.zeros((2, 2), np.int64)), ValueError, r"offsets must be \[V \+ 1\]"),
        (lambda: ffi.segment_reduce(NAN, IDS[:2], "min"), ValueError, "combiner must be one of .* got 'min'"),
        (lambda: ffi.segment_reduce(IDS, IDS[:2]), TypeError, "values must be float32, got int64"),
        (lambda: ffi.segment_reduce(np.float32(1), IDS[:1]), ValueError, "values must be .*, got a scalar"),
    ],
)
def test_bad_arguments_are_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_bad_elements_are_refused_when_the_call_runs() -> None:
    find = jax.jit(lambda values: ffi.bucketize(values, [1.0], refuse_nan=True))
    assert find(jnp.array([0.5, 2.0])).tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="recis_hybrid: .*bucketize: element 1 is NaN"):
        find(NAN).block_until_ready()
    for offsets in ([0, 3], [1, 0], [-1, 1]):
        with pytest.raises(RuntimeError, match="segment_reduce: offsets must not decrease .* within the 2 rows"):
            jit_reduce(NAN, jnp.array(offsets), "sum").block_until_ready()


def test_unsupported_transformations_are_refused_by_name() -> None:
    values, offsets = np.ones((2, 3), np.float32), np.array([[0, 1], [0, 3]], np.int32)
    with pytest.raises(NotImplementedError, match="segment_reduce: vmap over offsets is not supported"):
        jax.vmap(ffi.segment_reduce)(values, offsets)

    def loss(values: Any) -> Any:
        return (ffi.segment_reduce(values, offsets[1]) ** 2).sum()

    with pytest.raises(TypeError, match="segment_reduce: only gradients of first order"):
        jax.grad(lambda values: jax.grad(loss)(values).sum())(values[0])
    for name, function in (("hash_ids", jit_hash), ("mod_ids", jax.jit(lambda ids: ffi.mod_ids(ids, 3)))):
        with pytest.raises(NotImplementedError, match=f"ffi.{name}: .* compiled for cuda"):
            jax.export.export(function, platforms=["cuda"])(words(IDS))
