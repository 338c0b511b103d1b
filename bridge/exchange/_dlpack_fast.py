"""Conversions of single tensors and arrays with DLPack, through the fastest functions of the installed JAX.

``jax.dlpack.from_dlpack`` takes 22 µs per tensor, mostly to select a device and to repeat checks of its callers here.
The two functions that it wraps take 3 and 1 µs, but they are private. So they are tested once, on a small tensor, and
used only if they behave as expected. Otherwise, and always for buffers on a GPU, the public functions are used, which
also synchronize streams.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import torch
import torch.utils.dlpack


class Conversions(NamedTuple):
    """Conversions that share memory. The caller must have checked that this is possible."""

    to_jax: Callable[[torch.Tensor], jax.Array]
    to_torch: Callable[[Iterable[jax.Array]], list[torch.Tensor]]
    """Converts many arrays at once, such as the gradients of a hundred parameters."""
    private: bool
    """True for JAX's private functions."""


def _public_to_jax(tensor: torch.Tensor) -> jax.Array:
    return cast(jax.Array, jax.dlpack.from_dlpack(tensor.detach(), copy=False))


def _public_to_torch(arrays: Iterable[jax.Array]) -> list[torch.Tensor]:
    return [torch.utils.dlpack.from_dlpack(array) for array in arrays]


def backend_has_started() -> bool:
    """Return whether JAX has started a backend in this process, or in the process from which it was forked."""
    # A private module, because every public function would start the backend.
    bridge: Any = __import__("jax._src.xla_bridge", fromlist=["xla_bridge"])
    return bool(bridge.backends_are_initialized())


_is_forked = False


def _after_fork() -> None:
    """Mark a child process forked after JAX has started, so that its next conversion raises.

    JAX's threads do not exist in the child, and a program would wait for them forever.
    """
    global _is_forked
    if backend_has_started():
        _is_forked = True
        cpu_conversions.cache_clear()


os.register_at_fork(after_in_child=_after_fork)

PUBLIC = Conversions(_public_to_jax, _public_to_torch, private=False)


def _private_conversions() -> Conversions:
    """Build conversions from private functions of JAX and torch. If this raises, use the public ones."""
    native: Any = __import__("jax._src.lib", fromlist=["_jax"])._jax
    wrap, unwrap = native.dlpack_managed_tensor_to_buffer, native.buffer_to_dlpack_managed_tensor
    pack, unpack = cast(Any, torch._C)._to_dlpack, cast(Any, torch._C)._from_dlpack
    device = jax.local_devices(backend="cpu")[0]
    cpu_type = 1  # kDLCPU

    def to_jax(tensor: torch.Tensor) -> jax.Array:
        return cast(jax.Array, wrap(pack(tensor), device, None, False, cpu_type))

    def to_torch(arrays: Iterable[jax.Array]) -> list[torch.Tensor]:
        return list(map(unpack, map(unwrap, arrays)))

    return Conversions(to_jax, to_torch, private=True)


def _are_valid(conversions: Conversions) -> bool:
    """Return whether a round trip shares memory, and a misaligned tensor is refused instead of copied."""
    tensor = torch.arange(32, dtype=torch.float32)
    array = conversions.to_jax(tensor)
    (back,) = conversions.to_torch([array])
    if not isinstance(array, jax.Array) or array.dtype != jax.numpy.float32 or array.shape != (32,):
        return False
    pointers = {tensor.data_ptr(), array.unsafe_buffer_pointer(), back.data_ptr()}
    if len(pointers) != 1 or not torch.equal(tensor, back):
        return False
    try:
        conversions.to_jax(tensor[1:])
    except Exception:
        return True
    return False


@functools.cache
def cpu_conversions() -> Conversions:
    """Return the conversions for CPU buffers, which are selected on the first call. This starts JAX's backend.

    Raises:
        RuntimeError: in a process that was forked after JAX's backend had started.
    """
    if _is_forked:
        raise RuntimeError(
            f"recis_hybrid.bridge: process {os.getpid()} was forked after JAX had started, and JAX would hang in it; "
            "use JAX in the parent process only, or start workers with "
            "DataLoader(multiprocessing_context='forkserver') or 'spawn'"
        )
    try:
        conversions = _private_conversions()
        return conversions if _are_valid(conversions) else PUBLIC
    except Exception:
        return PUBLIC
