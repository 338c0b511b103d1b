"""From Arrow arrays to tensors in two steps, by the spec of a column. Imports pyarrow.

`clean` runs while it is known which file an array came from: it refuses or fills nulls, converts, and brings the array
to one layout, copying only what is not in order already. `tensor` runs on a batch that was cut from clean arrays: it
only looks at the same memory in another way, so that nothing is left that could fail.

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
    ARROW_OF,
    TOO_LARGE,
    Array,
    ArrowType,
    Numbers,
    Place,
    a_few,
    is_number,
    is_text,
    nulls_refused,
    numbers,
)
from recis_hybrid.columnio.convert.spec_types import value_type
from recis_hybrid.columnio.convert.temporal import is_temporal
from recis_hybrid.ragged import RaggedTensor


class Converter(Protocol):
    """What a spec becomes once the column's type in the files is known."""

    @property
    def spec(self) -> Column:
        """The spec, its dtype filled in."""

    @property
    def dense(self) -> bool:
        """Whether it makes one tensor, with a row for each."""

    def clean(self, array: Array, place: Place) -> Array:
        """Return the array in the layout that `tensor` takes, without nulls.

        Raises:
            ValueError: The spec does not allow for what is in it.
        """

    def tensor(self, array: Array) -> torch.Tensor | RaggedTensor:
        """Return a clean array, or a slice of one, as what a batch holds, over the same memory."""


@dataclass(frozen=True)
class DenseConverter:
    """Numbers → [B]."""

    spec: Dense
    numbers: Numbers
    dense: ClassVar[bool] = True

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
    dense: ClassVar[bool] = True

    def clean(self, array: Array, place: Place) -> Array:
        """See `Converter`."""
        # The length of a null is null, and so is its comparison: it counts neither as right nor as wrong.
        lengths = pc.list_value_length(array)
        found = pc.not_equal(lengths, 0)
        missing = len(found) - (pc.sum(found).as_py() or 0)
        wrong = lengths.filter(pc.and_(found, pc.not_equal(lengths, self.length)))
        if len(wrong):
            raise ValueError(
                f"{place} has {len(wrong)} lists whose length is not {self.length} but "
                f"{a_few(sorted(wrong.unique().to_pylist()))}; read it with Ragged(), or write lists of one length"
            )
        if missing and self.numbers.default is None:
            kind = "null" if missing == array.null_count else "null or empty list"
            raise nulls_refused(missing, len(array), place, self.numbers.remedy, kind)
        values = self.numbers.clean(array.flatten(), place)
        if missing:
            rows = torch.full((len(array), self.length), self.numbers.default or 0, dtype=self.numbers.dtype)
            present = from_dlpack(pc.fill_null(found, False).cast(pa.uint8())).bool()
            rows[present] = self.numbers.tensor(values).view(-1, self.length)
            values = self.numbers.array(rows.view(-1))
        return pa.FixedSizeListArray.from_arrays(values, self.length)

    def tensor(self, array: Array) -> torch.Tensor:
        """See `Converter`."""
        return self.numbers.tensor(array.flatten()).view(-1, self.length)


@dataclass(frozen=True)
class ListConverter:
    """Values in lists of lists, as deep as `depth` says → RaggedTensor."""

    spec: Ragged | Text | Weighted
    leaf: Leaf
    depth: int
    dense: ClassVar[bool] = False

    def clean(self, array: Array, place: Place) -> Array:
        """See `Converter`."""
        return self._clean(array, self.depth, place)

    def tensor(self, array: Array) -> RaggedTensor:
        """See `Converter`."""
        levels = []
        for _ in range(self.depth):
            offsets = from_dlpack(array.offsets)
            first, last = int(offsets[0]), int(offsets[-1])
            array = array.values[first:last]
            levels.append(offsets - first if first else offsets)
        values, more, weights = self.leaf.parts(array)
        levels += more
        # What was cleaned is valid, and checking would cost more than the rest.
        return RaggedTensor.unchecked(values, levels[-1], weights, tuple(levels[:-1]))

    def _clean(self, array: Array, depth: int, place: Place) -> Array:
        if depth == 0:
            return self.leaf.clean(array, place)
        if array.null_count and not self.spec.null_as_empty:
            remedy = f"{type(self.spec).__name__}(null_as_empty=True)"
            raise nulls_refused(array.null_count, len(array), place, remedy)
        offsets = torch.zeros(len(array) + 1, dtype=torch.int64)
        if array.null_count or pa.types.is_fixed_size_list(array.type):
            lengths = pc.list_value_length(array).fill_null(0)
            torch.cumsum(from_dlpack(lengths), 0, dtype=torch.int64, out=offsets[1:])
        else:
            own = from_dlpack(array.offsets)
            torch.sub(own, own[0], out=offsets)
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
        """See `Converter`."""
        there = replace(place, column=str(self.spec.weights))
        ids, weights = self.ids.clean(array.field(0), place), self.weights.clean(array.field(1), there)
        if not ids.offsets.equals(weights.offsets):
            found, wanted = pc.list_value_length(weights), pc.list_value_length(ids)
            row = pc.index(pc.not_equal(found, wanted), True).as_py()
            raise ValueError(
                f"{place} has {wanted[row]} ids in a row where its weights {self.spec.weights!r} are {found[row]} "
                f"(the {row + 1}th of these rows); write a weight for each id"
            )
        return pa.LargeListArray.from_arrays(ids.offsets, paired(ids.values, weights.values))

    def tensor(self, array: Array) -> RaggedTensor:
        """See `Converter`."""
        assert isinstance(self.weights.leaf, NumberLeaf)
        return ListConverter(self.spec, PairLeaf(self.ids.leaf, self.weights.leaf.numbers), 1).tensor(array)


@dataclass(frozen=True)
class PreparedConverter:
    """Converter of a rare layout, or of all nulls: casts to a plain type and converts that."""

    plain: Converter
    """Converter of the plain type."""
    target: ArrowType
    """The plain type, with the null type replaced."""

    @property
    def spec(self) -> Column:
        """See `Converter`."""
        return self.plain.spec

    @property
    def dense(self) -> bool:
        """See `Converter`."""
        return self.plain.dense

    def clean(self, array: Array, place: Place) -> Array:
        """See `Converter`."""
        array = plain(array)
        return self.plain.clean(array.cast(self.target) if has_null_type(array.type) else array, place)

    def tensor(self, array: Array) -> torch.Tensor | RaggedTensor:
        """See `Converter`."""
        return self.plain.tensor(array)


def converter(spec: Column | None, arrow_type: ArrowType, place: Place, like: ArrowType | None = None) -> Converter:
    """Find how a column of `arrow_type` is read by `spec`.

    Args:
        spec: How the user wants it; None takes what suits the type.
        arrow_type: The column's type in the files; for a `Weighted` of two columns a struct of both.
        place: The column and a file, for messages.
        like: The type in which to read what is of none, being all null; None takes what the spec says.

    Returns:
        The converter.

    Raises:
        TypeError: A column of that type cannot be read by that spec.
        ValueError: The default is no number of the column's dtype.
    """
    if spec is not None and not isinstance(spec, Column):
        raise TypeError(f"{place} needs a Dense, Ragged, Text or Weighted for its spec, got {spec!r}")
    target = plain_type(arrow_type)
    if has_null_type(target):
        target = _typed(target, spec, place) if like is None or has_null_type(like) else plain_type(like)
    if target != arrow_type:
        return PreparedConverter(converter(spec, target, place), target)
    depth, inner = _opened(arrow_type)
    if spec is None:
        spec = _spec_for(arrow_type, depth, inner)
    made: Converter | None = None
    if isinstance(spec, Text) and is_text(inner):
        remedy = 'Text(default="")'
        made = ListConverter(spec, TextLeaf(spec.default, remedy), depth)
    elif isinstance(spec, Ragged) and depth and _reads(spec, inner):
        found = _numbers(spec, inner, place, "Ragged(default=0)")
        made = ListConverter(replace(spec, dtype=found.dtype), NumberLeaf(found), depth)
    elif isinstance(spec, Dense) and depth == (spec.length is not None) and _reads(spec, inner):
        length = "" if spec.length is None else f"length={spec.length}, "
        found = _numbers(spec, inner, place, f"Dense({length}default=0)")
        spec = replace(spec, dtype=found.dtype)
        made = DenseConverter(spec, found) if spec.length is None else FixedConverter(spec, found, spec.length)
    elif isinstance(spec, Weighted):
        made = _weighted(spec, depth, inner, place)
    if made is None:
        wanted = f"{spec} does not read" if spec is not None else "no tensor is made of"
        raise TypeError(f"{place} is {arrow_type}, which {wanted}; {_remedy(depth, inner, place.column)}")
    return made


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


def _typed(arrow_type: ArrowType, spec: Column | None, place: Place) -> ArrowType:
    """Return a plain type with its null types replaced by the spec's type."""
    inner: ArrowType = None
    nest = False
    if isinstance(spec, Dense | Ragged):
        nest = isinstance(spec, Ragged) or spec.length is not None
        inner = value_type(spec)
        if inner is None and spec.dtype is None and spec.default is not None:
            inner = pa.int64() if isinstance(spec.default, int) else pa.float32()
    elif isinstance(spec, Text):
        inner, nest = pa.string(), spec.null_as_empty
    elif isinstance(spec, Weighted):
        return _typed_pairs(arrow_type, spec)
    if inner is None:
        raise TypeError(
            f"{place} is {arrow_type}: it holds nothing but nulls, and no type; give it one, as in "
            f"Dense(torch.float32, default=0), Ragged(torch.int64, null_as_empty=True) or "
            f'Text(default=""), or leave it out'
        )
    if pa.types.is_null(arrow_type):
        return pa.list_(inner) if nest else inner
    return _filled(arrow_type, inner)


def _typed_pairs(arrow_type: ArrowType, spec: Weighted) -> ArrowType:
    ids = ARROW_OF[spec.dtype or torch.int64]
    if spec.weights is not None:
        own, other = arrow_type.field(0).type, arrow_type.field(1).type
        parts = [
            pa.list_(inner) if pa.types.is_null(each) else _filled(each, inner)
            for each, inner in ((own, ids), (other, pa.float32()))
        ]
        return pa.struct([("id", parts[0]), ("weight", parts[1])])
    pair = pa.struct([("id", ids), ("weight", pa.float32())])
    if pa.types.is_null(arrow_type) or (is_list(arrow_type) and pa.types.is_null(arrow_type.value_type)):
        return pa.list_(pair)
    return _filled(arrow_type, ids)


def _filled(arrow_type: ArrowType, inner: ArrowType) -> ArrowType:
    if pa.types.is_null(arrow_type):
        return inner
    if is_list(arrow_type):
        value = _filled(arrow_type.value_type, inner)
        return pa.large_list(value) if pa.types.is_large_list(arrow_type) else pa.list_(value)
    if pa.types.is_struct(arrow_type):
        return pa.struct([field.with_type(_filled(field.type, inner)) for field in arrow_type])
    return arrow_type


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
        (one, first), (other, second) = _opened(first), _opened(second)
        if (one, other) != (1, 1):
            return None
    if not (is_number(second) and (is_number(first) or is_text(first))):
        return None
    leaf: Leaf = TextLeaf(None, "ids without nulls")
    if is_number(first):
        found = numbers(spec.dtype, spec.default, first, place, "Weighted(default=0)")
        spec, leaf = replace(spec, dtype=found.dtype), NumberLeaf(found)
    if spec.weights is None:
        return ListConverter(spec, PairLeaf(leaf, weights, fields), 1)
    return ParallelConverter(spec, ListConverter(spec, leaf, 1), ListConverter(spec, NumberLeaf(weights), 1))


def _id_and_weight(struct: ArrowType, place: Place) -> tuple[int, int]:
    """Return which field of a struct of two is the id and which the weight: by name, else by type."""
    names = [field.name for field in struct]
    wanted = ("id", "weight")
    ids = {number for number in (0, 1) if names[number] == "id" or names[1 - number] == "weight"}
    if names == ["key", "value"]:
        # A map's, or written by hand like one.
        ids = {0}
    elif not set(names) & set(wanted):
        # Floats are no ids, and strings no weights.
        kinds = ["weight" if pa.types.is_floating(field.type) else "id" * is_text(field.type) for field in struct]
        ids = {number for number in (0, 1) if kinds[number] != "weight" and kinds[1 - number] != "id" and any(kinds)}
    if len(ids) != 1:
        raise TypeError(
            f"{place} is a list of {struct}, of whose fields neither names nor types say which is the id and which the "
            f"weight; name them id and weight, or write two columns of lists and read them by "
            f"Weighted(weights=<the other column>)"
        )
    own = ids.pop()
    return own, 1 - own


def _remedy(depth: int, inner: ArrowType, column: str) -> str:
    if inner == TOO_LARGE:
        return (
            "write it as integers, floats or strings; integers of text files that 64 bits do not hold are read by "
            "Dense(torch.float64)"
        )
    if is_temporal(inner):
        lists = "Ragged" if depth else "Dense"
        return f'dates, timestamps, times and durations are read by {lists}(unit="s"), as int64 in that unit'
    if pa.types.is_decimal(inner):
        lists = "Ragged" if depth else "Dense"
        return f"decimals are read by {lists}(torch.float64), or by {lists}(scale={inner.scale}) as integers"
    if is_number(inner) and depth == 0:
        return "numbers are read by Dense()"
    if is_number(inner):
        return "lists of numbers are read by Ragged(), or by Dense(length=...) if all have one length"
    if is_text(inner):
        return (
            'strings and lists of strings are read by Text(), lists of "id:weight" by Weighted(), and strings that are '
            'dates or times by Dense(unit="s"), with format= if they are not written by ISO 8601'
        )
    if pa.types.is_struct(inner):
        names = [f"{column}.{field.name}" for field in inner]
        return (
            f"structs are read by Weighted() where they are an id and a weight, in lists; their fields are columns of "
            f"their own, by the names {a_few(names)}"
        )
    return "write it as numbers, strings or lists of these"


def _opened(arrow_type: ArrowType) -> tuple[int, ArrowType]:
    """Return how deep lists lie in lists, and the type of what is in them."""
    depth = 0
    while is_list(arrow_type):
        arrow_type, depth = arrow_type.value_type, depth + 1
    return depth, arrow_type


def _spec_for(arrow_type: ArrowType, depth: int, inner: ArrowType) -> Column | None:
    if is_text(inner):
        return Text()
    if depth and is_number(inner):
        fixed = depth == 1 and pa.types.is_fixed_size_list(arrow_type)
        return Dense(length=arrow_type.list_size) if fixed else Ragged()
    if depth == 1 and pa.types.is_struct(inner) and inner.num_fields == 2:
        return Weighted()
    return Dense() if is_number(inner) and inner != TOO_LARGE else None
