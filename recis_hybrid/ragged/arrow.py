"""RaggedTensors and Arrow arrays."""

from __future__ import annotations

import pyarrow as pa
import torch
from torch.utils.dlpack import from_dlpack

from recis_hybrid.ragged.checks import Parts


def from_arrow(array: pa.Array | pa.ChunkedArray) -> Parts:
    """See `RaggedTensor.from_arrow`."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    levels: list[torch.Tensor] = []
    while _is_list(array.type):
        array, offsets = _opened(array)
        levels.append(offsets)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    _no_nulls(array)
    if _is_string(array.type):
        values, offsets = _bytes(array)
        levels.append(offsets)
    elif levels and (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        values = from_dlpack(array) if len(array) else torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())
    else:
        raise TypeError(
            f"RaggedTensor.from_arrow: takes lists of numbers, strings, and lists of these, got {array.type}; a column "
            f"of numbers is a dense tensor"
        )
    return values, levels[-1], None, tuple(levels[:-1])


def _no_nulls(array: pa.Array) -> None:
    if array.null_count:
        raise ValueError(
            f"RaggedTensor.from_arrow: has {array.null_count} nulls among {len(array)} of {array.type}; fill them "
            f"first (pyarrow.compute.fill_null)"
        )


def _is_string(kind: pa.DataType) -> bool:
    types = pa.types
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binaries = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(test(kind) for test in (*strings, *binaries))


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _opened(array: pa.Array) -> tuple[pa.Array, torch.Tensor]:
    """Return what lies in lists, and their offsets."""
    _no_nulls(array)
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten(), torch.arange(len(array) + 1) * array.type.list_size
    offsets = from_dlpack(array.offsets).to(torch.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    return array.values.slice(first, last - first), offsets - first


def _bytes(array: pa.Array) -> tuple[torch.Tensor, torch.Tensor]:
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


def to_arrow(
    values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, outer: tuple[torch.Tensor, ...]
) -> pa.Array:
    """See `RaggedTensor.to_arrow`."""
    if weights is not None:
        raise ValueError("RaggedTensor.to_arrow: an array cannot hold weights; make one of them, too")
    if values.dim() != 1:
        raise ValueError(f"RaggedTensor.to_arrow: values must be [N], got {list(values.shape)}")
    levels = [*outer, offsets]
    if values.dtype == torch.uint8:
        buffers = [None, *(pa.py_buffer(tensor.cpu().contiguous().numpy()) for tensor in (levels.pop(), values))]
        array = pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)
    else:
        array = pa.array(values.cpu().contiguous().numpy())
    for level in reversed(levels):
        array = pa.LargeListArray.from_arrays(pa.array(level.cpu().contiguous().numpy()), array)
    return array
