"""Lookups and updates of an engine's tables inside ``jax.jit``, as XLA FFI calls over the kernels of torch's operators.

:class:`JitTables` lends an engine's tables to JAX. :func:`lookup` and :func:`update` are functions for a jitted step; a
token orders them. ``csrc/xla/README.md`` says why there are tokens, and what they guarantee.
"""

from __future__ import annotations

from recis_hybrid.bridge.ffi.calls import JitLookup as JitLookup, lookup as lookup, update as update
from recis_hybrid.bridge.ffi.tables import JitTables as JitTables

__all__ = ["JitLookup", "JitTables", "lookup", "update"]
