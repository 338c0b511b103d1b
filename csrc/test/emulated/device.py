"""The emulated device from Python: load it, set its schedule, read its counts."""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from recis_hybrid import accelerator
from recis_hybrid.ops import _library as _library_of_ops

LIBRARY = Path(
    os.environ.get("EMULATED_LIBRARY")
    or Path(__file__).resolve().parents[3] / "build" / "emulated" / "librecis_emulated.so"
)
"""The library; scripts/mutants.py names its own."""
DEVICES = 2
"""Number of devices, as in device.cpp."""
COUNTS = (
    "launches",
    "cub_calls",
    "memsets",
    "copies_to_device",
    "copies_from_device",
    "copies_on_device",
    "pageable_copies",
    "synchronizations",
    "failed_allocations",
    "fallbacks",
)
_library: ctypes.CDLL | None = None


def reason_to_skip() -> str:
    """Return why the device cannot be used in this process; empty if it can."""
    if torch.cuda.is_available():
        return "CUDA is here, whose place the emulated device would take"
    return "" if LIBRARY.exists() else "the emulated device is not built: make emulated"


def load() -> None:
    """Register the torch device ``emulated``, with the operators of csrc/cuda, in place of CUDA."""
    global _library
    if _library is not None:
        return
    torch.ops.load_library(str(LIBRARY))
    _library = ctypes.CDLL(str(LIBRARY))
    module: Any = ModuleType("torch.emulated")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: DEVICES
    module.current_device = lambda: torch.accelerator.current_device_index()
    module.device = lambda _: nullcontext()
    module.manual_seed_all = module.set_rng_state = lambda *_: None
    module.get_rng_state = lambda *_: torch.zeros(0, dtype=torch.uint8)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module._is_in_bad_fork = lambda: False
    torch._register_device_module("emulated", module)
    accelerator.KIND = "emulated"
    _library_of_ops.TABLE_KERNELS["emulated"] = _library_of_ops.address_of(LIBRARY, "emulated_table_kernels")
    configure()


def configure(
    *, seed: int | None = None, warps: int = 16, yield_every: int = 3, max_blocks: int = 4, late: int = 0
) -> None:
    """Set the schedule, after all queued work.

    Args:
        seed: Seed of the scheduler; by default that of ``EMULATED_SEED``, or 1.
        warps: Warps that are resident together.
        yield_every: An atomic access lets other threads go first once in so many times, on average.
        max_blocks: Largest grid, small so that kernels loop over their items.
        late: 0: work runs when it is queued; 1: streams run only when something waits for them; 2: and then all others
            run first.
    """
    if seed is None:
        seed = int(os.environ.get("EMULATED_SEED", 1))
    numbers = (seed, warps, yield_every, max_blocks, late)
    functions().emulated_configure(*(ctypes.c_int64(number) for number in numbers))


def counts() -> dict[str, int]:
    """Return how often each of ``COUNTS`` has happened since :func:`clear_counts`."""
    library = functions()
    library.emulated_count.restype = ctypes.c_int64
    return {name: library.emulated_count(name.encode()) for name in COUNTS}


def clear_counts() -> None:
    """Set all counts to zero."""
    functions().emulated_clear_counts()


def functions() -> ctypes.CDLL:
    """Return the library, for its functions in C."""
    assert _library is not None, "load() first"
    return _library
