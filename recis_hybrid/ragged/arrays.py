"""Columns from numpy, pandas, JAX and other DLPack libraries, as tensors that share their memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from recis_hybrid.ragged.tensor import RaggedTensor

_UNSIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64}


class _ReadOnly:
    """A read-only array that torch accepts without a warning; nothing writes to columns."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array  # keeps the memory alive
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def as_column(where: str, value: Any) -> torch.Tensor | RaggedTensor:
    """Return a value of a batch as a column.

    Tensors, numpy arrays (including read-only ones) in native byte order with positive strides, and arrays that support
    DLPack, such as those of JAX, share their memory with the column. Other arrays, pandas or polars Series, and lists
    of numbers are also accepted. uint64 becomes int64 with the same bits; uint32 and uint16 are widened. Note that JAX
    truncates 64-bit ids to 32 bits unless ``jax_enable_x64`` is set.

    Args:
        where: Prefix of error messages.
        value: The column.

    Raises:
        TypeError: If the value is none of these, holds no numbers, or is being traced by JAX.
        ValueError: If it is a list of lists.
    """
    if not isinstance(value, torch.Tensor | RaggedTensor):
        value = _as_tensor(where, value)
    if isinstance(value, RaggedTensor):
        values = _signed(value.values)
        if values is value.values:
            return value
        return RaggedTensor.unchecked(values, value.offsets, value.weights, value.outer)
    return _signed(value)


def _signed(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.uint64:
        return values.view(torch.int64)
    return values.to(_UNSIGNED[values.dtype]) if values.dtype in _UNSIGNED else values


def _as_tensor(where: str, value: Any) -> torch.Tensor:
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray):
        return _of_numpy(where, value, kind)
    if any(base.__name__ == "Tracer" and base.__module__.startswith("jax") for base in type(value).__mro__):
        raise TypeError(
            f"{where} must hold numbers, got {value.dtype}{list(value.shape)} that JAX is tracing; lookups and "
            f"features do not run inside jax.jit, grad or vmap: look ids up before the jitted function, with "
            f"recis_hybrid.bridge.jax_led, and pass it the vectors"
        )
    if isinstance(value, list | tuple):
        return _of_list(where, value, kind)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        try:
            tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
            return tensor
        except Exception as error:  # each library raises its own
            raise TypeError(
                f"{where}: a {kind} cannot be imported through DLPack: {error}; pass an array on one device in a dtype "
                f"that torch has; convert Arrow arrays of lists with ragged.from_arrow"
            ) from error
    if hasattr(value, "to_numpy") and not isinstance(value, type):
        array = np.asarray(value.to_numpy())
        if array.dtype.kind == "f" and str(getattr(value, "dtype", "")).startswith(("Int", "UInt")):
            raise TypeError(
                f"{where} must not have missing values, got a {kind} of {value.dtype}; fill them, as with .fillna(0)"
            )
        return _of_numpy(where, array, kind)
    raise TypeError(
        f"{where} must be a Tensor or a RaggedTensor, or an array of numpy, pandas or JAX, got {kind}; convert lists "
        f"of lists with RaggedTensor.from_lists, strings with RaggedTensor.from_strings"
    )


def _of_numpy(where: str, array: np.ndarray[Any, Any], kind: str) -> torch.Tensor:
    if array.dtype.kind in "OUSTVMm":
        remedies = {
            "M": "convert with .astype('datetime64[s]').astype(numpy.int64)",
            "m": "convert with .astype('timedelta64[s]').astype(numpy.int64)",
            "O": "convert strings with RaggedTensor.from_strings and lists with RaggedTensor.from_lists, and fill "
            "missing values, as with .fillna(0)",
        }
        remedy = remedies.get(array.dtype.kind, "convert strings with RaggedTensor.from_strings")
        raise TypeError(f"{where} must hold numbers, got a {kind} of {array.dtype}; {remedy}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind in "iu":
        array = array.view(
            f"{array.dtype.kind}{array.dtype.itemsize}"
        )  # numpy has two types of the same size, C's long and long long
    if any(step < 0 for step in array.strides) or not array.flags.aligned:
        array = array.copy()
    try:
        return torch.from_numpy(array if array.flags.writeable else np.asarray(_ReadOnly(array)))
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error


def _of_list(where: str, value: Any, kind: str) -> torch.Tensor:
    if any(isinstance(item, list | tuple | np.ndarray | torch.Tensor) for item in value):
        raise ValueError(
            f"{where} must be a list of numbers, got a {kind} of lists; use RaggedTensor.from_lists for rows of "
            f"unequal length, torch.tensor for rows of equal length"
        )
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return _of_numpy(where, np.asarray(value), kind)
    # numpy infers float64 for some integers of 2^63 or more.
    for dtype in (np.int64, np.uint64):
        try:
            return _of_numpy(where, np.array(value, dtype=dtype), kind)
        except OverflowError:
            continue
    raise TypeError(f"{where} must hold 64-bit integers, got a {kind} with values from {min(value)} to {max(value)}")
