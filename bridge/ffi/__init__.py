"""XLA FFI calls inside ``jax.jit``, over the kernels of torch's operators.

:class:`JitTables` lends an engine's tables to JAX. :func:`lookup` and :func:`update` are functions for a jitted step; a
token orders them. ``csrc/xla/README.md`` says why there are tokens, and what they guarantee.

:func:`hash_ids`, :func:`mod_ids`, :func:`bucketize` and :func:`segment_reduce` are the feature operators of
``recis_hybrid.ops``; they are pure and take no token.
"""

from __future__ import annotations

from recis_hybrid.bridge.ffi.calls import JitLookup as JitLookup, lookup as lookup, update as update
from recis_hybrid.bridge.ffi.features import (
    bucketize as bucketize,
    hash_ids as hash_ids,
    mod_ids as mod_ids,
    segment_reduce as segment_reduce,
)
from recis_hybrid.bridge.ffi.tables import JitTables as JitTables

__all__ = ["JitLookup", "JitTables", "bucketize", "hash_ids", "lookup", "mod_ids", "segment_reduce", "update"]
