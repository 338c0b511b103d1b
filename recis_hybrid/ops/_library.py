"""Loads the native libraries when this module is first imported."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent.parent / "lib"
# The CPU library for each of torch's names of the processor's capability.
_LEVELS = {"AVX512": "v4", "AVX2": "v3"}
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def _cpu_library() -> Path:
    if platform.machine() not in ("x86_64", "AMD64"):
        return _FOLDER / f"librecis_cpu_generic{_SUFFIX}"
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability(), "v2")
    return _FOLDER / f"librecis_cpu_{level}{_SUFFIX}"


TABLE_KERNELS: dict[str, int] = {}
"""By type of device, the address of ``recis_table_kernels`` in its library (``csrc/core/table_kernels.h``)."""


def table_kernels(device: str) -> int | None:
    """Return the address of ``recis_table_kernels`` in the library for a type of device, or None if none is loaded."""
    return TABLE_KERNELS.get(device)


def feature_kernels() -> int:
    """Return the address of ``recis_feature_kernels`` in the CPU library (``csrc/core/feature_kernels.h``)."""
    return address_of(_cpu_library(), "recis_feature_kernels")


def _load() -> None:
    """Register the operators of the best CPU library for this processor, and those for CUDA if torch supports it.

    Raises:
        ImportError: If the CPU library is missing, or one of them cannot be loaded.
    """
    version = torch.__version__
    _load_library(
        "native",
        _cpu_library(),
        f"(1) it was not built: run `pip install --no-build-isolation -e .` in the source folder; (2) it was built for "
        f"another processor architecture; (3) torch {version} is older than 2.11.",
    )
    TABLE_KERNELS["cpu"] = address_of(_cpu_library(), "recis_table_kernels")
    cuda = _FOLDER / "librecis_cuda.so"
    if cuda.exists() and torch.version.cuda is not None:
        _load_library(
            "CUDA",
            cuda,
            f"(1) it was built against another torch than {version} (CUDA {torch.version.cuda}): build it again with "
            f"`RECIS_CUDA=1 pip install --no-build-isolation -e .` in the source folder; (2) the NVIDIA driver is "
            f"missing or older than the CUDA runtime that is linked into the library: `nvidia-smi` prints the newest "
            f"CUDA version that the driver supports; update the driver, or build with an older CUDA toolkit. To use "
            f"the CPU alone, delete {cuda}.",
        )
        TABLE_KERNELS["cuda"] = address_of(cuda, "recis_table_kernels")


def address_of(library: Path, function: str) -> int:
    """Return the address of a function of a library."""
    address = ctypes.cast(ctypes.CDLL(str(library))[function], ctypes.c_void_p).value
    assert address is not None
    return address


def _load_library(kind: str, library: Path, causes: str) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"the {kind} library {library.name} of recis_hybrid could not be loaded from {library.parent}: {error}. "
            f"Likely causes: {causes}"
        ) from error


_load()
