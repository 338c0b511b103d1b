"""Conversions with JAX's private and public functions."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
from recis_hybrid.bridge import to_jax, to_torch  # noqa: E402
from recis_hybrid.bridge.exchange import _dlpack_fast  # noqa: E402
from tests.support.programs import run_code  # noqa: E402


@pytest.fixture
def public_conversions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulate a JAX without the private functions."""

    def missing() -> _dlpack_fast.Conversions:
        raise AttributeError("dlpack_managed_tensor_to_buffer")

    _dlpack_fast.cpu_conversions.cache_clear()
    monkeypatch.setattr(_dlpack_fast, "_private_conversions", missing)
    yield
    _dlpack_fast.cpu_conversions.cache_clear()


def test_this_jax_has_the_fast_conversions() -> None:
    assert _dlpack_fast.cpu_conversions().private


@pytest.mark.usefixtures("public_conversions")
def test_the_public_conversions_share_memory() -> None:
    assert not _dlpack_fast.cpu_conversions().private
    tensor = torch.rand(4, 16)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_torch(array).data_ptr() == tensor.data_ptr()
    with pytest.raises(ValueError, match="64"):
        to_jax(tensor.view(-1)[1:])


def test_private_conversions_that_copy_are_not_used() -> None:
    def copying(tensor: torch.Tensor) -> jax.Array:
        return _dlpack_fast.PUBLIC.to_jax(tensor.clone())

    assert _dlpack_fast._are_valid(_dlpack_fast.PUBLIC)
    assert not _dlpack_fast._are_valid(_dlpack_fast.Conversions(copying, _dlpack_fast.PUBLIC.to_torch, private=True))


def test_an_array_keeps_its_tensor_alive_until_it_is_dropped() -> None:
    owner = np.zeros(1024 + 16, np.float32)  # supports weak references, but is rarely aligned
    skip = -owner.ctypes.data % 64 // 4
    tensor = torch.from_numpy(owner[skip : skip + 1024])
    alive = weakref.ref(owner)
    array = to_jax(tensor)
    del owner, tensor
    gc.collect()
    assert alive() is not None
    assert float(array.sum()) == 0
    del array
    for _ in range(100):  # an XLA thread drops the call's reference shortly after its result is ready
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.05)
    assert alive() is None


def test_conversion_to_torch_waits_for_the_computation() -> None:
    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        for _ in range(8):
            x = jax.numpy.tanh(x @ x)
        return x

    x = torch.rand(512, 512) / 512
    expected = to_torch(slow(to_jax(x)), copy=True)
    scratch = x.clone()
    result = to_torch(slow(to_jax(scratch)))
    scratch.zero_()  # must not change the result of the finished call
    assert torch.equal(result, expected)


def test_sharded_arrays_are_refused(tmp_path: Path) -> None:
    # The private function would silently return the first shard.
    code = """
import jax
from recis_hybrid.bridge import to_torch
sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec("x"))
try:
    to_torch(jax.device_put(jax.numpy.arange(8.0), sharding))
except ValueError as error:
    print(error)
"""
    done = run_code(code, folder=tmp_path, environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    assert "sharded over 2 devices" in done.stdout, done.stderr
