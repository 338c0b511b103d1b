"""to_jax and to_torch: shared memory or an error."""

from __future__ import annotations

import gc

import pytest
import torch

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
from recis_hybrid.bridge import copies, to_jax, to_torch  # noqa: E402

NARROW = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.bool,
    torch.complex64,
]
WIDE = [torch.int64, torch.float64]


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_dtypes_share_memory_in_both_directions(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).to(dtype).reshape(3, 4)
    before = copies()
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    back = to_torch(array)
    assert back.data_ptr() == tensor.data_ptr()
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert copies() == before


@pytest.mark.parametrize("dtype", WIDE)
def test_64_bit_dtypes_need_x64_and_are_never_truncated(dtype: torch.dtype) -> None:
    tensor = torch.tensor([2**40 + 5, -(2**62)]).to(dtype)
    for copy in (False, True):
        with pytest.raises(ValueError, match="x64"):
            to_jax(tensor, copy=copy)
    with jax.enable_x64(True):
        array = to_jax(tensor)
        assert array.unsafe_buffer_pointer() == tensor.data_ptr()
        assert torch.equal(to_torch(array), tensor)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 1), (1, 5), (2, 1, 3)])
def test_scalar_empty_and_flat_shapes(shape: tuple[int, ...]) -> None:
    tensor = torch.rand(shape)
    array = to_jax(tensor)
    assert array.shape == shape
    assert torch.equal(to_torch(array), tensor)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: torch.zeros(33)[1:], "64"),
        (lambda: torch.zeros(8, 8)[:, :4], "contiguous|strid"),
        (lambda: torch.zeros(8, 16)[::2], "contiguous|strid"),
        (lambda: torch.zeros(1, 4).expand(3, 4), "contiguous|strid"),
        (lambda: torch.zeros(4, requires_grad=True), "detach"),
    ],
)
def test_unshareable_memory_is_refused_with_cause_and_remedy(make: object, cause: str) -> None:
    tensor = make()  # type: ignore[operator]
    with pytest.raises(ValueError, match=cause):
        to_jax(tensor)
    before = copies()
    array = to_jax(tensor.detach(), copy=True)
    assert copies() == before + 1
    assert torch.equal(to_torch(array), tensor.detach())


@pytest.mark.parametrize("left", [0, 64])
def test_a_tensor_with_a_freed_storage_is_refused(left: int) -> None:
    tensor = torch.rand(1000)
    row = tensor[512:]
    tensor.untyped_storage().resize_(left)
    for each in (tensor, row):
        with pytest.raises(ValueError, match=f"its storage has been freed to {left} bytes"):
            to_jax(each)
    empty = torch.empty(0, 3)
    empty.untyped_storage().resize_(0)
    assert to_jax(empty).shape == (0, 3)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float8_e5m2, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(), (64,), (4, 16)])
def test_memory_that_jax_reads_cannot_be_freed_by_resizing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    array = to_jax(tensor)
    for shrink in (lambda: tensor.resize_(5_000_000), lambda: tensor.untyped_storage().resize_(0)):
        with pytest.raises(RuntimeError, match="not resizable"):
            shrink()
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert bool((jax.numpy.abs(array).astype(jax.numpy.float32) == 1).all())


def test_pytrees_are_converted_and_errors_name_the_leaf() -> None:
    tree = {"a": [torch.ones(16), torch.zeros(16)], "b": None}
    arrays = to_jax(tree)
    assert arrays["a"][1].unsafe_buffer_pointer() == tree["a"][1].data_ptr()  # type: ignore[index]
    assert to_torch(arrays)["b"] is None
    with pytest.raises(ValueError, match=r"\['a'\]\[0\]"):
        to_jax({"a": [torch.zeros(33)[1:]]})
    with pytest.raises(TypeError, match="str"):
        to_jax({"a": "not a tensor"})


def test_memory_outlives_its_producer_in_both_directions() -> None:
    array = to_jax(torch.full((1024,), 3.0))
    tensor = to_torch(jax.numpy.full((1024,), 4.0))
    gc.collect()
    scratch = [torch.full((1024,), -1.0) for _ in range(64)]
    assert float(array.sum()) == 3 * 1024
    assert float(tensor.sum()) == 4 * 1024
    del scratch


def test_a_copy_may_be_written_to() -> None:
    array = jax.numpy.ones(16)
    tensor = to_torch(array, copy=True)
    tensor.zero_()
    assert float(array.sum()) == 16
