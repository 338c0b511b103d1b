"""Operations that change the lengths of rows: Truncate, Pad, FillNull (for empty rows) and ToDense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from recis_hybrid.features.common import fits, movable, one, word
from recis_hybrid.features.op import Column, Form, Job
from recis_hybrid.features.ops.numbers import FillNan
from recis_hybrid.features.ops.shaping import LabeledCall, ShapingOp, count_fault, exact_on, level_fault
from recis_hybrid.ops.ragged import DROP_FIRST, FIXED, NO_BOUND, PAD_FIRST, STRICT

SIDES = ("left", "right")


class ResizeCall(LabeledCall):
    """All resizing operations of a stage in one native call, and one more if rows hold lists.

    For rows of lists, the indices of the lists are resized as if they were values; the second call copies the lists.
    """

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        super().__init__(jobs, parallel=parallel)
        self._inner = [job.forms[0].levels == 2 and job.op.level == 1 for job in jobs]
        self._list_labels = "\n".join(job.label for job, inner in zip(jobs, self._inner, strict=True) if inner)
        self._dense = [bool(job.op.flags & FIXED) for job in jobs]
        self._weighted = [job.forms[0].weighted for job in jobs]
        # Weights of lists of strings belong to the strings, not to their bytes: they are resized along with the lists
        # of rows, and unchanged if the strings are resized.
        of_lists = [job.forms[0].weighted and job.forms[0].strings and job.forms[0].levels == 2 for job in jobs]
        self._weights_resized = [
            weighted and lists == inner
            for weighted, lists, inner in zip(self._weighted, of_lists, self._inner, strict=True)
        ]
        self._list_weights = [
            weighted and inner and not lists
            for weighted, lists, inner in zip(self._weighted, of_lists, self._inner, strict=True)
        ]
        self._least = [job.op.least for job in jobs]
        self._most = [job.op.most for job in jobs]
        self._flags = [job.op.flags for job in jobs]
        self._owner: list[int] = []
        self._fills: list[int] = []
        self._list_owner: list[int] = []
        inner_count = 0
        for k, (job, inner) in enumerate(zip(jobs, self._inner, strict=True)):
            self._owner.append(k)
            self._fills.append(-1 if inner else word(job.op.value, job.forms[0].dtype))
            if self._weights_resized[k]:
                self._owner.append(k)
                self._fills.append(word(job.op.weight, torch.float32))
            if inner:
                self._list_owner += [inner_count] * (2 if self._list_weights[k] else 1)
                inner_count += 1

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job."""
        offsets, planes = [], []
        for (column,), inner, resized in zip(columns, self._inner, self._weights_resized, strict=True):
            assert column.offsets is not None
            if inner:
                offsets.append(column.outer[0].contiguous())
                planes.append(torch.arange(column.offsets.shape[0] - 1, device=column.values.device))
            else:
                offsets.append(column.offsets.contiguous())
                planes.append(column.values.contiguous())
            if resized:
                assert column.weights is not None
                planes.append(column.weights.contiguous())
        exact = exact_on(offsets[0].device)
        outputs = torch.ops.recis.ragged_resize(
            offsets,
            planes,
            self._owner,
            self._least,
            self._most,
            self._flags,
            self._fills,
            self._labels,
            exact,
            self._parallel,
        )
        results, at = [], len(columns)
        for k, (column,) in enumerate(columns):
            values, at = outputs[at], at + 1
            weights = column.weights
            if self._weights_resized[k]:
                weights, at = outputs[at], at + 1
            if self._inner[k]:
                numbers = values if exact else _no_list_in_tail(values, outputs[k])
                results.append(Column(numbers, None, weights, (outputs[k],)))
            elif self._dense[k]:
                results.append(Column(values))
            else:
                results.append(Column(values, outputs[k], weights, column.outer))
        return self._take(columns, results, exact) if self._list_owner else results

    def _take(self, columns: Sequence[tuple[Column, ...]], results: list[Column], exact: bool) -> list[Column]:
        """Replace the indices of lists in the results with the lists."""
        which = [k for k, inner in enumerate(self._inner) if inner]
        offsets, planes = [], []
        for k in which:
            column = columns[k][0]
            assert column.offsets is not None
            offsets.append(column.offsets.contiguous())
            planes.append(column.values.contiguous())
            if self._list_weights[k]:
                assert column.weights is not None
                planes.append(column.weights.contiguous())
        # Each list is copied at most once, so the number of values cannot grow.
        bounds = [] if exact else [columns[k][0].values.shape[0] for k in which]
        outputs = torch.ops.recis.ragged_take(
            offsets,
            [results[k].values for k in which],
            planes,
            self._list_owner,
            bounds,
            self._list_labels,
            exact,
            self._parallel,
        )
        at = len(which)
        for number, k in enumerate(which):
            values, at = outputs[at], at + 1
            weights = results[k].weights
            if self._list_weights[k]:
                weights, at = outputs[at], at + 1
            results[k] = Column(values, outputs[number], weights, results[k].outer)
        return results


def _no_list_in_tail(numbers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return indices of lists with -1 (no list) instead of the zeros beyond the last offset."""
    places = torch.arange(numbers.shape[0], device=numbers.device)
    return torch.where(places < offsets[-1], numbers, -1)


def _side_fault(side: Any) -> str | None:
    return None if side in SIDES else f"side must be one of {list(SIDES)}, got {side!r}"


def _ragged(where: str, form: Form, level: int = -1) -> Form:
    movable(where, form)
    if form.levels == 0:
        raise TypeError(f"{where} takes ragged columns, got a dense one; its rows already have equal lengths")
    if form.levels > 2:
        remedy = "put a Hash before it" if form.strings else "read the column with fewer levels"
        raise TypeError(f"{where} takes rows of values or of lists, got {form.levels} levels of lists; {remedy}")
    if level > form.levels:
        raise TypeError(f"{where}: level must be 1 to {form.levels} for this column, got {level}")
    return form


def _value_fault(where: str, value: float, form: Form) -> None:
    if not fits(value, form.dtype):
        raise TypeError(f"{where}: a column of {form.dtype} cannot hold the value {value!r}")


@dataclass(frozen=True)
class Truncate(ShapingOp):
    """Rows → rows of at most ``length`` values, with their weights.

    Args:
        length: Maximum number of values in a row.
        side: Side on which long rows are truncated: ``"right"`` keeps the first values, ``"left"`` the last.
        level: Level of the lists: 1 truncates rows (of values or lists), 2 truncates the lists in rows.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([Feature("clicks", ops=[Truncate(2, side="left")])])
        >>> engine({"clicks": RaggedTensor.from_lists([[1, 2, 3], [4]])})["clicks"].to_lists()
        [[2, 3], [4]]
    """

    length: int
    side: str = "right"
    level: int = 1
    kind: ClassVar[type[ResizeCall]] = ResizeCall
    least: ClassVar[int] = 0
    value: ClassVar[float] = 0
    weight: ClassVar[float] = 0

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        return count_fault("length", self.length, least=0) or _side_fault(self.side) or level_fault(self.level)

    @property
    def most(self) -> int:
        """The maximum length of a row."""
        return self.length

    @property
    def flags(self) -> int:
        """The flags for native code."""
        return DROP_FIRST if self.side == "left" else 0

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return an equal form, but another object, since rows change."""
        return Form(*_ragged("Truncate", one(forms), self.level))

    def __str__(self) -> str:
        level = "" if self.level == 1 else f", level {self.level}"
        return f"truncate[{self.length}, {self.side}{level}]"


@dataclass(frozen=True)
class Pad(ShapingOp):
    """Rows → rows of at least ``length`` values.

    Args:
        length: The minimum length of a row.
        value: Padding value, with weight 0 if there are weights. Rows of lists are padded with empty lists.
        side: ``"right"`` pads after the values, ``"left"`` before them.
        level: Level of the lists: 1 pads rows, 2 pads the lists in rows.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([Feature("clicks", ops=[Pad(2, value=-1)])])
        >>> engine({"clicks": RaggedTensor.from_lists([[1, 2, 3], [4]])})["clicks"].to_lists()
        [[1, 2, 3], [4, -1]]
    """

    length: int
    value: float = 0
    side: str = "right"
    level: int = 1
    kind: ClassVar[type[ResizeCall]] = ResizeCall
    most: ClassVar[int] = NO_BOUND
    weight: ClassVar[float] = 0

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        return (
            count_fault("length", self.length, least=0)
            or _side_fault(self.side)
            or FillNan(self.value).fault()
            or level_fault(self.level)
        )

    @property
    def least(self) -> int:
        """The minimum length of a row."""
        return self.length

    @property
    def flags(self) -> int:
        """The flags for native code."""
        return PAD_FIRST if self.side == "left" else 0

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return an equal form, but another object, since rows change."""
        form = _ragged("Pad", one(forms), self.level)
        if form.levels == self.level:
            _value_fault("Pad", self.value, form)
        return Form(*form)

    def __str__(self) -> str:
        level = "" if self.level == 1 else f", level {self.level}"
        return f"pad[{self.length}, {self.value:g}, {self.side}{level}]"


@dataclass(frozen=True)
class FillEmpty(ShapingOp):
    """Rows → rows of at least one value: the part of :class:`FillNull` that changes rows.

    Dense columns are unchanged.

    Args:
        value: Value of an empty row, with weight 1.
    """

    value: float
    kind: ClassVar[type[ResizeCall]] = ResizeCall
    least: ClassVar[int] = 1
    most: ClassVar[int] = NO_BOUND
    weight: ClassVar[float] = 1
    level: ClassVar[int] = 1
    flags: ClassVar[int] = 0

    def fault(self) -> str | None:
        """Return what is wrong with the value, or None."""
        return FillNan(self.value).fault()

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the form; the same object for a dense column."""
        form = one(forms)
        if form.levels == 0:
            return form
        if form.levels > 1:
            raise TypeError("FillNull takes rows of values, got rows of lists; use Pad(1, level=1) or Pad(1, level=2)")
        movable("FillNull", form)
        _value_fault("FillNull", self.value, form)
        return Form(*form)

    def __str__(self) -> str:
        return f"fill_empty[{self.value:g}]"


@dataclass(frozen=True)
class FillNull:
    """Columns with nulls → columns without: NaN, and empty rows of a ragged column, become ``value``.

    Args:
        value: Replacement; in an empty row it has weight 1.

    Example:
        >>> engine = FeatureEngine([Feature("price", ops=[FillNull(0.5)])])
        >>> engine({"price": torch.tensor([1.0, float("nan")])})
        {'price': tensor([1.0000, 0.5000])}
    """

    value: float

    def fault(self) -> str | None:
        """Return what is wrong with the value, or None."""
        return FillNan(self.value).fault()

    def expand(self) -> Sequence[Sequence[Any]]:
        """Return the operations that it consists of."""
        return [[FillNan(self.value), FillEmpty(self.value)]]

    def __str__(self) -> str:
        return f"fill_null[{self.value:g}]"


@dataclass(frozen=True)
class ToDense(ShapingOp):
    """Rows → a dense tensor ``[B, length, ...]``, padded with a value.

    A longer row is refused on the CPU; put a :class:`Truncate` before it.

    Args:
        length: Number of values of each row.
        value: Padding value.
        side: ``"right"`` pads after the values, ``"left"`` before them.

    Example:
        >>> from recis_hybrid.ragged import RaggedTensor
        >>> engine = FeatureEngine([Feature("clicks", ops=[ToDense(2)])])
        >>> engine({"clicks": RaggedTensor.from_lists([[1, 2], [4], []])})
        {'clicks': tensor([[1, 2],
                [4, 0],
                [0, 0]])}
    """

    length: int
    value: float = 0
    side: str = "right"
    kind: ClassVar[type[ResizeCall]] = ResizeCall
    weight: ClassVar[float] = 0
    level: ClassVar[int] = 1

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        return count_fault("length", self.length, least=1) or _side_fault(self.side) or FillNan(self.value).fault()

    @property
    def least(self) -> int:
        """The length of a row."""
        return self.length

    @property
    def most(self) -> int:
        """The length of a row."""
        return self.length

    @property
    def flags(self) -> int:
        """The flags for native code."""
        return FIXED | STRICT | (PAD_FIRST if self.side == "left" else 0)

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the dense form."""
        form = _ragged("ToDense", one(forms))
        if form.levels > 1:
            raise TypeError("ToDense takes rows of values, got rows of lists; read the column with one level")
        if form.weighted:
            raise TypeError("ToDense would drop the weights of the column; read it without weights")
        _value_fault("ToDense", self.value, form)
        return form._replace(levels=0, dims=form.dims + 1)

    def __str__(self) -> str:
        return f"to_dense[{self.length}, {self.value:g}, {self.side}]"
