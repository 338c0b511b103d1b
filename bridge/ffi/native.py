"""Loads the XLA FFI handlers, and registers them with JAX once for each platform."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax

from recis_hybrid import ops


@cache
def handlers(platform: str) -> Any:
    """Return the module ``recis_hybrid._xla``, whose handlers for a platform JAX knows from now on.

    Args:
        platform: ``"cpu"`` or ``"cuda"``.

    Raises:
        ImportError: If it was not built.
    """
    try:
        import recis_hybrid._xla as _xla
    except ImportError as error:
        raise ImportError(
            f"recis_hybrid.bridge.ffi: the XLA handlers recis_hybrid._xla could not be loaded: {error}. Likely causes: "
            "(1) jax or pybind11 was absent when recis_hybrid was built, or it was built for another Python: run "
            "`pip install jax pybind11`, then `pip install --no-build-isolation -e .` in the source folder. Lookups "
            "outside jit need no handlers: use bridge.jax_led.JaxTables"
        ) from error
    if platform == "cpu":
        _xla.use_feature_kernels(ops.feature_kernels())
    name = {"cpu": "cpu", "cuda": "CUDA"}[platform]
    for target, handler in _xla.handlers(name).items():
        jax.ffi.register_ffi_target(target, handler, platform=name)
    return _xla
