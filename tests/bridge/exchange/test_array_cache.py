"""The cache of array views of parameters, which must always show the current values."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.near import assert_near

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
from recis_hybrid.bridge import JaxTower  # noqa: E402


def make(shape: tuple[int, ...] = (4, 4)) -> JaxTower:
    return JaxTower(lambda params, x: x @ params["w"], {"w": np.full(shape, 0.5, np.float32)})


def check(tower: JaxTower) -> None:
    """Compare output and gradient with those of the current parameter."""
    (w,) = tower.parameters()
    x = torch.rand(8, w.shape[0], dtype=w.dtype).requires_grad_()
    y = tower(x)
    assert_near(y, x @ w)
    gradient = torch.rand_like(y)
    assert_near(torch.autograd.grad(y, x, gradient)[0], gradient @ w.detach().T)


def in_place(w: torch.nn.Parameter) -> None:
    w.add_(torch.rand(w.shape))


def other_memory(w: torch.nn.Parameter) -> None:
    w.data = torch.rand(w.shape)


def other_shape(w: torch.nn.Parameter) -> None:
    w.data = torch.rand(16, dtype=w.dtype).view(8, 2)


def same_memory_other_shape(w: torch.nn.Parameter) -> None:
    w.data = w.data.view(2, 8)


def same_memory_other_dtype(w: torch.nn.Parameter) -> None:
    w.data = w.data.view(torch.bfloat16).zero_()


def shared_between_processes(w: torch.nn.Parameter) -> None:
    w.share_memory_()
    w.uniform_()


def freed_and_allocated_again(w: torch.nn.Parameter) -> None:
    size = w.untyped_storage().size()
    w.untyped_storage().resize_(0)
    w.untyped_storage().resize_(size)
    w.uniform_()


@pytest.mark.parametrize(
    "change",
    [
        *(in_place, other_memory, other_shape, same_memory_other_shape, same_memory_other_dtype),
        *(shared_between_processes, freed_and_allocated_again),
    ],
)
def test_changes_to_a_parameter_between_calls_take_effect(change: Callable[[torch.nn.Parameter], None]) -> None:
    tower = make()
    check(tower)
    with torch.no_grad():
        change(next(iter(tower.parameters())))
    check(tower)


def test_a_parameter_that_becomes_strided_at_the_same_address_is_refused() -> None:
    tower = make()
    check(tower)
    (w,) = tower.parameters()
    w.data = w.data.t()
    with pytest.raises(ValueError, match=r"parameter 'w'.*strided"):
        tower(torch.rand(8, 4))


def test_parameters_are_cached_and_temporary_tensors_are_not() -> None:
    tower = make()
    (w,) = tower.parameters()
    (first,), _ = tower._array_cache.share([w])
    check(tower)
    assert tower._array_cache.share([w])[0][0] is first
    tensor = torch.ones(4, 4)
    reference = weakref.ref(tensor)
    x = torch.rand(2, 4)
    y = torch.func.functional_call(tower, {"w": tensor}, (x,))
    assert_near(y, x @ tensor)
    del tensor, y
    gc.collect()
    assert reference() is None
    check(tower)


def test_the_memory_before_a_cast_is_freed() -> None:
    tower = make()
    check(tower)
    freed: list[int] = []
    (w,) = tower.parameters()
    (array,), _ = tower._array_cache.share([w])
    weakref.finalize(array, freed.append, 1)
    del array
    tower.to(torch.bfloat16)
    gc.collect()
    assert freed == [1]


def test_a_copy_has_its_own_arrays() -> None:
    tower = make()
    check(tower)
    twin: Any = copy.deepcopy(tower)
    with torch.no_grad():
        twin.w.zero_()
    check(twin)
    check(tower)
    assert tower.w.sum() == 8  # type: ignore[operator]
