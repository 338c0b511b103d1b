"""Loads the native libraries when this module is first imported."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent.parent / "lib"
# The CPU library for each of torch's names of the processor's capability.
_LEVELS = {"AVX512": "v4", "AVX2": "v3"}


def _cpu_library() -> Path:
    if platform.machine() not in ("x86_64", "AMD64"):
        return _FOLDER / "librecis_cpu_generic.so"
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), "v2")
    return _FOLDER / f"librecis_cpu_{level}.so"


def _load() -> None:
    """Register the operators of the best CPU library for this processor, and those for CUDA if torch supports it.

    Raises:
        ImportError: If the CPU library is missing or cannot be loaded.
    """
    library = _cpu_library()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"the native library {library.name} of recis_hybrid could not be loaded from {library.parent}: {error}. "
            f"Likely causes: (1) it was not built: run `pip install --no-build-isolation -e .` in the source folder; "
            f"(2) it was built for another processor architecture; (3) torch {torch.__version__} is older than 2.11."
        ) from error
    cuda = _FOLDER / "librecis_cuda.so"
    if cuda.exists() and torch.version.cuda is not None:
        torch.ops.load_library(str(cuda))


_load()
