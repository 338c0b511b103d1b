"""Columns of numpy, pandas, JAX and other DLPack libraries as tensors that share their memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from recis_hybrid.ragged.tensor import RaggedTensor

_UNSIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64}


class _Lent:
    """A read-only array that torch takes without a warning; columns are never written to."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array  # keeps the memory
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def as_column(where: str, value: Any) -> torch.Tensor | RaggedTensor:
    """Return a value of a batch as a column.

    Not copied are tensors, numpy arrays of this machine's byte order with steps above 0, read-only ones among them, and
    arrays that speak DLPack, as JAX's do; JAX holds ids of 64 bits only while ``jax_enable_x64`` is on, and has cut
    them to 32 before. A Series of pandas or polars is taken by its numpy array, a list by its numbers. uint64 keeps its
    bits, as int64; uint32 and uint16 become wider.

    Args:
        where: What errors begin with.
        value: The column.

    Raises:
        TypeError: It is none of these, or holds no numbers.
        ValueError: It is a list of lists.
    """
    if not isinstance(value, torch.Tensor | RaggedTensor):
        value = _of_others(where, value)
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


def _of_others(where: str, value: Any) -> torch.Tensor:
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, np.ndarray):
        return _of_numpy(where, value, kind)
    if isinstance(value, list | tuple):
        return _of_list(where, value, kind)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        try:
            taken: torch.Tensor = torch.utils.dlpack.from_dlpack(value)
            return taken
        except Exception as error:  # whatever its library raises
            raise TypeError(
                f"{where} cannot be taken by DLPack from a {kind}: {error}; give an array with values, of a dtype that "
                f"torch has, on one device; convert Arrow arrays of lists by ragged.from_arrow"
            ) from error
    if hasattr(value, "to_numpy") and not isinstance(value, type):
        array = np.asarray(value.to_numpy())
        if array.dtype.kind == "f" and str(getattr(value, "dtype", "")).startswith(("Int", "UInt")):
            raise TypeError(f"{where} has missing values, as a {kind} of {value.dtype}; give a default, as .fillna(0)")
        return _of_numpy(where, array, kind)
    raise TypeError(
        f"{where} must be a Tensor or a RaggedTensor, or an array of numpy, pandas or JAX, got {kind}; lists of lists "
        f"become one by RaggedTensor.from_lists, strings by RaggedTensor.from_strings"
    )


def _of_numpy(where: str, array: np.ndarray[Any, Any], kind: str) -> torch.Tensor:
    if array.dtype.kind in "OUSTVMm":
        remedies = {
            "M": "count units by .astype('datetime64[s]').astype(numpy.int64)",
            "m": "count units by .astype('timedelta64[s]').astype(numpy.int64)",
            "O": "strings become a column by RaggedTensor.from_strings, lists by RaggedTensor.from_lists, and missing "
            "values by a default, as .fillna(0)",
        }
        remedy = remedies.get(array.dtype.kind, "strings become a column by RaggedTensor.from_strings")
        raise TypeError(f"{where} must hold numbers, got a {kind} of {array.dtype}; {remedy}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind in "iu":
        array = array.view(f"{array.dtype.kind}{array.dtype.itemsize}")  # C's long long is another type than its long
    if any(step < 0 for step in array.strides) or not array.flags.aligned:
        array = array.copy()
    try:
        return torch.from_numpy(array if array.flags.writeable else np.asarray(_Lent(array)))
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error


def _of_list(where: str, value: Any, kind: str) -> torch.Tensor:
    if any(isinstance(item, list | tuple | np.ndarray | torch.Tensor) for item in value):
        raise ValueError(
            f"{where} must be a list of numbers, got a {kind} of lists; write RaggedTensor.from_lists for rows of "
            f"unequal length, torch.tensor for equal ones"
        )
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return _of_numpy(where, np.asarray(value), kind)
    # By itself numpy makes floats of some numbers from 2^63 on.
    for dtype in (np.int64, np.uint64):
        try:
            return _of_numpy(where, np.array(value, dtype=dtype), kind)
        except OverflowError:
            continue
    raise TypeError(f"{where} must hold integers of 64 bits, got a {kind} with {min(value)} to {max(value)}")
