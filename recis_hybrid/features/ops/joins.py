"""Operations that join columns: Cross and Concat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.features.common import FLOATS, INTEGERS, ids_of, integers
from recis_hybrid.features.op import Column, Form, Job, Lowered, Step
from recis_hybrid.features.ops.rows import Distinct
from recis_hybrid.features.ops.shaping import LabeledCall, ShapingOp, TensorList, exact_on, unpack
from recis_hybrid.ops.ragged import NO_BOUND


class CrossCall(LabeledCall):
    """All :class:`Cross` of ragged columns of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        super().__init__(jobs, parallel=parallel)
        self._most = [NO_BOUND if job.op.limit is None else job.op.limit for job in jobs]
        self._weighted = [any(form.weighted for form in job.forms) for job in jobs]

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        tensors = TensorList()
        for pair in columns:
            for column in pair:
                tensors.add(ids_of(column), column.offsets, column.weights)
        exact = exact_on(tensors.list[0].device)
        outputs = torch.ops.recis.ragged_cross(
            tensors.list,
            tensors.index,
            self._most,
            [] if exact else self._bounds(columns),
            self._labels,
            exact,
            self._parallel,
        )
        return unpack(outputs, [True] * len(columns), self._weighted)

    def _bounds(self, columns: Sequence[tuple[Column, ...]]) -> list[int]:
        """Return an upper bound of the number of pairs of each job; waits once if a job has no limit."""
        bounds = []
        counted: dict[int, Tensor] = {}
        for k, ((x, y), most) in enumerate(zip(columns, self._most, strict=True)):
            if x.offsets is None or y.offsets is None:
                bounds.append((y if x.offsets is None else x).values.shape[0])
            elif most < NO_BOUND:
                bounds.append((x.offsets.shape[0] - 1) * most)
            else:
                bounds.append(0)
                counted[k] = (_lengths(x) * _lengths(y)).sum()
        if counted:
            for k, pairs in zip(counted, torch.stack(list(counted.values())).tolist(), strict=True):
                bounds[k] = pairs
        return bounds


def _lengths(column: Column) -> Tensor:
    """Return the number of values in each row, which is in their range even if offsets are not valid."""
    assert column.offsets is not None
    return column.offsets.diff().clamp(0, column.values.shape[0])


@dataclass(frozen=True)
class Cross(ShapingOp):
    """Ids of two or more columns → an id for each pair of ids in a row: MurmurHash64A of both, x before y.

    Two dense columns ``[B]`` yield a dense column. Otherwise a row of the result holds all pairs of its values, ordered
    by the value of the first column; a dense column has one value for each row. Weights are multiplied; values without
    weights have weight 1. More than two columns are crossed from the left: the cross of the first two with the third,
    and so on.

    Args:
        limit: Maximum number of pairs in a row; a row with more raises on the CPU. For two ragged columns on a GPU, it
            bounds the size of the result; without it, the host waits for the number of pairs, once for all crosses that
            run together.
        distinct: Whether an id that occurs several times in a row counts once, with the weight of its first occurrence,
            as in RecIS. Equivalent to :class:`Distinct` before the cross.

    Example:
        >>> engine = FeatureEngine([Feature("pair", source=["user", "item"], ops=[Cross()])])
        >>> engine({"user": torch.tensor([1001]), "item": torch.tensor([1])})
        {'pair': tensor([-7808879811642834040])}
    """

    limit: int | None = None
    distinct: bool = False
    joins: ClassVar[bool] = True
    kind: ClassVar[type[CrossCall]] = CrossCall

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        whole = isinstance(self.limit, int) and not isinstance(self.limit, bool)
        if self.limit is not None and not (whole and 1 <= self.limit < 2**31):
            return f"limit must be an int from 1 to {2**31 - 1}, or None, got {self.limit!r}"
        return None if isinstance(self.distinct, bool) else f"distinct must be True or False, got {self.distinct!r}"

    def parts(self) -> tuple[Distinct | None, Cross]:
        """Return the operations on each column before the cross, and the cross without them."""
        return (Distinct(), replace(self, distinct=False)) if self.distinct else (None, self)

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the form of the pairs."""
        for form in forms:
            integers("Cross", form)
            if form.levels > 1 or form.dims != 1:
                raise TypeError(
                    f"Cross takes one id for each row ([B]) or rows of ids, got {form.levels} levels of lists of "
                    f"values of {form.dims} dimensions; reshape them to [B]"
                )
        x, y = forms
        if x.device != y.device:
            raise TypeError(f"Cross takes columns on one device, got {x.device} and {y.device}")
        levels = max(x.levels, y.levels)
        return Form(torch.int64, levels, x.weighted or y.weighted, 1, x.device)

    def lower(self, forms: Sequence[Form]) -> Lowered | None:
        """Return the instruction that crosses dense columns; None if one is ragged."""
        form = self.shape(forms)
        return Lowered(form, (Step("cross"),)) if form.levels == 0 else None

    def kernel(self) -> Callable[..., Column]:
        """Return the kernel, which crosses two columns."""
        ragged = super().kernel()
        first = Distinct().kernel() if self.distinct else None

        def kernel(x: Column, y: Column) -> Column:
            if first is not None:
                x, y = first(x), first(y)
            if self.shape((Form.of(x), Form.of(y))).levels > 0:
                return ragged(x, y)
            if x.values.shape != y.values.shape:
                raise ValueError(
                    f"the columns have {x.values.shape[0]} and {y.values.shape[0]} rows; all columns of a batch must "
                    f"have the same number of rows"
                )
            return Column(ops.transform.cross_ids(ids_of(x), ids_of(y)))

        return kernel

    def __str__(self) -> str:
        return "cross" if self.limit is None else f"cross[{self.limit}]"


class ConcatCall(LabeledCall):
    """All :class:`Concat` of a stage in one native call."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        super().__init__(jobs, parallel=parallel)
        self._counts = [len(job.forms) for job in jobs]
        self._ragged = [any(form.levels for form in job.forms) for job in jobs]
        self._weighted = [any(form.weighted for form in job.forms) for job in jobs]
        self._dtypes = [torch.int64 if job.forms[0].dtype in INTEGERS else job.forms[0].dtype for job in jobs]

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        tensors = TensorList()
        for inputs, count, dtype in zip(columns, self._counts, self._dtypes, strict=True):
            tensors.index.append(count)
            for column in inputs:
                tensors.add(column.values.to(dtype), column.offsets, column.weights)
        outputs = torch.ops.recis.ragged_concat(tensors.list, tensors.index, self._labels, self._parallel)
        return unpack(outputs, self._ragged, self._weighted)


@dataclass(frozen=True)
class Concat(ShapingOp):
    """Two or more columns → one: in each row the values of the first column, then of the second, and so on.

    Dense columns ``[B]`` and ``[B, L]`` become ``[B, sum of L]``; if one column is ragged, so is the result. Integers
    become int64; floats must have the same dtype. If any column has weights, values of the others have weight 1.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([Feature("seen", source=["clicks", "buys"], ops=[Concat()])])
        >>> engine({"clicks": RaggedTensor.from_lists([[1, 2], []]), "buys": torch.tensor([8, 9])})["seen"].to_lists()
        [[1, 2, 8], [9]]
    """

    joins: ClassVar[bool] = True
    kind: ClassVar[type[ConcatCall]] = ConcatCall

    def fault(self) -> str | None:
        """Return None: there are no parameters."""
        return None

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the form of the result."""
        dtypes = {torch.int64 if form.dtype in INTEGERS else form.dtype for form in forms}
        if len(dtypes) > 1 or not dtypes <= {torch.int64, *FLOATS}:
            raise TypeError(
                f"Concat takes columns of integers, or of one float dtype, got {[f.dtype for f in forms]}; "
                "put a Cast or a Hash before it"
            )
        if len({form.device for form in forms}) > 1:
            raise TypeError(f"Concat takes columns on one device, got {[str(form.device) for form in forms]}")
        for form in forms:
            if form.levels > 1 or form.dims > (2 if form.levels == 0 else 1):
                raise TypeError(
                    f"Concat takes [B], [B, L] and rows of values, got {form.levels} levels of lists of values of "
                    f"{form.dims} dimensions; put ToDense or Truncate before it"
                )
        levels = max(form.levels for form in forms)
        weighted = any(form.weighted for form in forms)
        return Form(dtypes.pop(), levels, weighted, 2 if levels == 0 else 1, forms[0].device)

    def __str__(self) -> str:
        return "concat"
