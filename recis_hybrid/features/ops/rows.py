"""Operations on rows of values: TopK, Distinct, Length, OneHot, MultiHot and Tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from recis_hybrid.features.common import ids_of, integers, movable, one
from recis_hybrid.features.op import Column, Form, Job
from recis_hybrid.features.ops.shaping import (
    LabeledCall,
    ShapingOp,
    TensorList,
    count_fault,
    exact_on,
    level_fault,
    unpack,
)
from recis_hybrid.features.ops.vocabulary import Mask, as_tuple


class TopKCall(LabeledCall):
    """All :class:`TopK` of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        super().__init__(jobs, parallel=parallel)
        self._most = [job.op.k for job in jobs]

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        values, offsets, weights = [], [], []
        for (column,) in columns:
            assert column.offsets is not None
            assert column.weights is not None
            values.append(column.values.contiguous())
            offsets.append(column.offsets.contiguous())
            weights.append(column.weights.contiguous())
        exact = exact_on(values[0].device)
        outputs = torch.ops.recis.ragged_topk(values, offsets, weights, self._most, self._labels, exact, self._parallel)
        return unpack(outputs, [True] * len(columns), [True] * len(columns))


@dataclass(frozen=True)
class TopK(ShapingOp):
    """Rows of weighted values → the k values with the greatest weights of each row, in descending order.

    Equal weights keep the order of the row. A NaN weight is refused. The run time is quadratic in the length of a row.

    Args:
        k: Maximum number of values in a row.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([Feature("tags", ops=[TopK(2)])])
        >>> tags = RaggedTensor.from_lists([[1, 2, 3]], weights=[[0.5, 0.1, 0.9]])
        >>> engine({"tags": tags})["tags"].to_lists()
        [[3, 1]]
    """

    k: int
    kind: ClassVar[type[TopKCall]] = TopKCall

    def fault(self) -> str | None:
        """Return what is wrong with k, or None."""
        return count_fault("k", self.k)

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return an equal form, but another object, since rows change."""
        form = one(forms)
        if form.levels != 1 or not form.weighted or form.dims != 1:
            raise TypeError(
                "TopK takes rows of weighted values, a RaggedTensor of one level with weights; read the column with "
                "weights"
            )
        return Form(*movable("TopK", form))

    def __str__(self) -> str:
        return f"top_k[{self.k}]"


class DistinctCall(LabeledCall):
    """All :class:`Distinct` of a stage in one native call."""

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        ids, offsets = [], []
        weights = TensorList()
        for (column,) in columns:
            assert column.offsets is not None
            ids.append(ids_of(column).contiguous())
            offsets.append(column.offsets.contiguous())
            weights.add(column.weights)
        outputs = torch.ops.recis.ragged_distinct(
            ids, offsets, weights.list, weights.index, self._labels, exact_on(ids[0].device), self._parallel
        )
        return unpack(outputs, [True] * len(columns), [number >= 0 for number in weights.index])


@dataclass(frozen=True)
class Distinct(ShapingOp):
    """Rows of ids → rows of distinct ids: the first occurrence of each, in order, with its weight.

    A dense column ``[B]`` is unchanged. The run time is quadratic in the length of a row.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([Feature("tags", ops=[Distinct()])])
        >>> engine({"tags": RaggedTensor.from_lists([[3, 1, 3, 3], [], [1]])})["tags"].to_lists()
        [[3, 1], [], [1]]
    """

    kind: ClassVar[type[DistinctCall]] = DistinctCall

    def fault(self) -> str | None:
        """Return None: there are no parameters."""
        return None

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the same form."""
        form = one(forms)
        ids = integers("Distinct", form)
        if form.levels > 1 or form.dims != 1:
            raise TypeError(
                f"Distinct takes one id for each row ([B]) or rows of ids, got {form.levels} levels of lists of values "
                f"of {form.dims} dimensions; convert ids [B, L] to rows with RaggedTensor.from_padded"
            )
        return form if form.levels == 0 else Form(*ids)

    def __str__(self) -> str:
        return "distinct"


class LengthsCall:
    """The lengths of lists, as differences of offsets."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        self._levels = [job.op.level for job in jobs]

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        outputs = []
        for (column,), level in zip(columns, self._levels, strict=True):
            assert column.offsets is not None
            levels = (*column.outer, column.offsets)
            lengths = levels[level - 1].diff()
            outputs.append(
                Column(lengths) if level == 1 else Column(lengths, levels[level - 2], None, levels[: level - 2])
            )
        return outputs


@dataclass(frozen=True)
class ListLengths(ShapingOp):
    """Lists → their lengths: the part of :class:`Length` that reads only offsets.

    Args:
        level: Level of the lists.
    """

    level: int
    kind: ClassVar[type[LengthsCall]] = LengthsCall

    def fault(self) -> str | None:
        """Return None: :class:`Length` checks the level."""
        return None

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the form of the lengths."""
        form = one(forms)
        if form.levels == 0:
            raise TypeError("Length takes ragged columns, got a dense one; pass its padding value as ignore=")
        if self.level > form.levels:
            raise TypeError(f"Length: level must be 1 to {form.levels} for this column, got {self.level}")
        return Form(torch.int64, self.level - 1, False, 1, form.device)

    def __str__(self) -> str:
        return f"list_lengths[{self.level}]"


class OnesCall:
    """The number of nonzero values of a mask in each list."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None: ...

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        outputs = []
        for (column,) in columns:
            ones = (column.values != 0).long()
            if column.offsets is None:
                outputs.append(Column(ones.sum(1)))
                continue
            sums = torch.cat([ones.new_zeros(1), ones.cumsum(0)])
            counts = sums[column.offsets].diff()
            outer = column.outer
            outputs.append(Column(counts, outer[-1], None, outer[:-1]) if outer else Column(counts))
        return outputs


@dataclass(frozen=True)
class CountOnes(ShapingOp):
    """Masks → the number of ones in each list: the part of :class:`Length` after :class:`Mask`."""

    kind: ClassVar[type[OnesCall]] = OnesCall

    def fault(self) -> str | None:
        """Return None: there are no parameters."""
        return None

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the form of the counts."""
        form = one(forms)
        if form.levels + form.dims < 2 or (form.levels and form.dims != 1) or form.dims > 2:
            raise TypeError(
                f"Length takes rows of values or strings, or dense [B, L], got {form.levels} levels of lists of values "
                f"of {form.dims} dimensions"
            )
        return Form(torch.int64, max(form.levels - 1, 0), False, 1, form.device)

    def __str__(self) -> str:
        return "count_ones"


@dataclass(frozen=True)
class Length:
    """Rows → their lengths, int64 ``[B]``: the number of values, of lists, or of bytes of a string.

    With ``ignore``, the listed values (or strings) are not counted. This yields the length of padded rows without their
    padding, also for a dense column ``[B, L]``.

    Args:
        level: Level of the lists: 1 for rows, 2 for the lists in rows, whose lengths stay in rows. With ``ignore`` the
            innermost lists are counted.
        ignore: Numbers or strings that are not counted.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([
        ...     Feature("clicks", ops=[Length()], source="items"),
        ...     Feature("real", ops=[Length(ignore=[0])], source="items"),
        ... ])
        >>> engine({"items": RaggedTensor.from_lists([[7, 0, 8], [], [0]])})
        {'clicks': tensor([3, 0, 1]), 'real': tensor([2, 0, 0])}
    """

    level: int = 1
    ignore: Sequence[int | float | str | bytes] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", as_tuple(self.ignore))

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        return level_fault(self.level) or (Mask(self.ignore).fault() if self.ignore != () else None)

    def expand(self) -> Sequence[Sequence[Any]]:
        """Return the operations that it consists of."""
        return [[ListLengths(self.level)] if self.ignore == () else [Mask(self.ignore), CountOnes()]]

    def __str__(self) -> str:
        return f"length[{self.level}]"


class MultiHotCall(LabeledCall):
    """All :class:`MultiHot` of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        super().__init__(jobs, parallel=parallel)
        self._classes = [job.op.classes for job in jobs]

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        tensors = TensorList()
        for (column,) in columns:
            tensors.add(ids_of(column), column.offsets, column.weights)
        outputs = torch.ops.recis.multi_hot(tensors.list, tensors.index, self._classes, self._labels, self._parallel)
        return [Column(values) for values in outputs]


@dataclass(frozen=True)
class MultiHot(ShapingOp):
    """Rows of ids → float32 ``[B, classes]``: the number of occurrences of each id in a row, or the sum of its weights.

    An id outside ``[0, classes)`` is refused on the CPU; put a :class:`Mod` or a :class:`Vocabulary` before it.

    Args:
        classes: Number of distinct ids.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([Feature("tags", ops=[MultiHot(3)])])
        >>> engine({"tags": RaggedTensor.from_lists([[0, 2], [1, 1]])})
        {'tags': tensor([[1., 0., 1.],
                [0., 2., 0.]])}
    """

    classes: int
    kind: ClassVar[type[MultiHotCall]] = MultiHotCall

    def fault(self) -> str | None:
        """Return what is wrong with the number of classes, or None."""
        return count_fault("classes", self.classes)

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the dense form."""
        form = integers(type(self).__name__, one(forms))
        if form.levels > 1 or form.dims > (2 if form.levels == 0 else 1):
            raise TypeError(
                f"{type(self).__name__} takes [B], [B, L] and rows of ids, got {form.levels} levels of lists of "
                f"values of {form.dims} dimensions"
            )
        return Form(torch.float32, 0, False, 2, form.device)

    def __str__(self) -> str:
        return f"multi_hot[{self.classes}]"


@dataclass(frozen=True)
class OneHot(MultiHot):
    """Ids ``[B]`` → float32 ``[B, classes]``: 1 at the id, 0 elsewhere.

    An id outside ``[0, classes)`` is refused on the CPU.

    Args:
        classes: Number of distinct ids.
    """

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the dense form."""
        form = one(forms)
        if form.levels or form.dims != 1:
            raise TypeError("OneHot takes one id for each row, a dense [B]; MultiHot takes several")
        return super().shape(forms)

    def __str__(self) -> str:
        return f"one_hot[{self.classes}]"


class TileCall(LabeledCall):
    """All :class:`Tile` of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        super().__init__(jobs, parallel=parallel)
        self._times = [job.op.times for job in jobs]
        self._ragged = [job.forms[0].levels > 0 for job in jobs]
        self._weighted = [job.forms[0].weighted for job in jobs]

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        tensors = TensorList()
        for (column,) in columns:
            tensors.add(column.values, column.offsets, column.weights)
        outputs = torch.ops.recis.ragged_tile(tensors.list, tensors.index, self._times, self._labels, self._parallel)
        return unpack(outputs, self._ragged, self._weighted)


@dataclass(frozen=True)
class Tile(ShapingOp):
    """Rows → every row repeated several times, such as a user's row for each of their candidates.

    Args:
        times: Number of repetitions.

    Example:
        >>> engine = FeatureEngine([Feature("user", ops=[Tile(2)])])
        >>> engine({"user": torch.tensor([7, 8])})
        {'user': tensor([7, 7, 8, 8])}
    """

    times: int
    kind: ClassVar[type[TileCall]] = TileCall

    def fault(self) -> str | None:
        """Return what is wrong with the number of repetitions, or None."""
        return count_fault("times", self.times)

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return an equal form, but another object, since rows change."""
        form = one(forms)
        if form.levels > 1:
            remedy = "put a Hash before it" if form.strings else "read the column as rows of values"
            raise TypeError(f"Tile takes dense columns and rows of values, got rows of lists; {remedy}")
        return Form(*movable("Tile", form))

    def __str__(self) -> str:
        return f"tile[{self.times}]"
