"""Settings that JAX reads when it starts its backend: device, memory, threads, compilation cache."""

from __future__ import annotations

import os
import warnings
from typing import Any, cast

import jax
import torch

from recis_hybrid.bridge.exchange._dlpack_fast import backend_has_started

_FRACTION = "XLA_CLIENT_MEM_FRACTION"


def init(
    *, memory_fraction: float | None = None, threads: int | None = None, compilation_cache: str | None = None
) -> str:
    """Configure JAX for this process and start its backend.

    Under torchrun, JAX uses only the GPU of index ``LOCAL_RANK``, like torch. Call this once, before any JAX
    computation, and not in DataLoader workers.

    Args:
        memory_fraction: The fraction of GPU memory that JAX may allocate, above 0 and below 1; by default JAX
            allocates memory as needed and leaves the rest to torch.
        threads: The number of CPU threads of XLA, which ignores ``OMP_NUM_THREADS``; by default all.
        compilation_cache: A folder in which compiled programs are cached between runs.

    Returns:
        One line for the log: JAX's version, backend and devices, the local rank, torch's version.

    Raises:
        ValueError: if ``memory_fraction`` or ``threads`` is out of range, or ``LOCAL_RANK`` is not a non-negative
            integer.
        RuntimeError: if JAX's backend has started already.

    Warns:
        RuntimeWarning: if torch has a GPU and JAX fell back to the CPU.

    References:
        https://docs.jax.dev/en/latest/gpu_memory_allocation.html
    """
    if memory_fraction is not None and not 0 < memory_fraction < 1:
        raise ValueError(f"init: memory_fraction must be above 0 and below 1, got {memory_fraction}")
    if threads is not None and threads < 1:
        raise ValueError(f"init: threads must be at least 1, got {threads}")
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if not (local_rank.isascii() and local_rank.isdigit()):
        raise ValueError(
            f"init: LOCAL_RANK must be a non-negative integer, got {local_rank!r}; start ranks with torchrun, or unset "
            "it"
        )
    rank = int(local_rank)
    if backend_has_started():
        raise RuntimeError(
            "init: JAX's backend has started already, and has read its settings of memory, devices and threads; call "
            "init before anything computes with JAX, or set them before the program starts "
            "(XLA_PYTHON_CLIENT_PREALLOCATE=false leaves GPU memory to torch)"
        )
    if threads is not None:
        os.environ["NPROC"] = str(threads)
    if memory_fraction is None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        os.environ[_FRACTION] = str(memory_fraction)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        cast(Any, jax.config).update("jax_cuda_visible_devices", str(rank))
    if compilation_cache is not None:
        settings = cast(Any, jax.config)
        settings.update("jax_compilation_cache_dir", compilation_cache)
        # By default JAX caches only programs that take a second to compile, and most towers take less.
        settings.update("jax_persistent_cache_min_compile_time_secs", 0)
        settings.update("jax_persistent_cache_min_entry_size_bytes", -1)
    backend = jax.default_backend()
    if torch.cuda.is_available() and backend == "cpu":
        warnings.warn(
            "init: torch has a GPU, but JAX fell back to the CPU; install jax[cuda12], and see JAX's log for the cause "
            "(often torch has loaded a cuDNN that is too old for JAX)",
            RuntimeWarning,
            stacklevel=2,
        )
    devices = ", ".join(str(device) for device in jax.local_devices())
    return f"JAX {jax.__version__} on {backend} ({devices}), local rank {rank}, torch {torch.__version__}"
