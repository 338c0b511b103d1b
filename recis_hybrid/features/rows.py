"""Operations on rows of values: TopK, OneHot, MultiHot and Tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from recis_hybrid.features.common import ids_of, integers, movable, one, shaping_kernel
from recis_hybrid.features.op import Column, Form, Job
from recis_hybrid.features.tensors import TensorList, exact_on


def _count_fault(name: str, count: object) -> str | None:
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count < 2**31:
        return f"{name} must be an int from 1 to {2**31 - 1}, got {count!r}"
    return None


class TopKCall:
    """All such operations of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        self._labels = "\n".join(job.label for job in jobs)
        self._most = [job.op.k for job in jobs]
        self._parallel = parallel

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Makes a column for each job."""
        values, offsets, weights = [], [], []
        for (column,) in columns:
            assert column.offsets is not None
            assert column.weights is not None
            values.append(column.values.contiguous())
            offsets.append(column.offsets.contiguous())
            weights.append(column.weights.contiguous())
        exact = exact_on(values[0].device)
        made = torch.ops.recis.ragged_topk(values, offsets, weights, self._most, self._labels, exact, self._parallel)
        return [Column(made[3 * k + 1], made[3 * k], made[3 * k + 2]) for k in range(len(columns))]


@dataclass(frozen=True)
class TopK:
    """Rows of weighted values → the k values of the greatest weights of each, the greatest first.

    Of equal weights the first in the row goes first. A weight that is NaN is refused. The time is that of every pair of
    values of a row.

    Args:
        k: The most that a row keeps.

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
        """Returns what is wrong with k, or None."""
        return _count_fault("k", self.k)

    def shape(self, forms: Sequence[Form]) -> Form:
        """Returns the form, unchanged but not the same: rows are."""
        form = one(forms)
        if form.levels != 1 or not form.weighted or form.dims != 1:
            raise TypeError("TopK takes rows of weighted values: a RaggedTensor of one level with weights")
        return Form(*movable("TopK", form))

    def kernel(self) -> Callable[..., Column]:
        """Returns what chooses values."""
        return shaping_kernel(self)

    def __str__(self) -> str:
        return f"top_k[{self.k}]"


class MultiHotCall:
    """All such operations of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        self._labels = "\n".join(job.label for job in jobs)
        self._classes = [job.op.classes for job in jobs]
        self._parallel = parallel

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Makes a column for each job."""
        tensors = TensorList()
        for (column,) in columns:
            tensors.add(ids_of(column), column.offsets, column.weights)
        made = torch.ops.recis.multi_hot(tensors.list, tensors.index, self._classes, self._labels, self._parallel)
        return [Column(values) for values in made]


@dataclass(frozen=True)
class MultiHot:
    """Rows of ids → float32 ``[B, classes]``: how often each id occurs in a row, or the sum of its weights.

    An id outside ``[0, classes)`` is refused on the CPU: put a :class:`Mod` or a :class:`Vocabulary` before it.

    Args:
        classes: The number of different ids.

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
        """Returns what is wrong with the number of classes, or None."""
        return _count_fault("classes", self.classes)

    def shape(self, forms: Sequence[Form]) -> Form:
        """Returns the dense form."""
        form = integers(type(self).__name__, one(forms))
        if form.levels > 1 or form.dims > (2 if form.levels == 0 else 1):
            raise TypeError(
                f"{type(self).__name__} takes [B], [B, L] and rows of ids, got {form.levels} levels of lists of "
                f"values of {form.dims} dimensions"
            )
        return Form(torch.float32, 0, False, 2, form.device)

    def kernel(self) -> Callable[..., Column]:
        """Returns what makes a column of rows of classes."""
        return shaping_kernel(self)

    def __str__(self) -> str:
        return f"multi_hot[{self.classes}]"


@dataclass(frozen=True)
class OneHot(MultiHot):
    """Ids ``[B]`` → float32 ``[B, classes]``: 1 where the id is, 0 elsewhere.

    An id outside ``[0, classes)`` is refused on the CPU.

    Args:
        classes: The number of different ids.
    """

    def shape(self, forms: Sequence[Form]) -> Form:
        """Returns the dense form."""
        form = one(forms)
        if form.levels or form.dims != 1:
            raise TypeError("OneHot takes one id a row, a dense [B]; MultiHot takes several")
        return super().shape(forms)

    def __str__(self) -> str:
        return f"one_hot[{self.classes}]"


class TileCall:
    """All such operations of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        self._labels = "\n".join(job.label for job in jobs)
        self._times = [job.op.times for job in jobs]
        self._ragged = [job.forms[0].levels > 0 for job in jobs]
        self._weighted = [job.forms[0].weighted for job in jobs]
        self._parallel = parallel

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Makes a column for each job."""
        tensors = TensorList()
        for (column,) in columns:
            tensors.add(column.values, column.offsets, column.weights)
        made = torch.ops.recis.ragged_tile(tensors.list, tensors.index, self._times, self._labels, self._parallel)
        results, at = [], 0
        for ragged, weighted in zip(self._ragged, self._weighted, strict=True):
            offsets = made[at] if ragged else None
            at += ragged
            results.append(Column(made[at], offsets, made[at + 1] if weighted else None))
            at += 1 + weighted
        return results


@dataclass(frozen=True)
class Tile:
    """Rows → every row several times in succession, so that one user's row meets each of his candidates.

    Args:
        times: How often.

    Example:
        >>> engine = FeatureEngine([Feature("user", ops=[Tile(2)])])
        >>> engine({"user": torch.tensor([7, 8])})
        {'user': tensor([7, 7, 8, 8])}
    """

    times: int
    kind: ClassVar[type[TileCall]] = TileCall

    def fault(self) -> str | None:
        """Returns what is wrong with the number of times, or None."""
        return _count_fault("times", self.times)

    def shape(self, forms: Sequence[Form]) -> Form:
        """Returns the form, unchanged but not the same: rows are."""
        form = one(forms)
        if form.levels > 1:
            remedy = "put a Hash before it" if form.strings else "join levels where the column is read"
            raise TypeError(f"Tile takes dense columns and rows of values, got rows of lists; {remedy}")
        return Form(*movable("Tile", form))

    def kernel(self) -> Callable[..., Column]:
        """Returns what repeats rows."""
        return shaping_kernel(self)

    def __str__(self) -> str:
        return f"tile[{self.times}]"
