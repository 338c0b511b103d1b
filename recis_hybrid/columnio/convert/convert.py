"""Conversion of Arrow arrays to tensors in two steps, according to the spec of a column. Imports pyarrow.

``clean`` runs while the file of an array is known. It rejects or fills nulls, converts values, and produces a single
layout, copying only if necessary. ``tensor`` runs on a batch cut from clean arrays. It returns a view of the same
memory and cannot fail.

Letters: B rows of a batch, N values over all rows, L values of each row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.dlpack import from_dlpack

from recis_hybrid.columnio.columns import Column, Dense, Ragged, Text, Weighted
from recis_hybrid.columnio.convert.layouts import has_null_type, is_list, plain, plain_type
from recis_hybrid.columnio.convert.leaves import Leaf, NumberLeaf, PairLeaf, PairTextLeaf, TextLeaf, paired
from recis_hybrid.columnio.convert.numbers import (
    TOO_LARGE,
    Array,
    ArrowType,
    Numbers,
    Place,
    a_few,
    is_number,
    is_text,
    null_error,
    numbers,
)
from recis_hybrid.columnio.convert.spec_types import with_types
from recis_hybrid.columnio.convert.temporal import is_temporal
from recis_hybrid.ragged import RaggedTensor


class Converter(Protocol):
    """A spec applied to the type of a column in the files."""

    @property
    def spec(self) -> Column:
        """The spec with its dtype."""

    @property
    def dense(self) -> bool:
        """True if the result is one tensor with an entry per row."""

    def clean(self, array: Array, place: Place) -> Array:
        """Return the array without nulls, in the layout that ``tensor`` takes.

        Raises:
            ValueError: The spec does not allow a value.
        """

    def tensor(self, array: Array) -> torch.Tensor | RaggedTensor:
        """Return the column of a batch for a clean array or a slice of one, sharing its memory."""


@dataclass(frozen=True)
class DenseConverter:
    """Numbers → [B]."""

    spec: Dense
    numbers: Numbers
    dense: ClassVar[bool] = True

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Converter``."""
        return self.numbers.clean(array, place)

    def tensor(self, array: Array) -> torch.Tensor:
        """See ``Converter``."""
        return self.numbers.tensor(array)


@dataclass(frozen=True)
class FixedConverter:
    """Lists of one length → [B, L]."""

    spec: Dense
    numbers: Numbers
    length: int
    dense: ClassVar[bool] = True

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Converter``."""
        # The length of a null list is null, and so is its comparison, so null lists count as missing.
        lengths = pc.list_value_length(array)
        filled = pc.not_equal(lengths, 0)
        missing = len(filled) - (pc.sum(filled).as_py() or 0)
        wrong = lengths.filter(pc.and_(filled, pc.not_equal(lengths, self.length)))
        if len(wrong):
            raise ValueError(
                f"{place} has {len(wrong)} lists of length {a_few(sorted(wrong.unique().to_pylist()))} instead of "
                f"{self.length}; read it with Ragged(), or write lists of one length"
            )
        if missing and self.numbers.default is None:
            kind = "null" if missing == array.null_count else "null or empty list"
            raise null_error(missing, len(array), place, self.numbers.remedy, kind)
        values = self.numbers.clean(array.flatten(), place)
        if missing:
            rows = torch.full((len(array), self.length), self.numbers.default or 0, dtype=self.numbers.dtype)
            present = from_dlpack(pc.fill_null(filled, False).cast(pa.uint8())).bool()
            rows[present] = self.numbers.tensor(values).view(-1, self.length)
            values = self.numbers.array(rows.view(-1))
        return pa.FixedSizeListArray.from_arrays(values, self.length)

    def tensor(self, array: Array) -> torch.Tensor:
        """See ``Converter``."""
        return self.numbers.tensor(array.flatten()).view(-1, self.length)


@dataclass(frozen=True)
class ListConverter:
    """Values in lists nested ``depth`` times → RaggedTensor."""

    spec: Ragged | Text | Weighted
    leaf: Leaf
    depth: int
    dense: ClassVar[bool] = False

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Converter``."""
        return self._clean(array, self.depth, place)

    def tensor(self, array: Array) -> RaggedTensor:
        """See ``Converter``."""
        levels = []
        for _ in range(self.depth):
            offsets = from_dlpack(array.offsets)
            first, last = int(offsets[0]), int(offsets[-1])
            array = array.values[first:last]
            levels.append(offsets - first if first else offsets)
        values, more, weights = self.leaf.parts(array)
        levels += more
        # Clean arrays are valid, and a check would cost more than the conversion.
        return RaggedTensor.unchecked(values, levels[-1], weights, tuple(levels[:-1]))

    def _clean(self, array: Array, depth: int, place: Place) -> Array:
        if depth == 0:
            return self.leaf.clean(array, place)
        if array.null_count and not self.spec.null_as_empty:
            remedy = f"{type(self.spec).__name__}(null_as_empty=True)"
            raise null_error(array.null_count, len(array), place, remedy)
        offsets = torch.zeros(len(array) + 1, dtype=torch.int64)
        if array.null_count or pa.types.is_fixed_size_list(array.type):
            lengths = pc.list_value_length(array).fill_null(0)
            torch.cumsum(from_dlpack(lengths), 0, dtype=torch.int64, out=offsets[1:])
        else:
            file_offsets = from_dlpack(array.offsets)
            torch.sub(file_offsets, file_offsets[0], out=offsets)
        values = self._clean(array.flatten(), depth - 1, place)
        return pa.LargeListArray.from_arrays(pa.array(offsets.numpy()), values)


@dataclass(frozen=True)
class ParallelConverter:
    """A struct of a list of ids and a list of weights → RaggedTensor."""

    spec: Weighted
    ids: ListConverter
    weights: ListConverter
    dense: ClassVar[bool] = False

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Converter``."""
        there = replace(place, column=str(self.spec.weights))
        ids, weights = self.ids.clean(array.field(0), place), self.weights.clean(array.field(1), there)
        if not ids.offsets.equals(weights.offsets):
            weight_counts, id_counts = pc.list_value_length(weights), pc.list_value_length(ids)
            row = pc.index(pc.not_equal(weight_counts, id_counts), True).as_py()
            raise ValueError(
                f"{place} has {id_counts[row]} ids but {weight_counts[row]} weights in {self.spec.weights!r} in row "
                f"{row} of these rows; write one weight per id"
            )
        return pa.LargeListArray.from_arrays(ids.offsets, paired(ids.values, weights.values))

    def tensor(self, array: Array) -> RaggedTensor:
        """See ``Converter``."""
        assert isinstance(self.weights.leaf, NumberLeaf)
        return ListConverter(self.spec, PairLeaf(self.ids.leaf, self.weights.leaf.numbers), 1).tensor(array)


@dataclass(frozen=True)
class PreparedConverter:
    """Converter of a less common layout, or of only nulls: casts to a plain type first."""

    plain: Converter
    """Converter of the plain type."""
    target: ArrowType
    """The plain type, with its null types replaced."""

    @property
    def spec(self) -> Column:
        """See ``Converter``."""
        return self.plain.spec

    @property
    def dense(self) -> bool:
        """See ``Converter``."""
        return self.plain.dense

    def clean(self, array: Array, place: Place) -> Array:
        """See ``Converter``."""
        array = plain(array)
        return self.plain.clean(array.cast(self.target) if has_null_type(array.type) else array, place)

    def tensor(self, array: Array) -> torch.Tensor | RaggedTensor:
        """See ``Converter``."""
        return self.plain.tensor(array)


def converter(spec: Column | None, arrow_type: ArrowType, place: Place, like: ArrowType | None = None) -> Converter:
    """Return the converter of a column.

    Args:
        spec: The spec; None for the default spec of the type.
        arrow_type: Type of the column in the files; for a ``Weighted`` of two columns a struct of both.
        place: The column and a file, for messages.
        like: Type that replaces null types; None derives it from the spec.

    Raises:
        TypeError: The spec cannot read a column of that type.
        ValueError: The default does not fit the dtype of the column.
    """
    if spec is not None and not isinstance(spec, Column):
        raise TypeError(f"{place} needs a Dense, Ragged, Text or Weighted as its spec, got {spec!r}")
    target = plain_type(arrow_type)
    if has_null_type(target):
        target = with_types(target, spec, place) if like is None or has_null_type(like) else plain_type(like)
    if target != arrow_type:
        return PreparedConverter(converter(spec, target, place), target)
    depth, inner = _unnested(arrow_type)
    if spec is None:
        spec = _default_spec(arrow_type, depth, inner)
    result: Converter | None = None
    if isinstance(spec, Text) and is_text(inner):
        remedy = 'Text(default="")'
        result = ListConverter(spec, TextLeaf(spec.default, remedy), depth)
    elif isinstance(spec, Ragged) and depth and _reads(spec, inner):
        values = _numbers(spec, inner, place, "Ragged(default=0)")
        result = ListConverter(replace(spec, dtype=values.dtype), NumberLeaf(values), depth)
    elif isinstance(spec, Dense) and depth == (spec.length is not None) and _reads(spec, inner):
        length = "" if spec.length is None else f"length={spec.length}, "
        values = _numbers(spec, inner, place, f"Dense({length}default=0)")
        spec = replace(spec, dtype=values.dtype)
        result = DenseConverter(spec, values) if spec.length is None else FixedConverter(spec, values, spec.length)
    elif isinstance(spec, Weighted):
        result = _weighted(spec, depth, inner, place)
    if result is None:
        problem = f"{spec} cannot read" if spec is not None else "cannot become a tensor"
        raise TypeError(f"{place} is {arrow_type}, which {problem}; {_remedy(depth, inner, place.column)}")
    return result


def _reads(spec: Dense | Ragged, inner: ArrowType) -> bool:
    if inner == TOO_LARGE and spec.dtype is None:
        return False
    return is_number(inner) or (is_text(inner) and (spec.unit is not None or spec.format is not None))


def _numbers(spec: Dense | Ragged, inner: ArrowType, place: Place, remedy: str) -> Numbers:
    return numbers(
        spec.dtype,
        spec.default,
        inner,
        place,
        remedy,
        unit=spec.unit,
        format=spec.format,
        scale=spec.scale,
    )


def _weighted(spec: Weighted, depth: int, inner: ArrowType, place: Place) -> Converter | None:
    weights = numbers(torch.float32, spec.default_weight, pa.float32(), place, "Weighted(default_weight=1)")
    if spec.weights is None and depth == 1 and is_text(inner):
        ids = numbers(spec.dtype, spec.default, pa.int64(), place, "Weighted(default=0)")
        return ListConverter(replace(spec, dtype=ids.dtype), PairTextLeaf(ids, weights, spec.separator), 1)
    if not (pa.types.is_struct(inner) and inner.num_fields == 2 and depth == (spec.weights is None)):
        return None
    fields = (0, 1) if spec.weights is not None else _id_and_weight(inner, place)
    first, second = (inner.field(field).type for field in fields)
    if spec.weights is not None:
        (one, first), (other, second) = _unnested(first), _unnested(second)
        if (one, other) != (1, 1):
            return None
    if not (is_number(second) and (is_number(first) or is_text(first))):
        return None
    leaf: Leaf = TextLeaf(None, "ids without nulls")
    if is_number(first):
        ids = numbers(spec.dtype, spec.default, first, place, "Weighted(default=0)")
        spec, leaf = replace(spec, dtype=ids.dtype), NumberLeaf(ids)
    if spec.weights is None:
        return ListConverter(spec, PairLeaf(leaf, weights, fields), 1)
    return ParallelConverter(spec, ListConverter(spec, leaf, 1), ListConverter(spec, NumberLeaf(weights), 1))


def _id_and_weight(struct: ArrowType, place: Place) -> tuple[int, int]:
    """Return the positions of the id and the weight in a struct of two fields: by name, else by type."""
    names = [field.name for field in struct]
    ids = {number for number in (0, 1) if names[number] == "id" or names[1 - number] == "weight"}
    if names == ["key", "value"]:
        # A map, or a struct like its entries.
        ids = {0}
    elif not set(names) & {"id", "weight"}:
        # Floats cannot be ids, and strings cannot be weights.
        kinds = ["weight" if pa.types.is_floating(field.type) else "id" * is_text(field.type) for field in struct]
        ids = {number for number in (0, 1) if kinds[number] != "weight" and kinds[1 - number] != "id" and any(kinds)}
    if len(ids) != 1:
        raise TypeError(
            f"{place} is a list of {struct}, and neither names nor types of the fields distinguish id and weight; name "
            f"them id and weight, or write two list columns and read them with Weighted(weights=<the other column>)"
        )
    number = ids.pop()
    return number, 1 - number


def _remedy(depth: int, inner: ArrowType, column: str) -> str:
    if inner == TOO_LARGE:
        return (
            "write it as integers, floats or strings; read integers of text files that exceed 64 bits with "
            "Dense(torch.float64)"
        )
    if is_temporal(inner):
        lists = "Ragged" if depth else "Dense"
        return f'read dates, timestamps, times and durations with {lists}(unit="s"), as int64 in that unit'
    if pa.types.is_decimal(inner):
        lists = "Ragged" if depth else "Dense"
        return f"read decimals with {lists}(torch.float64), or as integers with {lists}(scale={inner.scale})"
    if is_number(inner) and depth == 0:
        return "read numbers with Dense()"
    if is_number(inner):
        return "read lists of numbers with Ragged(), or with Dense(length=...) if all have the same length"
    if is_text(inner):
        return (
            'read strings and lists of strings with Text(), lists of "id:weight" with Weighted(), and strings that are '
            'dates or times with Dense(unit="s"), and format= if they are not in ISO 8601'
        )
    if pa.types.is_struct(inner):
        names = [f"{column}.{field.name}" for field in inner]
        return (
            f"read lists of structs of an id and a weight with Weighted(), and fields of other structs as columns "
            f"named {a_few(names)}"
        )
    return "write it as numbers, strings or lists of these"


def _unnested(arrow_type: ArrowType) -> tuple[int, ArrowType]:
    """Return the depth of nested lists, and the type of the innermost values."""
    depth = 0
    while is_list(arrow_type):
        arrow_type, depth = arrow_type.value_type, depth + 1
    return depth, arrow_type


def _default_spec(arrow_type: ArrowType, depth: int, inner: ArrowType) -> Column | None:
    if is_text(inner):
        return Text()
    if depth and is_number(inner):
        fixed = depth == 1 and pa.types.is_fixed_size_list(arrow_type)
        return Dense(length=arrow_type.list_size) if fixed else Ragged()
    if depth == 1 and pa.types.is_struct(inner) and inner.num_fields == 2:
        return Weighted()
    return Dense() if is_number(inner) and inner != TOO_LARGE else None
