from __future__ import annotations

import gc
import subprocess
import sys
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
from recis_hybrid.bridge.exchange import _dlpack_fast as _capsules  # noqa: E402


@pytest.fixture
def public_roads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a JAX that has not the private functions."""

    def gone() -> _capsules.Roads:
        raise AttributeError("dlpack_managed_tensor_to_buffer")

    _capsules.cpu_roads.cache_clear()
    monkeypatch.setattr(_capsules, "_private", gone)
    yield
    _capsules.cpu_roads.cache_clear()


def test_this_jax_has_the_fast_road() -> None:
    assert _capsules.cpu_roads().private


@pytest.mark.usefixtures("public_roads")
def test_the_public_road_shares_memory_too() -> None:
    assert not _capsules.cpu_roads().private
    tensor = torch.rand(4, 16)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_torch(array).data_ptr() == tensor.data_ptr()
    with pytest.raises(ValueError, match="64"):
        to_jax(tensor.view(-1)[1:])


def test_a_private_road_that_copies_is_not_taken() -> None:
    def copying(tensor: torch.Tensor) -> jax.Array:
        return _capsules.PUBLIC.to_jax(tensor.clone())

    assert _capsules._works(_capsules.PUBLIC)
    assert not _capsules._works(_capsules.Roads(copying, _capsules.PUBLIC.to_torch, private=True))


def test_the_array_keeps_the_tensor_alive_and_only_as_long_as_it_lives() -> None:
    owner = np.zeros(1024 + 16, np.float32)  # numpy's arrays can be watched by weak references, and seldom are aligned
    skip = -owner.ctypes.data % 64 // 4
    tensor = torch.from_numpy(owner[skip : skip + 1024])
    alive = weakref.ref(owner)
    array = to_jax(tensor)
    del owner, tensor
    gc.collect()
    assert alive() is not None
    assert float(array.sum()) == 0
    del array
    for _ in range(100):  # a thread of XLA drops the call's reference a moment after its result is there
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.05)
    assert alive() is None


def test_an_export_waits_for_the_computation() -> None:
    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        for _ in range(8):
            x = jax.numpy.tanh(x @ x)
        return x

    x = torch.rand(512, 512) / 512
    expected = to_torch(slow(to_jax(x)), copy=True)
    scratch = x.clone()
    result = to_torch(slow(to_jax(scratch)))
    scratch.zero_()  # the call has ended: this must not reach it
    assert torch.equal(result, expected)


def test_sharded_arrays_are_refused(root: Path) -> None:
    # The private export would hand over the first shard in silence.
    code = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
from recis_hybrid.bridge import to_torch
sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec("x"))
try:
    to_torch(jax.device_put(jax.numpy.arange(8.0), sharding))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert "spread over 2 devices" in done.stdout, done.stderr
