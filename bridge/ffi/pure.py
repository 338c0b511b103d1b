"""JAX primitives of feature functions: shapes, lowering to XLA FFI calls, and vmap.

Legend: n rows, V bags, D dim, K boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from recis_hybrid.bridge.ffi.native import handlers


def hash_ids(ids: Any, *, kind: int, form: str) -> Any:
    """Return the hashes of ids.

    Args:
        ids: uint32 ``[…, 2]``, or 64-bit integers.
        kind: A value of ``ops.hash.HASH_KINDS``.
        form: ``"pairs"`` for uint32 ``[…, 2]``; ``"int64"`` or ``"int32"``.
    """
    return _call(_hash_ids_p, ids, kind=kind, form=form)[0]


def mod_ids(ids: Any, *, modulus: int, form: str) -> Any:
    """Return ids modulo the unsigned integer with the bits of ``modulus``; otherwise as :func:`hash_ids`."""
    return _call(_mod_ids_p, ids, modulus=modulus, form=form)[0]


def bucketize(values: Any, boundaries: Any, *, right: bool, refuse_nan: bool, form: str) -> Any:
    """Return the buckets of values.

    Args:
        values: float32 or float64; or integers, as the ids of :func:`hash_ids`.
        boundaries: K sorted numbers in the form of the values.
        right: Whether a value equal to a boundary goes to the bucket above.
        refuse_nan: Whether NaN makes the call fail.
        form: As for :func:`hash_ids`.
    """
    return _call(_bucketize_p, values, boundaries, right=right, refuse_nan=refuse_nan, form=form)[0]


def combine_bags(values: Any, offsets: Any, *, combiner: int, winners: bool) -> Any:
    """Return the combined rows of each bag.

    Args:
        values: float32 ``[n, D]``.
        offsets: uint32 ``[V + 1, 2]``, or 64-bit integers ``[V + 1]``.
        combiner: A combiner of ``ops.gather``.
        winners: True if the results include the winners of a maximum.

    Returns:
        float32 ``[V, D]``; and int32 ``[V, D]``: for each element the index, within its bag, of the row that has it.
    """
    return _call(_combine_bags_p, values, offsets, combiner=combiner, winners=winners)


def spread_bags(gradients: Any, offsets: Any, *winners: Any, combiner: int, rows: int) -> Any:
    """Return the gradient of each row, float32 ``[n, D]``, given those of the combined rows, ``[V, D]``.

    Args:
        gradients: float32 ``[V, D]``.
        offsets: As for :func:`combine_bags`.
        *winners: Those of :func:`combine_bags`, for a maximum.
        combiner: A combiner of ``ops.gather``.
        rows: n.
    """
    return _call(_spread_bags_p, gradients, offsets, *winners, combiner=combiner, rows=rows)[0]


def _call(primitive: Primitive, *operands: Any, **static: Any) -> Any:
    handlers("cpu")
    return primitive.bind(*operands, **static)  # type: ignore[no-untyped-call]


def _elements(values: Any) -> tuple[int, ...]:
    """Return the shape of values, of which pairs of words are one element."""
    return tuple(values.shape[:-1] if values.dtype == np.uint32 else values.shape)


def _elementwise(values: Any, *_: Any, form: str, **static: Any) -> list[ShapedArray]:
    shape = _elements(values)
    return [ShapedArray((*shape, 2), jnp.uint32) if form == "pairs" else ShapedArray(shape, np.dtype(form))]


def _combined(values: Any, offsets: Any, *, combiner: int, winners: bool) -> list[ShapedArray]:
    shape = (_elements(offsets)[0] - 1, values.shape[1])
    return [ShapedArray(shape, jnp.float32)] + [ShapedArray(shape, jnp.int32)] * winners


def _spread(gradients: Any, *_: Any, combiner: int, rows: int) -> list[ShapedArray]:
    return [ShapedArray((rows, gradients.shape[1]), jnp.float32)]


def _batch_elements(primitive: Primitive, operands: Sequence[Any], axes: Sequence[Any], **static: Any) -> Any:
    """Batch the first operand, at its first axis; boundaries are constants."""
    values, *others = operands
    results = primitive.bind(jnp.moveaxis(values, axes[0], 0), *others, **static)  # type: ignore[no-untyped-call]
    return results, [0] * len(results)


def _batch_columns(primitive: Primitive, operands: Sequence[Any], axes: Sequence[Any], **static: Any) -> Any:
    """Batch arrays ``[rows, D]`` by putting the columns of all elements side by side."""
    if axes[1] is not None:
        raise NotImplementedError(
            "ffi.segment_reduce: vmap over offsets is not supported; call it outside vmap, with the bags of all "
            "elements one after the other"
        )
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)

    def columns(operand: Any, axis: Any) -> Any:
        if axis is None:
            operand, axis = jnp.broadcast_to(operand, (size, *operand.shape)), 0
        operand = jnp.moveaxis(operand, axis, 1)
        return operand.reshape(operand.shape[0], operand.shape[1] * operand.shape[2])

    values, offsets, *others = operands
    wide = [columns(values, axes[0]), offsets, *map(columns, others, axes[2:])]
    results = primitive.bind(*wide, **static)  # type: ignore[no-untyped-call]
    return [each.reshape(each.shape[0], size, each.shape[1] // size) for each in results], [1] * len(results)


def _define(
    name: str, function: str, shapes: Callable[..., list[ShapedArray]], batch: Callable[..., Any], *attributes: str
) -> Primitive:
    """Return the primitive of an FFI call.

    Args:
        name: Name of the handler, without its prefix.
        function: Public function that uses it, for messages.
        shapes: Returns the shapes of the results, given the operands and the static arguments.
        batch: Returns results and their axes under vmap, given the primitive, the operands and their axes.
        *attributes: Static arguments that the handler takes, integers or flags.
    """
    primitive = Primitive(f"recis_{name}")
    primitive.multiple_results = True

    @cache
    def jitted(**static: Any) -> Callable[..., Any]:
        return jax.jit(partial(primitive.bind, **static))

    def run(*operands: Any, **static: Any) -> Any:
        return jitted(**static)(*operands)

    def ffi(*operands: Any, **static: Any) -> Any:
        call = jax.ffi.ffi_call(f"recis_{name}", shapes(*operands, **static))
        return call(*operands, **{attribute: np.int64(static[attribute]) for attribute in attributes})

    def lower(ctx: Any, *operands: Any, **static: Any) -> Any:
        return mlir.lower_fun(partial(ffi, **static), multiple_results=True)(ctx, *operands)

    def refuse_platform(ctx: Any, *operands: Any, **static: Any) -> Any:
        platforms = ", ".join(ctx.module_context.platforms)
        raise NotImplementedError(
            f"ffi.{function}: inside jit it runs on the CPU, but the function is compiled for {platforms}; jit it for "
            "jax.devices('cpu'), or use the operator of recis_hybrid.ops before the jitted call"
        )

    def refuse_jvp(primals: Any, tangents: Any, **static: Any) -> Any:
        raise TypeError(
            f"ffi.{function}: only gradients of first order (by jax.grad or jax.vjp) are supported; do not nest "
            "jax.grad around them"
        )

    primitive.def_impl(run)  # type: ignore[no-untyped-call]
    primitive.def_abstract_eval(shapes)  # type: ignore[no-untyped-call]
    mlir.register_lowering(primitive, refuse_platform)
    mlir.register_lowering(primitive, lower, platform="cpu")
    batching.primitive_batchers[primitive] = partial(batch, primitive)
    ad.primitive_jvps[primitive] = refuse_jvp
    return primitive


_hash_ids_p = _define("hash_ids", "hash_ids", _elementwise, _batch_elements, "kind")
_mod_ids_p = _define("mod_ids", "mod_ids", _elementwise, _batch_elements, "modulus")
_bucketize_p = _define("bucketize", "bucketize", _elementwise, _batch_elements, "right", "refuse_nan")
_combine_bags_p = _define("combine_bags", "segment_reduce", _combined, _batch_columns, "combiner")
_spread_bags_p = _define("spread_bags", "segment_reduce", _spread, _batch_columns, "combiner")
