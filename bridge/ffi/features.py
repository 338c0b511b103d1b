"""Feature functions for JAX programs: the kernels of the torch operators of the same names, inside and outside jit.

They are pure: XLA may merge their calls, drop those whose results are unused, and run them in any order. Results are
bitwise those of the operators.

Legend: n rows, V bags, D dim, K boundaries.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from recis_hybrid import ops
from recis_hybrid.bridge.ffi import pure
from recis_hybrid.bridge.ffi.words import has_int64, words
from recis_hybrid.ops.hash import HashKind
from recis_hybrid.validation import check_flag, check_integer, describe_value

Combiner: TypeAlias = Literal["sum", "mean", "sqrtn", "max"]
"""``"sum"``; ``"mean"``: the sum divided by the number of rows; ``"sqrtn"``: by its square root; ``"max"``."""

_COMBINERS = {"sum": ops.gather.SUM, "mean": ops.gather.MEAN, "sqrtn": ops.gather.SQRTN, "max": ops.gather.MAX}


def hash_ids(ids: Any, kind: HashKind = "farm") -> jax.Array:
    """Return the hash of each id, i.e. of the string of its eight bytes in little-endian order.

    The hash is an unsigned 64-bit integer, returned as the int64 with the same bits; see
    :func:`recis_hybrid.ops.hash.hash_ids`.

    Args:
        ids: int32, any shape. uint32 arrays ``(…, 2)`` are ids of 64 bits, the low word first; with
            ``jax_enable_x64``, int64 and uint64 arrays are, too. numpy int64 is accepted where it is not traced.
        kind: One of ``ops.hash.HASH_KINDS``.

    Returns:
        Ids, which :func:`lookup` takes: int64 in the shape of ``ids``; or pairs of words, uint32 ``(…, 2)``, if ``ids``
        are pairs or x64 is off.

    Raises:
        NotImplementedError: If the function is compiled for a GPU.
        TypeError: If ``ids`` have the wrong dtype.
        ValueError: If ``ids`` are uint32 but not pairs, or ``kind`` is unknown.

    Example:
        >>> hash_ids(jnp.array([1], jnp.int32)).tolist()
        [[2956679777, 1379657995]]
    """
    if kind not in ops.hash.HASH_KINDS:
        raise ValueError(f"ffi.hash_ids: kind must be one of {list(ops.hash.HASH_KINDS)}, got {kind!r}")
    flat, shape = words("ffi.hash_ids: ids", ids)
    return _shaped(pure.hash_ids(flat, kind=ops.hash.HASH_KINDS[kind], form=_form_of(ids)), shape)


def mod_ids(ids: Any, modulus: int) -> jax.Array:
    """Return ``ids`` modulo ``modulus``, with ids read as unsigned 64-bit integers.

    For negative ids, the result differs from ``%``: the id -1 counts as 2^64 - 1; see
    :func:`recis_hybrid.ops.transform.mod_ids`.

    Args:
        ids: As for :func:`hash_ids`.
        modulus: 1 to 2^64 - 1, not traced.

    Returns:
        Integers in the shape of ``ids``, each in ``[0, modulus)``: int64 with ``jax_enable_x64``, otherwise int32. For
        moduli above 2^31, ids as :func:`hash_ids` returns them.

    Raises:
        NotImplementedError: If the function is compiled for a GPU.
        TypeError: If ``ids`` have the wrong dtype, or the modulus is not an integer.
        ValueError: If ``ids`` are uint32 but not pairs, or the modulus is out of range.

    Example:
        >>> mod_ids(jnp.array([12, -1], jnp.int32), 10).tolist()
        [2, 5]
    """
    modulus = check_integer("ffi.mod_ids", "modulus", modulus)
    if not 1 <= modulus < 2**64:
        raise ValueError(f"ffi.mod_ids: modulus must be from 1 to {2**64 - 1}, got {modulus}")
    flat, shape = words("ffi.mod_ids: ids", ids)
    form = _numbers() if modulus <= 2**31 else _form_of(ids)
    return _shaped(pure.mod_ids(flat, modulus=ops.program.as_int64(modulus), form=form), shape)


def bucketize(values: Any, boundaries: Any, *, right: bool = True, refuse_nan: bool = False) -> jax.Array:
    """Return the bucket of each value: the number of boundaries b with b <= v, or with b < v if ``right`` is False.

    As in :func:`recis_hybrid.ops.transform.bucketize`, and in :func:`torch.bucketize` also in that NaN goes to the last
    bucket. There is no gradient with respect to ``values``.

    Args:
        values: float32, any shape; with ``jax_enable_x64``, also float64; or integers, as the ids of :func:`hash_ids`
            but not uint64, which are compared as signed 64-bit integers.
        boundaries: K numbers in non-decreasing order, not traced: a list, or an array ``[K]``; integers if ``values``
            are. They are rounded to the dtype of the values.
        right: Whether a value equal to a boundary goes to the bucket above.
        refuse_nan: Whether to refuse NaN.

    Returns:
        Integers in the shape of ``values``, each in ``[0, K]``: int64 with ``jax_enable_x64``, otherwise int32.

    Raises:
        NotImplementedError: If the function is compiled for a GPU.
        TypeError: If a dtype is wrong, or the boundaries are traced.
        ValueError: If the boundaries are not sorted, or not one-dimensional, or one is NaN.
        jax.errors.JaxRuntimeError: If a value is NaN and ``refuse_nan`` is True; when the result is used.

    Example:
        >>> bucketize(jnp.array([0.5, 1.0, 7.0]), [1.0, 5.0]).tolist()
        [0, 1, 2]
    """
    check_flag("ffi.bucketize", "right", right)
    check_flag("ffi.bucketize", "refuse_nan", refuse_nan)
    dtype = getattr(values, "dtype", None)
    shape: tuple[int, ...]
    if dtype == np.float32 or (dtype == np.float64 and has_int64()):
        flat, shape = jax.lax.stop_gradient(jnp.reshape(values, -1)), tuple(values.shape)
        limits = _boundaries(boundaries, np.dtype(dtype))
    elif dtype == np.uint64 or dtype is None or not jnp.issubdtype(dtype, np.integer):
        raise TypeError(
            f"ffi.bucketize: values must be float32, int32, pairs of uint32 words, or with jax_enable_x64 float64 or "
            f"int64, got {dtype or describe_value(values)}; convert them with .astype(numpy.float32)"
        )
    else:
        flat, shape = words("ffi.bucketize: values", values)
        limits = _boundaries(boundaries, np.dtype(np.int64))
        limits = limits if flat.dtype == np.int64 else words("boundaries", limits)[0]
    refuse_nan = refuse_nan and dtype in (np.float32, np.float64)
    return _shaped(pure.bucketize(flat, limits, right=right, refuse_nan=refuse_nan, form=_numbers()), shape)


def segment_reduce(values: Any, offsets: Any, combiner: Combiner = "sum") -> jax.Array:
    """Combine consecutive rows: a vector for each bag, in the way in which tables pool the rows of ragged ids.

    Rows are added in their order, in float32, so that the result has the same bits for any number of threads. The
    gradient with respect to ``values`` is bitwise that of a table's rows. The rule is that of
    :func:`recis_hybrid.ops.gather.gather_bags`; with ``"max"``, the first of equal elements wins, and NaN over all
    numbers.

    Args:
        values: float32 ``[n, …]``.
        offsets: ``[V + 1]``: bag v has the rows ``offsets[v]`` to ``offsets[v + 1]``; int32, or in another form of
            :func:`hash_ids`. Rows outside all bags are ignored.
        combiner: One of ``Combiner``, not traced.

    Returns:
        float32 ``[V, …]``. Empty bags yield zeros.

    Raises:
        NotImplementedError: If the function is compiled for a GPU, or ``offsets`` are batched by vmap.
        TypeError: If a dtype is wrong.
        ValueError: If a shape is wrong, the combiner is unknown, or offsets that are numpy arrays decrease or are not
            within the rows.
        jax.errors.JaxRuntimeError: If other offsets decrease or are not within the rows; when the result is used.

    Example:
        >>> segment_reduce(jnp.array([[1.0], [2.0], [4.0]]), jnp.array([0, 2, 2, 3]), "mean").tolist()
        [[1.5], [0.0], [4.0]]
    """
    if combiner not in _COMBINERS:
        raise ValueError(f"ffi.segment_reduce: combiner must be one of {list(_COMBINERS)}, got {combiner!r}")
    dtype = getattr(values, "dtype", None)
    if dtype != np.float32:
        raise TypeError(
            f"ffi.segment_reduce: values must be float32, got {dtype or describe_value(values)}; convert them with "
            ".astype(numpy.float32)"
        )
    if values.ndim < 1:
        raise ValueError("ffi.segment_reduce: values must be [n, …], got a scalar")
    ends, extent = words("ffi.segment_reduce: offsets", offsets)
    if len(extent) != 1 or extent[0] < 1:
        raise ValueError(f"ffi.segment_reduce: offsets must be [V + 1], got {list(extent)}")
    rows, *inner = values.shape
    if isinstance(offsets, np.ndarray):
        _check_offsets(offsets, rows)
    width = int(np.prod(inner))
    combined = _segment_reduce((_COMBINERS[combiner], rows), jnp.reshape(values, (rows, width)), ends)
    return combined.reshape(extent[0] - 1, *inner)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segment_reduce(static: tuple[int, int], values: Any, offsets: Any) -> jax.Array:
    """Combine rows ``[n, D]``; ``static`` is the number of the combiner, and n."""
    return cast(jax.Array, pure.combine_bags(values, offsets, combiner=static[0], winners=False)[0])


def _forward(static: tuple[int, int], values: Any, offsets: Any) -> tuple[Any, Any]:
    combined, *winners = pure.combine_bags(values, offsets, combiner=static[0], winners=static[0] == ops.gather.MAX)
    return combined, (offsets, winners)


def _backward(static: tuple[int, int], residuals: Any, gradients: Any) -> tuple[Any, None]:
    offsets, winners = residuals
    return pure.spread_bags(gradients, offsets, *winners, combiner=static[0], rows=static[1]), None


_segment_reduce.defvjp(_forward, _backward)


def _form_of(ids: Any) -> str:
    """Return the form of results that are ids."""
    return "int64" if has_int64() and ids.dtype != np.uint32 else "pairs"


def _numbers() -> str:
    """Return the form of results below 2^31."""
    return "int64" if has_int64() else "int32"


def _shaped(flat: Any, shape: tuple[int, ...]) -> jax.Array:
    return cast(jax.Array, flat.reshape(*shape, 2) if flat.dtype == np.uint32 else flat.reshape(shape))


def _boundaries(boundaries: Any, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Return sorted boundaries in the dtype of the values."""
    if isinstance(boundaries, jax.core.Tracer):
        raise TypeError(
            "ffi.bucketize: boundaries must be known when the function is traced, got a traced array; close over them, "
            "or use jax.numpy.searchsorted"
        )
    given = np.asarray(boundaries)
    if given.ndim != 1:
        raise ValueError(f"ffi.bucketize: boundaries must be [K], got {list(given.shape)}")
    if given.size == 0:
        return np.zeros(0, dtype)
    if given.dtype.kind not in ("iu" if dtype == np.int64 else "iuf"):
        raise TypeError(
            f"ffi.bucketize: boundaries must be {'integers' if dtype == np.int64 else 'numbers'} for values of this "
            f"dtype, got {given.dtype}"
        )
    if dtype == np.int64 and given.dtype == np.uint64 and (given >= 2**63).any():
        raise ValueError(f"ffi.bucketize: boundaries must be below 2^63, got {int(given.max())}")
    if np.isnan(given).any():
        raise ValueError(f"ffi.bucketize: boundaries must be numbers, got NaN at {int(np.isnan(given).argmax())}")
    if (falls := given[1:] < given[:-1]).any():
        at = int(falls.argmax())
        raise ValueError(
            f"ffi.bucketize: boundaries must not decrease, got {given[at]} and then {given[at + 1]} at {at + 1}; sort "
            "them"
        )
    return given.astype(dtype)


def _check_offsets(offsets: np.ndarray[Any, Any], rows: int) -> None:
    """Refuse invalid offsets that are known when the function is traced."""
    at = np.ascontiguousarray(offsets).view(np.int64).reshape(-1) if offsets.dtype == np.uint32 else offsets
    bad = (at < 0) | (at > rows)
    bad[1:] |= at[1:] < at[:-1]
    if bad.any():
        place = int(bad.argmax())
        raise ValueError(
            f"ffi.segment_reduce: offsets must not decrease and must be within the {rows} rows of the values, got "
            f"{at[place]} at {place}"
        )
