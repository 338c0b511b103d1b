"""From Arrow arrays to tensors in two steps, by the spec of a column. Imports pyarrow.

`clean` runs while it is known which file an array came from: it refuses or fills nulls, converts, and brings the array
to one layout, copying only what is not in order already. `tensor` runs on a batch that was cut from clean arrays: it
only looks at the same memory in another way, so that nothing is left that could fail.

Letters: B rows of a batch, N values over all rows, L values of each row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.dlpack import from_dlpack

from recis_hybrid.ragged import RaggedTensor

from .columns import Column, Dense, Ragged, Text
from .numbers import Array, ArrowType, Numbers, Place, a_few, is_number, nulls_refused, numbers


class Converter(Protocol):
    """What a spec becomes once the column's type in the files is known."""

    @property
    def spec(self) -> Column:
        """The spec, its dtype filled in."""

    def clean(self, array: Array, place: Place) -> Array:
        """Returns the array in the layout that `tensor` takes, without nulls.

        Raises:
            ValueError: The spec does not allow for what is in it.
        """

    def tensor(self, array: Array) -> torch.Tensor | RaggedTensor:
        """Returns a clean array, or a slice of one, as what a batch holds, over the same memory."""


@dataclass(frozen=True)
class DenseConverter:
    """Numbers → [B]."""

    spec: Dense
    numbers: Numbers

    def clean(self, array: Array, place: Place) -> Array:
        """See `Converter`."""
        return self.numbers.clean(array, place)

    def tensor(self, array: Array) -> torch.Tensor:
        """See `Converter`."""
        return self.numbers.tensor(array)


@dataclass(frozen=True)
class FixedConverter:
    """Lists of one length → [B, L]."""

    spec: Dense
    numbers: Numbers
    length: int

    def clean(self, array: Array, place: Place) -> Array:
        """See `Converter`."""
        if array.null_count and self.numbers.default is None:
            raise nulls_refused(array.null_count, len(array), place, self.numbers.remedy)
        # The length of a null is null, and so is its comparison: it counts neither as right nor as wrong.
        lengths = pc.list_value_length(array)
        wrong = lengths.filter(pc.not_equal(lengths, self.length))
        if len(wrong):
            raise ValueError(
                f"{place} has {len(wrong)} lists whose length is not {self.length} but "
                f"{a_few(sorted(wrong.unique().to_pylist()))}; read it with Ragged(), or write lists of one length"
            )
        values = self.numbers.clean(array.flatten(), place)
        if array.null_count:
            rows = torch.full((len(array), self.length), self.numbers.default or 0, dtype=self.numbers.dtype)
            rows[from_dlpack(array.is_valid().cast(pa.uint8())).bool()] = self.numbers.tensor(values).view(
                -1, self.length
            )
            values = self.numbers.array(rows.view(-1))
        return pa.FixedSizeListArray.from_arrays(values, self.length)

    def tensor(self, array: Array) -> torch.Tensor:
        """See `Converter`."""
        return self.numbers.tensor(array.flatten()).view(-1, self.length)


@dataclass(frozen=True)
class RaggedConverter:
    """Lists of numbers → RaggedTensor."""

    spec: Ragged
    numbers: Numbers

    def clean(self, array: Array, place: Place) -> Array:
        """See `Converter`."""
        if array.null_count and not self.spec.null_as_empty:
            raise nulls_refused(array.null_count, len(array), place, "Ragged(null_as_empty=True)")
        lengths = pc.list_value_length(array).fill_null(0)
        offsets = torch.zeros(len(array) + 1, dtype=torch.int64)
        torch.cumsum(from_dlpack(lengths), 0, dtype=torch.int64, out=offsets[1:])
        values = self.numbers.clean(array.flatten(), place)
        return pa.LargeListArray.from_arrays(pa.array(offsets.numpy()), values)

    def tensor(self, array: Array) -> RaggedTensor:
        """See `Converter`."""
        offsets = from_dlpack(array.offsets)
        first, last = int(offsets[0]), int(offsets[-1])
        return RaggedTensor(self.numbers.tensor(array.values[first:last]), offsets - first if first else offsets)


@dataclass(frozen=True)
class TextConverter:
    """Strings → RaggedTensor of their bytes."""

    spec: Text

    def clean(self, array: Array, place: Place) -> Array:
        """See `Converter`."""
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        # Offsets of 64 bits over the same bytes.
        array = array.cast(pa.large_binary())
        if array.null_count == 0:
            return array
        if self.spec.default is None:
            raise nulls_refused(array.null_count, len(array), place, 'Text(default="")')
        return array.fill_null(pa.scalar(self.spec.default, array.type))

    def tensor(self, array: Array) -> RaggedTensor:
        """See `Converter`."""
        _, offset_buffer, byte_buffer = array.buffers()
        offsets = from_dlpack(
            pa.Array.from_buffers(pa.int64(), len(array) + 1, [None, offset_buffer], offset=array.offset)
        )
        first, last = int(offsets[0]), int(offsets[-1])
        # Where all strings are empty there may be no buffer of bytes.
        buffer = byte_buffer if last > first else pa.py_buffer(b"")
        values = pa.Array.from_buffers(pa.uint8(), last - first, [None, buffer], offset=first if last > first else 0)
        return RaggedTensor(from_dlpack(values), offsets - first if first else offsets)


def converter(spec: Column | None, arrow_type: ArrowType, place: Place) -> Converter:
    """Finds how a column of `arrow_type` is read by `spec`.

    Args:
        spec: How the user wants it; None takes what suits the type.
        arrow_type: The column's type in the files.
        place: The column and a file, for messages.

    Returns:
        The converter.

    Raises:
        TypeError: A column of that type cannot be read by that spec.
        ValueError: The default is no number of the column's dtype.
    """
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    kind = _kind(arrow_type)
    if spec is None:
        spec = _spec_for(kind, arrow_type)
    if isinstance(spec, Text) and kind == "strings":
        return TextConverter(spec)
    if isinstance(spec, Ragged) and kind == "lists of numbers":
        found = numbers(spec.dtype, spec.default, arrow_type.value_type, place, "Ragged(default=0)")
        return RaggedConverter(replace(spec, dtype=found.dtype), found)
    if isinstance(spec, Dense) and spec.length is not None and kind == "lists of numbers":
        remedy = f"Dense(length={spec.length}, default=0)"
        found = numbers(spec.dtype, spec.default, arrow_type.value_type, place, remedy)
        return FixedConverter(replace(spec, dtype=found.dtype), found, spec.length)
    if isinstance(spec, Dense) and spec.length is None and kind == "numbers":
        found = numbers(spec.dtype, spec.default, arrow_type, place, "Dense(default=0)")
        return DenseConverter(replace(spec, dtype=found.dtype), found)
    if spec is not None and not isinstance(spec, Column):
        raise TypeError(f"{place} needs a Dense, Ragged or Text for its spec, got {spec!r}")
    wanted = f"{spec} does not read" if spec is not None else "no tensor is made of"
    raise TypeError(f"{place} is {arrow_type}, which {wanted}; {_REMEDIES[kind]}")


_REMEDIES = {
    "numbers": "numbers are read by Dense()",
    "strings": "strings are read by Text()",
    "lists of numbers": "lists of numbers are read by Ragged(), or by Dense(length=...) if all have one length",
    "": "write it as numbers, strings or lists of numbers",
}


def _kind(arrow_type: ArrowType) -> str:
    types = pa.types
    if is_number(arrow_type):
        return "numbers"
    if any(test(arrow_type) for test in (types.is_string, types.is_large_string, types.is_string_view)):
        return "strings"
    if any(test(arrow_type) for test in (types.is_binary, types.is_large_binary, types.is_binary_view)):
        return "strings"
    if any(test(arrow_type) for test in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        return "lists of numbers" if is_number(arrow_type.value_type) else ""
    return ""


def _spec_for(kind: str, arrow_type: ArrowType) -> Column | None:
    if kind == "lists of numbers":
        return Dense(length=arrow_type.list_size) if pa.types.is_fixed_size_list(arrow_type) else Ragged()
    if kind == "strings":
        return Text()
    return Dense() if kind == "numbers" else None
