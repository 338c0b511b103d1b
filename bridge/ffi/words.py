"""64-bit integers in JAX: arrays of int64, or pairs of 32-bit words where JAX has none.

Legend: n integers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recis_hybrid.validation import describe_value


def words(where: str, values: Any) -> tuple[Any, tuple[int, ...]]:
    """Return integers as 64-bit words, flat, and their shape.

    Args:
        where: Prefix of error messages.
        values: int32; uint32 pairs of words ``(…, 2)``, the low one first; int64 or uint64, of numpy or with
            ``jax_enable_x64``.

    Returns:
        uint32 ``[n, 2]``, or 64-bit integers ``[n]``; and the shape of the integers.

    Raises:
        TypeError: If the dtype is another one.
        ValueError: If uint32 values are not pairs.
    """
    if isinstance(values, np.ndarray) and values.dtype in (np.int64, np.uint64):
        values = np.ascontiguousarray(values).view(np.uint32).reshape(*values.shape, 2)
    dtype = getattr(values, "dtype", None)
    if dtype in (jnp.int64, jnp.uint64):
        return values.reshape(-1), tuple(values.shape)
    if dtype == jnp.int32:
        pairs = jnp.stack([values, values >> 31], -1).astype(jnp.uint32)
        return pairs.reshape(-1, 2), tuple(values.shape)
    if dtype != jnp.uint32:
        raise TypeError(
            f"{where} must be int32, pairs of uint32 words, or int64 with jax_enable_x64, got "
            f"{dtype or describe_value(values)}"
        )
    if values.ndim < 1 or values.shape[-1] != 2:
        raise ValueError(
            f"{where}: uint32 must be pairs of words, (…, 2), got {list(values.shape)}; make them of int64 in numpy by "
            "ids.view(numpy.uint32).reshape(*ids.shape, 2)"
        )
    return values.reshape(-1, 2), tuple(values.shape[:-1])


def has_int64() -> bool:
    """Return whether JAX has 64-bit integers, in the current context."""
    return bool(jax.dtypes.canonicalize_dtype(np.int64) == np.int64)
