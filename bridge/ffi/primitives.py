"""JAX primitives of lookups and updates of one table: shapes, lowering to XLA FFI calls, and refused transformations.

Primitives rather than bare ``jax.ffi.ffi_call``, because a call that changes a table must not be batched or
differentiated by default rules.

Legend: F features, N ids, V vectors of a feature, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

TOKEN = ShapedArray((2,), jnp.float32)
"""A token: the serial number of the last call, and its status."""
_LARGEST_HEADER = 3  # Context::kUnique in csrc/core/chain.h


@dataclass(frozen=True)
class TableCall:
    """The static part of a lookup in one table."""

    chain: int
    """Number of the tables' chain."""
    table: int
    """Number of the table."""
    name: str
    """Names of the member tables, for messages."""
    features: tuple[str, ...]
    """Names of the F features."""
    members: tuple[int, ...]
    """For each feature, the number of its member table."""
    combiners: tuple[int, ...]
    """For each feature, a combiner of ``ops.gather``."""
    zeros: tuple[bool, ...]
    """For each feature, True if ids without a row count as zeros."""
    lengths: tuple[int, ...]
    """For each feature, N."""
    vectors: tuple[int, ...]
    """For each feature, V."""
    has_offsets: tuple[bool, ...]
    """For each feature, True if vectors have several ids; otherwise there is one id for each."""
    dim: int
    """D."""
    train: bool
    """True if ids without a row get one."""
    platform: str
    """Platform of the tables: ``"cpu"`` or ``"cuda"``."""

    @property
    def positions(self) -> int:
        """Number of ids over all features."""
        return sum(self.lengths)

    @property
    def scaled(self) -> bool:
        """True if combiners divide by the number of ids."""
        return any(c != 0 and o for c, o in zip(self.combiners, self.has_offsets, strict=True))

    @property
    def context(self) -> ShapedArray:
        """Shape of the context of a lookup, 64-bit words in pairs; empty unless training."""
        n = self.positions
        words = _LARGEST_HEADER + 3 * n + 1 + (n + 1) // 2 * self.scaled
        return ShapedArray((words if self.train else 0, 2), jnp.uint32)


def look_up(call: TableCall, token: Any, ids: Sequence[Any], offsets: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
    """Look up ids in a table.

    Args:
        call: The static part.
        token: float32 ``[2]``.
        ids: For each feature, uint32 ``[N, 2]``, or 64-bit integers ``[N]``.
        offsets: For each feature with offsets, likewise ``V + 1`` of them.

    Returns:
        The token, the context, and for each feature float32 ``[V, D]``.
    """
    token, context, *vectors = _lookup_p.bind(token, *ids, *offsets, call=call)  # type: ignore[no-untyped-call]
    return token, context, vectors


def apply(call: TableCall, token: Any, context: Any, gradients: Sequence[Any]) -> Any:
    """Update the rows of a training lookup by gradients, float32 ``[V, D]`` for each feature; return the token."""
    return _update_p.bind(token, context, *gradients, call=call)[0]  # type: ignore[no-untyped-call]


def _shapes_of_lookup(call: TableCall) -> list[ShapedArray]:
    vectors = [ShapedArray((count, call.dim), jnp.float32) for count in call.vectors]
    return [TOKEN, call.context, *vectors]


def _ffi_lookup(*operands: Any, call: TableCall) -> list[Any]:
    function = jax.ffi.ffi_call("recis_lookup", _shapes_of_lookup(call))
    return function(  # type: ignore[return-value]
        *operands,
        chain=np.int64(call.chain),
        table=np.int64(call.table),
        train=np.int64(call.train),
        scaled=np.int64(call.scaled),
        members=np.array(call.members, np.int64),
        combiners=np.array(call.combiners, np.int64),
        zeros=np.array(call.zeros, np.int64),
        has_offsets=np.array(call.has_offsets, np.int64),
    )


def _ffi_update(*operands: Any, call: TableCall) -> list[Any]:
    function = jax.ffi.ffi_call("recis_update", [TOKEN])
    return function(  # type: ignore[return-value]
        *operands,
        chain=np.int64(call.chain),
        table=np.int64(call.table),
        positions=np.int64(call.positions),
        scaled=np.int64(call.scaled),
    )


def _define(name: str, shapes: Callable[[TableCall], list[ShapedArray]], ffi: Callable[..., Any]) -> Primitive:
    """Return a primitive that is an FFI call on one device, and refuses all transformations but jit and loops."""
    primitive = Primitive(f"recis_{name}")
    primitive.multiple_results = True
    where = f"bridge.ffi.{name}"

    @cache
    def jitted(call: TableCall) -> Callable[..., Any]:
        return jax.jit(partial(primitive.bind, call=call))

    def run(*operands: Any, call: TableCall) -> Any:
        return jitted(call)(*operands)

    def shape(*operands: Any, call: TableCall) -> Any:
        return shapes(call)

    def lower(ctx: Any, *operands: Any, call: TableCall) -> Any:
        if tuple(ctx.module_context.platforms) != (call.platform,):
            return refuse_platform(ctx, *operands, call=call)
        _refuse_several_devices(where, call, ctx.module_context.axis_context)
        return mlir.lower_fun(partial(ffi, call=call), multiple_results=True)(ctx, *operands)

    def refuse_platform(ctx: Any, *operands: Any, call: TableCall) -> Any:
        platforms = ", ".join(ctx.module_context.platforms)
        raise NotImplementedError(
            f"{where}: table {call.name}: the table is of the platform {call.platform}, but the function is compiled "
            f"for {platforms}; jit it for jax.devices({call.platform!r}), or use bridge.jax_led.JaxTables"
        )

    def refuse_batching(operands: Any, axes: Any, *, call: TableCall) -> Any:
        raise NotImplementedError(
            f"{where}: table {call.name}: vmap would run the call once per element, in no order; call it outside vmap "
            "with the ids of all elements, which may have any shape"
        )

    def refuse_jvp(primals: Any, tangents: Any, *, call: TableCall) -> Any:
        raise TypeError(
            f"{where}: table {call.name}: cannot be differentiated here: lookups have gradients of first order "
            "(by jax.grad or jax.vjp) only, and updates have none; do not nest jax.grad around them"
        )

    primitive.def_impl(run)  # type: ignore[no-untyped-call]
    primitive.def_abstract_eval(shape)  # type: ignore[no-untyped-call]
    mlir.register_lowering(primitive, refuse_platform)
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(primitive, lower, platform=platform)
    batching.primitive_batchers[primitive] = refuse_batching
    ad.primitive_jvps[primitive] = refuse_jvp
    return primitive


def _refuse_several_devices(where: str, call: TableCall, axes: Any) -> None:
    mesh = getattr(axes, "mesh", None)
    devices = getattr(axes, "num_devices", 1) if mesh is None else mesh.size
    if devices > 1:
        raise NotImplementedError(
            f"{where}: table {call.name}: a table belongs to one device, but the function is compiled for {devices}: "
            "it has sharded arrays, or is in shard_map or pmap; look up outside of it, or use bridge.jax_led.JaxTables"
        )


_lookup_p = _define("lookup", _shapes_of_lookup, _ffi_lookup)
_update_p = _define("update", lambda call: [TOKEN], _ffi_update)
