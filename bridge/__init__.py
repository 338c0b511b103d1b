"""torch and JAX in one program: conversion without copies, and JAX functions as torch modules.

The bridge can be used on its own; ``recis_hybrid`` never imports it. :func:`to_jax` and :func:`to_torch` share memory
or raise, unless a copy is requested, and :func:`copies` counts the copies. :class:`JaxTower` wraps a JAX function as a
``torch.nn.Module`` with parameters that torch owns; :mod:`jax_led` is for programs whose own jitted step trains an
engine's tables, and :mod:`ffi` has lookups and updates inside that step. ``bridge/README.md`` is the contract on
lifetime and mutation.
"""

from __future__ import annotations

if __name__ != "recis_hybrid.bridge":
    # The folder is at the root of the repository, so `import bridge` would load a second copy.
    raise ImportError(
        f"bridge: imported as {__name__!r}, which would load a second copy; use `import recis_hybrid.bridge`"
    )

try:
    import jax as _jax
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] not in ("jax", "jaxlib"):
        raise
    raise ImportError(
        f"recis_hybrid.bridge: JAX is required, but there is no module {_error.name!r}; "
        "run `pip install recis_hybrid[jax]`"
    ) from _error

from recis_hybrid.bridge import ffi as ffi, jax_led as jax_led
from recis_hybrid.bridge.all_reduce import GradientAllReduce as GradientAllReduce
from recis_hybrid.bridge.exchange.dlpack import copies as copies, to_jax as to_jax, to_torch as to_torch
from recis_hybrid.bridge.launch import init as init
from recis_hybrid.bridge.optimizer import OptaxOptimizer as OptaxOptimizer
from recis_hybrid.bridge.state import JaxState as JaxState
from recis_hybrid.bridge.tower.adapters import (
    from_equinox as from_equinox,
    from_haiku as from_haiku,
    from_linen as from_linen,
    from_nnx as from_nnx,
)
from recis_hybrid.bridge.tower.orbax import load_orbax as load_orbax, save_orbax as save_orbax
from recis_hybrid.bridge.tower.tower import JaxTower as JaxTower

del _jax

__all__ = [
    "GradientAllReduce",
    "JaxState",
    "JaxTower",
    "OptaxOptimizer",
    "copies",
    "ffi",
    "from_equinox",
    "from_haiku",
    "from_linen",
    "from_nnx",
    "init",
    "jax_led",
    "load_orbax",
    "save_orbax",
    "to_jax",
    "to_torch",
]
