from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid import ops
from tests.support.devices import EDGE_IDS, no_synchronization, on_accelerators, on_devices

any_id = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-8, 8), st.sampled_from(EDGE_IDS))
any_modulus = st.one_of(
    st.integers(1, 2**64 - 1),
    st.integers(1, 1000),
    st.integers(0, 63).map(lambda bits: 2**bits),
    st.integers(1, 64).map(lambda bits: 2**bits - 1),
    st.integers(1, 63).map(lambda bits: 2**bits + 1),
)


def signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit integer."""
    return (word + 2**63) % 2**64 - 2**63


# No subnormals: whether they count as zero depends on a processor mode that other libraries set.
FLOATS = {
    torch.float32: st.floats(width=32, allow_nan=False, allow_subnormal=False),
    torch.float64: st.floats(width=64, allow_nan=False, allow_subnormal=False),
    torch.int64: any_id,
}


@on_devices
@pytest.mark.parametrize(
    "modulus", [1, 2, 3, 7, 10, 1000, 2**16, 2**31 - 1, 2**32, 2**52, 2**62 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
)
def test_mod_is_unsigned(device: str, modulus: int) -> None:
    near = [k * modulus + d for k in (1, 2, (2**64 - 1) // modulus) for d in (-1, 0, 1)]
    ids = EDGE_IDS + [signed(i) for i in near]
    got = ops.transform.mod_ids(torch.tensor(ids, device=device), modulus)
    assert got.tolist() == [signed(i % 2**64 % modulus) for i in ids]


@given(st.lists(any_id, max_size=20), any_modulus)
def test_mod_of_any_ids_by_any_modulus(ids: list[int], modulus: int) -> None:
    got = ops.transform.mod_ids(torch.tensor(ids, dtype=torch.int64), modulus)
    assert got.tolist() == [signed(i % 2**64 % modulus) for i in ids]


@given(st.lists(any_id, max_size=20))
def test_mod_of_powers_of_two_keeps_the_lowest_bits(ids: list[int]) -> None:
    """RecIS masks the ids of coalesced tables, including unsigned hashes, like this."""
    for bits in (1, 52, 63):
        got = ops.transform.mod_ids(torch.tensor(ids, dtype=torch.int64), 2**bits)
        assert got.tolist() == [i & (2**bits - 1) for i in ids]
    unsigned = np.array([i % 2**64 for i in ids], dtype=np.uint64)
    cut = ops.transform.mod_ids(torch.from_numpy(unsigned.view(np.int64)), 2**52)
    assert cut.tolist() == (unsigned & np.uint64(2**52 - 1)).tolist()


@on_devices
def test_mod_keeps_the_shape(device: str) -> None:
    grid = torch.arange(-6, 6, device=device).view(3, 4)
    want = torch.tensor([[i % 2**64 % 5 for i in row] for row in grid.tolist()], device=device)
    assert torch.equal(ops.transform.mod_ids(grid, 5), want)
    assert torch.equal(ops.transform.mod_ids(grid.t(), 5), want.t())
    assert ops.transform.mod_ids(grid[:0], 5).shape == (0, 4)


def test_mod_with_several_threads() -> None:
    ids = torch.randint(-(2**63), 2**63 - 1, (100_000,), generator=torch.Generator().manual_seed(0))
    want = (ids.numpy().view(np.uint64) % np.uint64(1_000_003)).astype(np.int64)
    assert np.array_equal(ops.transform.mod_ids(ids, 1_000_003).numpy(), want)


@pytest.mark.parametrize("modulus", [0, -1, 2**64])
def test_mod_refuses_bad_moduli(modulus: int) -> None:
    with pytest.raises(ValueError, match=f"1 to {2**64 - 1}, got {modulus}"):
        ops.transform.mod_ids(torch.tensor([1]), modulus)


def test_mod_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match="must be int64, got torch.float32"):
        ops.transform.mod_ids(torch.tensor([1.0]), 3)
    with pytest.raises(RuntimeError, match="must not be 0"):
        torch.ops.recis.mod_ids(torch.tensor([1]), 0)


@on_devices
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 17, 1000])
def test_buckets_equal_those_of_torch(device: str, dtype: torch.dtype, right: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    boundaries = (torch.randn(count, generator=generator) * 100).to(dtype).sort().values.to(device)
    values = torch.cat([(torch.randn(5_000, generator=generator) * 100).to(dtype).to(device), boundaries]).view(-1, 1)
    got = ops.transform.bucketize(values, boundaries, right=right)
    assert torch.equal(got, torch.bucketize(values, boundaries, right=right))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
@given(data=st.data(), right=st.booleans())
def test_buckets_equal_those_of_numpy(dtype: torch.dtype, data: st.DataObject, right: bool) -> None:
    values = torch.tensor(data.draw(st.lists(FLOATS[dtype], max_size=10)), dtype=dtype)
    boundaries = torch.tensor(sorted(data.draw(st.lists(FLOATS[dtype], max_size=10))), dtype=dtype)
    values = torch.cat([values, boundaries])
    want = np.searchsorted(boundaries.numpy(), values.numpy(), side="right" if right else "left")
    assert np.array_equal(ops.transform.bucketize(values, boundaries, right=right).numpy(), want)


@on_devices
def test_a_value_on_a_boundary_goes_up_by_default(device: str) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, 2.0], device=device)
    boundaries = torch.tensor([0.0, 1.0], device=device)
    assert ops.transform.bucketize(values, boundaries).tolist() == [1, 1, 2, 2]
    assert ops.transform.bucketize(values, boundaries, right=False).tolist() == [0, 0, 1, 2]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("right", [True, False])
def test_infinities_and_nan(device: str, dtype: torch.dtype, right: bool) -> None:
    values = torch.tensor([-math.inf, math.inf, math.nan], dtype=dtype, device=device)
    for count in (1, 2, 3, 8):
        boundaries = torch.arange(count, dtype=dtype, device=device)
        assert ops.transform.bucketize(values, boundaries, right=right).tolist() == [0, count, count]


@on_devices
def test_integers_are_compared_exactly(device: str) -> None:
    ids = torch.tensor([2**53, 2**53 + 1, 2**63 - 1, -(2**63)], device=device)
    boundaries = torch.tensor([-(2**63), 2**53 + 1, 2**63 - 1], device=device)
    assert ops.transform.bucketize(ids, boundaries).tolist() == [1, 2, 3, 1]
    assert ops.transform.bucketize(ids, boundaries, right=False).tolist() == [1, 1, 2, 0]


def test_bucketize_refuses_bad_arguments() -> None:
    values, boundaries = torch.tensor([1.0]), torch.tensor([0.0])
    with pytest.raises(TypeError, match="int64, float32 or float64, got torch.float16"):
        ops.transform.bucketize(values.half(), boundaries.half())
    with pytest.raises(TypeError, match="boundaries must be torch.float32 like values, got torch.float64"):
        ops.transform.bucketize(values, boundaries.double())
    with pytest.raises(ValueError, match=r"\[K\] on cpu, got \[1, 1\] on cpu"):
        ops.transform.bucketize(values, boundaries.view(1, 1))
    with pytest.raises(ValueError, match=r"\[K\] on cpu, got \[1\] on meta"):
        ops.transform.bucketize(values, boundaries.to("meta"))
    with pytest.raises(RuntimeError, match="unexpected dtype"):
        torch.ops.recis.bucketize(values.int(), boundaries.int(), True)


@on_devices
def test_schemas_and_fakes_of_operators(device: str) -> None:
    ids = torch.arange(6, device=device).view(2, 3)
    torch.library.opcheck(torch.ops.recis.mod_ids.default, (ids, 4))
    torch.library.opcheck(torch.ops.recis.multi_hash_ids.default, (ids, 3, 29, 10))
    torch.library.opcheck(torch.ops.recis.cross_ids.default, (ids, ids))
    torch.library.opcheck(torch.ops.recis.clip_ids.default, (ids, 1, 4))
    used, word = torch.tensor([0, 2], device=device), ops.faults.words(ids, "test")
    torch.library.opcheck(torch.ops.recis.map_values.default, (ids.float(), 0, 1.0, 2.0, used, word))
    torch.library.opcheck(torch.ops.recis.map_values.default, (ids.float(), 3, 1.0, 2.0))
    torch.library.opcheck(torch.ops.recis.cast_to_ids.default, (ids.float(), used, word))
    for values in (ids, ids.float(), ids.double()):
        torch.library.opcheck(torch.ops.recis.bucketize.default, (values, values[0], True))
        torch.library.opcheck(torch.ops.recis.bucketize.default, (values, values[0], False, True, used, word))


BAD_NUMBERS: list[tuple[Callable[..., torch.Tensor], float, str]] = [
    (lambda x, **used: ops.transform.map_values(x, "log", 1.0, **used), -1.0, "map_values: .*has no logarithm"),
    (lambda x, **used: ops.transform.map_values(x, "log", 1.0, **used), math.nan, "map_values: .*has no logarithm"),
    (lambda x, **used: ops.transform.map_values(x, "clip", 0, 1, **used), math.nan, "map_values: .*is NaN"),
    (lambda x, **used: ops.transform.map_values(x, "normalize", 0, 1, **used), math.nan, "map_values: .*is NaN"),
    (lambda x, **used: ops.transform.cast_to_ids(x, **used), math.nan, "cast_to_ids: .*is NaN or outside"),
    (lambda x, **used: ops.transform.cast_to_ids(x, **used), 2.0**63, "cast_to_ids: .*outside the range of int64"),
    (
        lambda x, **used: ops.transform.bucketize(x, x.new_zeros(1), refuse_nan=True, **used),
        math.nan,
        "bucketize: .*is NaN",
    ),
]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("call", "bad", "message"), BAD_NUMBERS)
def test_numbers_without_a_result_are_refused(
    device: str, call: Callable[..., torch.Tensor], bad: float, message: str, dtype: torch.dtype
) -> None:
    good = torch.full((300, 2), 0.5, dtype=dtype, device=device)
    expected, values = call(good), good.clone()
    values[200, 1] = bad
    if device == "cpu":
        with pytest.raises(RuntimeError, match=f"{message}.*") as error:
            call(values)
    else:
        with no_synchronization(device):
            call(values)
        with pytest.raises(RuntimeError, match=message) as error:
            ops.faults.check()
    assert "element 401 " in str(error.value)
    # The device works as before, and an error is raised once.
    assert torch.equal(call(good), expected)
    ops.faults.check()


@on_accelerators
@pytest.mark.parametrize(("call", "bad", "message"), BAD_NUMBERS)
def test_the_next_call_on_an_accelerator_raises(
    device: str, call: Callable[..., torch.Tensor], bad: float, message: str
) -> None:
    values = torch.tensor([0.5, bad], device=device)
    call(values)
    torch.accelerator.synchronize()
    with pytest.raises(RuntimeError, match=f"{message}.*: element 1 of an earlier call on {device}"):
        call(values)
    ops.faults.check()


@on_devices
@pytest.mark.parametrize(("call", "bad", "message"), BAD_NUMBERS)
def test_numbers_after_the_rows_in_use_are_not_refused(
    device: str, call: Callable[..., torch.Tensor], bad: float, message: str
) -> None:
    values = torch.tensor([[0.5, 0.5], [0.5, 0.5], [bad, bad]], device=device)
    used = torch.tensor([0, 1, 2], device=device)
    assert torch.equal(call(values, used=used)[:2], call(values[:2]))
    ops.faults.check()

    def refused() -> None:
        call(values, used=used + 1)
        ops.faults.check()

    with pytest.raises(RuntimeError, match=message):
        refused()


@on_accelerators
def test_an_accelerator_needs_a_word_for_faults(device: str) -> None:
    values = torch.ones(2, device=device)
    for call in (
        lambda: torch.ops.recis.cast_to_ids(values),
        lambda: torch.ops.recis.map_values(values, 0, 1.0, 0.0),
        lambda: torch.ops.recis.bucketize(values, values, True, True),
    ):
        with pytest.raises(RuntimeError, match="faults must hold the address of a word"):
            call()


@on_accelerators
def test_numbers_that_need_no_refusal_need_no_word(device: str) -> None:
    values = torch.tensor([0.5, math.nan], device=device)
    assert ops.transform.map_values(values, "fill", 2.0).tolist() == [0.5, 2.0]
    assert ops.transform.bucketize(values, values[:1]).tolist() == [1, 1]
    ops.faults.check()
