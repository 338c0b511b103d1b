"""What must be set before JAX starts its backend: the device, the memory, the threads of one rank."""

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
    """Set JAX up for this process, and start its backend.

    Under torchrun, which sets `LOCAL_RANK`, a rank sees the one GPU of that number, the same as torch's. To be called
    once, before JAX computes anything, and not in DataLoader workers.

    Args:
        memory_fraction: the share of the GPU's memory that JAX may take, above 0 and below 1; without it JAX takes
            memory as it needs it, so that torch finds some too.
        threads: CPU threads of XLA, which ignores `OMP_NUM_THREADS`; without it, all.
        compilation_cache: a folder in which all compiled programs are kept from run to run.

    Returns:
        One line that says what was found: the backend, its devices, the process's rank on its machine.

    Raises:
        ValueError: if `memory_fraction` or `threads` is out of range, or `LOCAL_RANK` is no number from 0 on.
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
            f"init: LOCAL_RANK must be a number from 0 on, got {local_rank!r}; start ranks by torchrun, or unset it"
        )
    rank = int(local_rank)
    if backend_has_started():
        raise RuntimeError("init: JAX's backend has started already; call init before anything that computes with JAX")
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
        # JAX keeps only what took a second to compile, and most towers take less.
        settings.update("jax_persistent_cache_min_compile_time_secs", 0)
        settings.update("jax_persistent_cache_min_entry_size_bytes", -1)
    backend = jax.default_backend()
    if torch.cuda.is_available() and backend == "cpu":
        warnings.warn(
            "init: torch has a GPU, but JAX fell back to the CPU; install jax[cuda12], and see JAX's log for the cause "
            "(often a cuDNN older than it needs, loaded by torch)",
            RuntimeWarning,
            stacklevel=2,
        )
    devices = ", ".join(str(device) for device in jax.local_devices())
    return f"JAX {jax.__version__} on {backend} ({devices}), local rank {rank}, torch {torch.__version__}"
