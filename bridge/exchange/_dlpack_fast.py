"""How one tensor crosses to JAX and one array to torch, by the fastest road that this JAX offers.

`jax.dlpack.from_dlpack` spends 22 µs a tensor, most of it on finding a device and on promises that the callers here
have checked already. The two functions underneath take 3 and 1 µs, but they are private. So they are tried once, on a
small tensor, and used only if they do what is expected; otherwise the public functions are. Buffers on a GPU always
take the public road, which is the one that hands over streams.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import torch
import torch.utils.dlpack


class Roads(NamedTuple):
    """The two ways across, for buffers on the CPU: what they are given must have been checked."""

    to_jax: Callable[[torch.Tensor], jax.Array]
    to_torch: Callable[[Iterable[jax.Array]], list[torch.Tensor]]
    """Takes many, for the gradients of a hundred parameters come at once."""
    private: bool


def _public_to_jax(tensor: torch.Tensor) -> jax.Array:
    return cast(jax.Array, jax.dlpack.from_dlpack(tensor.detach(), copy=False))


def _public_to_torch(arrays: Iterable[jax.Array]) -> list[torch.Tensor]:
    return [torch.utils.dlpack.from_dlpack(array) for array in arrays]


def backend_has_started() -> bool:
    """Whether JAX has a backend in this process, or had one in the process that this one was forked from."""
    # Private, but there is no public way to ask without starting it.
    bridge: Any = __import__("jax._src.xla_bridge", fromlist=["xla_bridge"])
    return bool(bridge.backends_are_initialized())


_is_forked = False


def _after_fork() -> None:
    # JAX's threads are not in the child, where a program would wait for them for ever. The next crossing raises.
    global _is_forked
    if backend_has_started():
        _is_forked = True
        cpu_roads.cache_clear()


os.register_at_fork(after_in_child=_after_fork)

PUBLIC = Roads(_public_to_jax, _public_to_torch, private=False)


def _private() -> Roads:
    """Build the private roads; raises whatever it likes where JAX or torch has changed."""
    native: Any = __import__("jax._src.lib", fromlist=["_jax"])._jax
    wrap, unwrap = native.dlpack_managed_tensor_to_buffer, native.buffer_to_dlpack_managed_tensor
    pack, unpack = cast(Any, torch._C)._to_dlpack, cast(Any, torch._C)._from_dlpack
    device = jax.local_devices(backend="cpu")[0]
    cpu_type = 1  # kDLCPU

    def to_jax(tensor: torch.Tensor) -> jax.Array:
        return cast(jax.Array, wrap(pack(tensor), device, None, False, cpu_type))

    def to_torch(arrays: Iterable[jax.Array]) -> list[torch.Tensor]:
        return list(map(unpack, map(unwrap, arrays)))

    return Roads(to_jax, to_torch, private=True)


def _works(roads: Roads) -> bool:
    """Whether a tensor goes over and comes back in its own memory, and a misaligned one is refused, not copied."""
    tensor = torch.arange(32, dtype=torch.float32)
    array = roads.to_jax(tensor)
    (back,) = roads.to_torch([array])
    if not isinstance(array, jax.Array) or array.dtype != jax.numpy.float32 or array.shape != (32,):
        return False
    pointers = {tensor.data_ptr(), array.unsafe_buffer_pointer(), back.data_ptr()}
    if len(pointers) != 1 or not torch.equal(tensor, back):
        return False
    try:
        roads.to_jax(tensor[1:])
    except Exception:
        return True
    return False


@functools.cache
def cpu_roads() -> Roads:
    """The roads for CPU buffers, chosen at the first call, which starts JAX's backend.

    Raises:
        RuntimeError: in a process that was forked after JAX's backend had started.
    """
    if _is_forked:
        raise RuntimeError(
            f"recis_hybrid.bridge: process {os.getpid()} was forked after JAX had started, and JAX would hang in it; "
            "leave JAX to the parent process, or start workers by "
            "DataLoader(multiprocessing_context='forkserver') or 'spawn'"
        )
    try:
        roads = _private()
        return roads if _works(roads) else PUBLIC
    except Exception:
        return PUBLIC
