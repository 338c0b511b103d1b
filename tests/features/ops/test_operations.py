from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.features import Bucketize, Column, Hash, Mod, Op
from recis_hybrid.ragged import RaggedTensor
from tests.support import hashes
from tests.support.devices import EDGE_IDS, on_devices

any_id = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-8, 8), st.sampled_from(EDGE_IDS))


def apply(op: Op, column: torch.Tensor | RaggedTensor) -> torch.Tensor | RaggedTensor:
    return op.kernel()(Column.of(column)).pack()


def on_dense(op: Op, values: torch.Tensor) -> torch.Tensor:
    result = apply(op, values)
    assert isinstance(result, torch.Tensor)
    return result


@on_devices
def test_hash_of_strings_returns_an_id_for_each_row(device: str) -> None:
    strings = [b"", b"a", "é".encode(), b"x" * 100]
    column = RaggedTensor.from_strings(strings).to(device)
    for op, reference in ((Hash(), hashes.farm), (Hash("murmur"), hashes.murmur)):
        got = apply(op, column)
        assert isinstance(got, torch.Tensor)
        assert (got.dtype, got.device) == (torch.int64, column.device)
        assert got.tolist() == [reference(string) for string in strings]


@on_devices
def test_hash_of_integers_equals_the_hash_of_their_eight_bytes(device: str) -> None:
    want = [hashes.farm(i.to_bytes(8, "little", signed=True)) for i in EDGE_IDS]
    assert on_dense(Hash("farm"), torch.tensor(EDGE_IDS, device=device)).tolist() == want
    for dtype in (torch.int8, torch.int16, torch.int32):
        narrow = torch.tensor([-1, 0, 7], dtype=dtype, device=device)
        assert torch.equal(on_dense(Hash("farm"), narrow), on_dense(Hash("farm"), narrow.long()))


def test_a_string_and_a_number_are_different_ids() -> None:
    assert apply(Hash(), RaggedTensor.from_strings(["7"])) != on_dense(Hash(), torch.tensor([7]))


@pytest.mark.parametrize("op", [Hash("murmur"), Mod(10), Bucketize([2, 4])])
@on_devices
def test_ragged_columns_keep_offsets_and_weights(device: str, op: Op) -> None:
    column = RaggedTensor.from_lists([[1, 2], [], [3, 4, 5]], weights=[[1, 2], [], [3, 4, 5]]).to(device)
    got = apply(op, column)
    assert isinstance(got, RaggedTensor)
    assert got.offsets is column.offsets
    assert got.weights is column.weights
    assert torch.equal(got.values, on_dense(op, column.values))
    assert column.values.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("op", [Hash(), Mod(10), Bucketize([2, 4])])
def test_columns_without_rows(op: Op) -> None:
    assert on_dense(op, torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)
    got = apply(op, RaggedTensor.from_lists([]))
    assert isinstance(got, RaggedTensor)
    assert (got.batch_size, got.values.shape) == (0, (0,))


def test_hash_of_no_strings() -> None:
    assert apply(Hash(), RaggedTensor.from_strings([])).shape == (0,)  # type: ignore[union-attr]


@given(st.lists(any_id, max_size=10), st.integers(1, 2**63 - 1))
def test_mod_reads_ids_as_unsigned(ids: list[int], n: int) -> None:
    assert on_dense(Mod(n), torch.tensor(ids, dtype=torch.int64)).tolist() == [i % 2**64 % n for i in ids]


def test_mod_widens_ids_before_reading_them_as_unsigned() -> None:
    assert on_dense(Mod(10), torch.tensor([-1, 12], dtype=torch.int32)).tolist() == [(2**64 - 1) % 10, 2]


@given(
    st.lists(any_id, min_size=1, max_size=10),
    st.lists(st.one_of(any_id, st.floats(allow_nan=False), st.integers(-(2**70), 2**70)), min_size=1, max_size=8),
    st.booleans(),
)
def test_integers_are_compared_exactly_with_any_boundaries(
    values: list[int], boundaries: list[float], right: bool
) -> None:
    boundaries = sorted(boundaries)
    values += [int(b) for b in boundaries if -(2**63) <= b < 2**63]
    # Python compares integers and floats by their exact values.
    want = [sum(b <= v if right else b < v for b in boundaries) for v in values]
    assert on_dense(Bucketize(boundaries, right=right), torch.tensor(values)).tolist() == want


@pytest.mark.parametrize("right", [True, False])
def test_infinite_boundaries(right: bool) -> None:
    spec = Bucketize([-math.inf, 0, math.inf], right=right)
    assert on_dense(spec, torch.tensor([-(2**63), 5, 2**63 - 1])).tolist() == [1, 2, 2]
    want = [1, 2, 3] if right else [0, 2, 2]
    assert on_dense(spec, torch.tensor([-math.inf, 5, math.inf])).tolist() == want


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decimal_values_equal_the_same_boundaries(device: str, dtype: torch.dtype) -> None:
    decimals = [k / 10 for k in range(1, 30)]
    spec = Bucketize(decimals)
    values = torch.tensor(decimals, dtype=dtype, device=device)
    # Called twice: the second call finds the boundaries on the device.
    kernel = spec.kernel()
    for _ in range(2):
        assert kernel(Column(values)).values.tolist() == list(range(1, 30))


@pytest.mark.parametrize("right", [True, False])
def test_buckets_of_floats_match_torch(right: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, 3, generator=generator)
    boundaries = torch.randn(20, generator=generator).sort().values
    got = on_dense(Bucketize(boundaries.tolist(), right=right), values)
    assert torch.equal(got, torch.bucketize(values, boundaries, right=right))


def test_nan_is_refused() -> None:
    with pytest.raises(RuntimeError, match="element 1 is NaN"):
        on_dense(Bucketize([1, 2]), torch.tensor([1.5, math.nan]))


def test_boundaries_of_several_types() -> None:
    spec = Bucketize([0.5, 2.0])
    assert Bucketize(np.array([0.5, 2.0])) == Bucketize(torch.tensor([0.5, 2.0])) == spec  # type: ignore[arg-type]
    assert Bucketize((Fraction(1, 2), 2)) == spec  # type: ignore[arg-type]
    assert hash(Bucketize([0.5, 2])) == hash(spec)
    assert Bucketize([0.5, 2.0], right=False) != spec
    repeated = Bucketize([1, 1, 1])
    assert repeated.fault() is None
    assert on_dense(repeated, torch.tensor([0, 1])).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("op", "column", "message"),
    [
        (Hash(), torch.tensor([1.0]), "Hash takes integers, got torch.float32; put a Bucketize before it"),
        (Hash(), torch.tensor([True]), r"Hash takes integers, got torch.bool; convert it with .to\(torch.int64\)"),
        (Hash(), torch.tensor([1], dtype=torch.uint8), "a dense uint8 column holds no strings"),
        (Mod(3), torch.tensor([1.0]).double(), "Mod takes integers, got torch.float64; put a Bucketize before it"),
        (Mod(3), RaggedTensor.from_strings(["a"]), "not the bytes of strings; put a Hash before it"),
        (Bucketize([1]), torch.tensor([1.0]).half(), r"float32 or float64, got torch.float16; .* with .float\(\)"),
        (Bucketize([1]), RaggedTensor.from_strings(["a"]), "got torch.uint8; read strings as numbers"),
    ],
)
def test_columns_of_the_wrong_type_are_refused(op: Op, column: torch.Tensor | RaggedTensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        apply(op, column)


def test_weights_on_strings_are_refused() -> None:
    strings = RaggedTensor.from_strings(["ab"])
    with pytest.raises(ValueError, match="weights on a string column"):
        apply(Hash(), RaggedTensor(strings.values, strings.offsets, torch.ones(2)))


def test_names_in_the_plan() -> None:
    assert [str(op) for op in (Hash("murmur"), Mod(7), Bucketize([1, 2]), Bucketize([1], right=False))] == [
        "hash[murmur]",
        "mod[7]",
        "bucketize[2 boundaries]",
        "bucketize[1 boundaries, right=False]",
    ]
