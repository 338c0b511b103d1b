"""Conversions between RaggedTensors and Arrow arrays.

pyarrow is imported when a conversion first runs, so that importing the package does not load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.dlpack import from_dlpack

from recis_hybrid.ragged.tensor import RaggedTensor

if TYPE_CHECKING:
    import pyarrow as pa


def from_arrow(array: pa.Array | pa.ChunkedArray) -> RaggedTensor:
    """Build a RaggedTensor on the CPU from an Arrow array of lists, lists of lists, strings, or lists of strings.

    Aligned numbers share the memory of Arrow.

    Args:
        array: B rows without nulls.

    Raises:
        TypeError: If the array has another type.
        ValueError: If it has nulls.

    Example:
        >>> import pyarrow as pa
        >>> from_arrow(pa.array([[7, 8], []]))
        RaggedTensor(batch_size=2, values=int64[2], weights=None, device=cpu)
    """
    import pyarrow as pa

    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    levels: list[torch.Tensor] = []
    while _is_list(array.type):
        array, offsets = _unnest(array)
        levels.append(offsets)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    _check_no_nulls(array)
    if _is_string(array.type):
        values, offsets = _bytes_and_offsets(array)
        levels.append(offsets)
    elif levels and (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        values = from_dlpack(array) if len(array) else torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())
    else:
        raise TypeError(
            f"from_arrow: the array must hold lists of numbers, strings, or lists of these, got {array.type}; convert "
            f"a column of numbers to a dense tensor"
        )
    return RaggedTensor(values, levels[-1], None, tuple(levels[:-1]))


def to_arrow(ragged: RaggedTensor) -> pa.Array:
    """Return the rows as an Arrow array of large lists, or of large binaries where they are strings.

    Numbers on the CPU share the memory of the RaggedTensor.

    Args:
        ragged: B rows of values ``[N]``.

    Raises:
        ValueError: If there are weights, which an Arrow array cannot hold, or values of more dimensions.

    Example:
        >>> to_arrow(RaggedTensor.from_lists([[7, 8], []])).to_pylist()
        [[7, 8], []]
    """
    import pyarrow as pa

    values = ragged.values
    if ragged.weights is not None:
        raise ValueError("to_arrow: an Arrow array cannot hold weights; convert them to a separate array")
    if values.dim() != 1:
        raise ValueError(f"to_arrow: values must be [N], got {list(values.shape)}; flatten them first")
    levels = [*ragged.outer, ragged.offsets]
    if values.dtype == torch.uint8:
        buffers = [None, *(pa.py_buffer(tensor.cpu().contiguous().numpy()) for tensor in (levels.pop(), values))]
        array = pa.Array.from_buffers(pa.large_binary(), len(ragged.offsets) - 1, buffers)
    else:
        array = pa.array(values.cpu().contiguous().numpy())
    for level in reversed(levels):
        array = pa.LargeListArray.from_arrays(pa.array(level.cpu().contiguous().numpy()), array)
    return array


def _check_no_nulls(array: pa.Array) -> None:
    if array.null_count:
        raise ValueError(
            f"from_arrow: the array must have no nulls, got {array.null_count} among {len(array)} of {array.type}; "
            f"fill them first (pyarrow.compute.fill_null)"
        )


def _is_string(kind: pa.DataType) -> bool:
    from pyarrow import types

    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in (*strings, *binaries))


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return any(test(kind) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def _unnest(array: pa.Array) -> tuple[pa.Array, torch.Tensor]:
    """Return the items and the offsets of lists."""
    from pyarrow import types

    _check_no_nulls(array)
    if types.is_fixed_size_list(array.type):
        return array.flatten(), torch.arange(len(array) + 1) * array.type.list_size
    offsets = from_dlpack(array.offsets).to(torch.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    return array.values.slice(first, last - first), offsets - first


def _bytes_and_offsets(array: pa.Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes of strings, uint8 [N], and the offsets of the strings, int64 [M + 1]."""
    import pyarrow as pa

    array = array.cast(pa.large_binary())
    _, offset_buffer, byte_buffer = array.buffers()
    if offset_buffer is None:
        return torch.empty(0, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    offsets = from_dlpack(pa.Array.from_buffers(pa.int64(), len(array) + 1, [None, offset_buffer], offset=array.offset))
    first, last = int(offsets[0]), int(offsets[-1])
    if first == last:
        return torch.empty(0, dtype=torch.uint8), offsets - first
    values = pa.Array.from_buffers(pa.uint8(), last - first, [None, byte_buffer], offset=first)
    return from_dlpack(values), offsets - first
