"""Loads the XLA FFI handlers, and registers them with JAX once."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax

from recis_hybrid import ops


@cache
def handlers() -> Any:
    """Return the module ``recis_hybrid._xla``, whose handlers JAX knows from now on.

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
    _xla.use_cpu_kernels(ops.table_kernels(), ops.feature_kernels())
    for name, handler in _xla.cpu_handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return _xla
