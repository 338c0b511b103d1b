"""Innermost values of columns: numbers, strings, and ids with weights. Imports pyarrow.

Letters: N values, M strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.dlpack import from_dlpack

from recis_hybrid.columnio.convert.numbers import Array, Numbers, Place, a_few, null_error

Parts: TypeAlias = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]
"""Values, the offsets of one more level if there is one, and weights if there are any."""


class Leaf(Protocol):
    """Conversion of the innermost values of a column to tensors."""

    def clean(self, array: Array, place: Place) -> Array:
        """Return the array without nulls, in the layout that ``parts`` takes.

        Raises:
            ValueError: The spec does not allow a value.
        """

    def parts(self, array: Array) -> Parts:
        """Return tensors that share the memory of a clean array or a slice of one."""


@dataclass(frozen=True)
class NumberLeaf:
    """Numbers → values [N]."""

    numbers: Numbers

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Leaf``."""
        return self.numbers.clean(array, place)

    def parts(self, array: Array) -> Parts:
        """See ``Leaf``."""
        return self.numbers.tensor(array), [], None


@dataclass(frozen=True)
class TextLeaf:
    """Strings → bytes, and a level of offsets [M + 1]."""

    default: str | bytes | None
    remedy: str
    """A spec that would allow nulls, for messages."""

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Leaf``."""
        # 64-bit offsets over the same bytes.
        array = array.cast(pa.large_binary())
        if array.null_count == 0:
            return array
        if self.default is None:
            raise null_error(array.null_count, len(array), place, self.remedy)
        return array.fill_null(pa.scalar(self.default, array.type))

    def parts(self, array: Array) -> Parts:
        """See ``Leaf``."""
        _, offset_buffer, byte_buffer = array.buffers()
        offsets = from_dlpack(
            pa.Array.from_buffers(pa.int64(), len(array) + 1, [None, offset_buffer], offset=array.offset)
            if offset_buffer is not None
            else pa.array([0], pa.int64())
        )
        first, last = int(offsets[0]), int(offsets[-1])
        # If all strings are empty, the buffer of bytes may be missing.
        buffer = byte_buffer if last > first else pa.py_buffer(b"")
        values = pa.Array.from_buffers(pa.uint8(), last - first, [None, buffer], offset=first if last > first else 0)
        return from_dlpack(values), [offsets - first if first else offsets], None


@dataclass(frozen=True)
class PairLeaf:
    """Structs of an id and a weight → values of the ids, and weights [N] (or [M])."""

    ids: Leaf
    weights: Numbers
    fields: tuple[int, int] = (0, 1)
    """Positions of the id and the weight in the struct of a file."""

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Leaf``."""
        if array.null_count:
            raise null_error(array.null_count, len(array), place, "an id and a weight in every struct")
        ids, weights = map(array.field, self.fields)
        return paired(self.ids.clean(ids, place), self.weights.clean(weights, place))

    def parts(self, array: Array) -> Parts:
        """See ``Leaf``."""
        values, level, _ = self.ids.parts(array.field(0))
        return values, level, self.weights.tensor(array.field(1))


@dataclass(frozen=True)
class PairTextLeaf:
    """Strings ``"id:weight"`` → ids [N] and weights [N]."""

    ids: Numbers
    weights: Numbers
    separator: str

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Leaf``."""
        if array.null_count:
            raise null_error(array.null_count, len(array), place, "an id and a weight in every string")
        array = array.cast(pa.large_string())
        whole = pc.match_substring(array, self.separator)
        if pc.any(pc.invert(whole)).as_py():
            if self.weights.default is None:
                wrong = array.filter(pc.invert(whole))
                raise ValueError(
                    f"{place} has {len(wrong)} strings without {self.separator!r} between id and weight, such as "
                    f"{a_few([repr(text) for text in wrong[:3].to_pylist()])}; use Weighted(default_weight=1), or "
                    f"the correct separator"
                )
            weight = pa.scalar(str(self.weights.default), array.type)
            joined = pc.binary_join_element_wise(array, weight, pa.scalar(self.separator, array.type))
            array = pc.if_else(whole, array, joined)
        parts = pc.split_pattern(array, self.separator, max_splits=1, reverse=True)
        ids, weights = pc.list_element(parts, 0), pc.list_element(parts, 1)
        try:
            cast = ids.cast(pa.int64()), weights.cast(pa.float32())
        except pa.ArrowInvalid as error:
            raise ValueError(
                f'{place} has a string that is not "id{self.separator}weight" ({error}); write a 64-bit integer and a '
                f"number, or structs for ids that are strings"
            ) from error
        return paired(self.ids.clean(cast[0], place), self.weights.clean(cast[1], place))

    def parts(self, array: Array) -> Parts:
        """See ``Leaf``."""
        return self.ids.tensor(array.field(0)), [], self.weights.tensor(array.field(1))


def paired(ids: Array, weights: Array) -> Array:
    """Return an array of structs over the memory of clean ids and clean weights."""
    return pa.StructArray.from_arrays([ids, weights], names=["id", "weight"])
