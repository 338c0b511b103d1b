"""Operations on numbers: buckets, maps, casts."""

from __future__ import annotations

import math
import numbers as kinds_of_numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.features.common import FLOATS, INTEGERS, LEAST, MOST, bits, fits, ids_of, numbers, one
from recis_hybrid.features.op import Column, Form, Kernel, Lowered, Step
from recis_hybrid.ops.transform import MapKind


def _number_fault(value: Any) -> str | None:
    """Return what is wrong with a number passed by the user, or None."""
    if not isinstance(value, kinds_of_numbers.Real) or isinstance(value, bool):
        return f"must be a number, got {value!r}"
    return "must be a number, got NaN" if math.isnan(value) else None


@dataclass(frozen=True)
class Bucketize:
    """Numbers → the number of their bucket, int64 from 0 to ``len(boundaries)``.

    The column keeps its shape. The bucket of v is the number of boundaries b with b <= v, or with b < v if ``right`` is
    False (``right`` as in :func:`torch.bucketize`). Integers are compared exactly, even with fractional boundaries. For
    float32 and float64 columns the boundaries are rounded to that dtype first, so that the value 0.7 equals the
    boundary 0.7 in both. NaN is refused; put a :class:`FillNull` before it. On CUDA NaN goes to the last bucket, as in
    torch, and :meth:`FeatureEngine.check` reports it.

    Args:
        boundaries: At least one number, in non-decreasing order. The bucket between equal boundaries is empty.
        right: Whether a value equal to a boundary goes to the bucket above it, as in RecIS.

    Example:
        >>> engine = FeatureEngine([Feature("age", ops=[Bucketize([18, 65])])])
        >>> engine({"age": torch.tensor([17, 18, 70])})
        {'age': tensor([0, 1, 2])}
    """

    boundaries: Sequence[float]
    right: bool = True

    def __post_init__(self) -> None:
        listed = self.boundaries.tolist() if hasattr(self.boundaries, "tolist") else self.boundaries
        # A tuple is hashable and cannot change later.
        object.__setattr__(self, "boundaries", tuple(listed) if isinstance(listed, Iterable) else listed)

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        if not isinstance(self.right, bool):
            return f"right must be True or False, got {self.right!r}"
        if not isinstance(self.boundaries, tuple):
            return f"boundaries must be a list of numbers, got {self.boundaries!r}"
        if not self.boundaries:
            return "boundaries must hold at least one number, got none; without boundaries there is only one bucket"
        for i, boundary in enumerate(self.boundaries):
            if not isinstance(boundary, kinds_of_numbers.Real) or isinstance(boundary, bool):
                return f"boundaries must be numbers, got {boundary!r} at {i}"
            if math.isnan(boundary):
                return f"boundaries must be numbers, got NaN at {i}; drop it, because no value compares with NaN"
        for i, (before, after) in enumerate(zip(self.boundaries, self.boundaries[1:], strict=False)):
            if after < before:
                return f"boundaries must not decrease, got {before} and then {after} at {i + 1}; sort them"
        return None

    def table(self, dtype: torch.dtype) -> Tensor:
        """Return the boundaries in the dtype of values: int64, float32 or float64."""
        listed = _first_above(self) if dtype == torch.int64 else [float(boundary) for boundary in self.boundaries]
        return torch.tensor(listed, dtype=dtype, device="cpu")

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that finds buckets."""
        form = numbers("Bucketize", one(forms))
        dtype = form.dtype if form.dtype in FLOATS else torch.int64
        table = self.table(dtype)
        words = torch.cat([table, table.new_zeros(table.numel() % 2)]) if dtype.itemsize == 4 else table
        name = {torch.int64: "bucket_i64", torch.float32: "bucket_f32", torch.float64: "bucket_f64"}[dtype]
        # Values are compared with the boundaries of _first_above by "at or above".
        right = self.right or dtype == torch.int64
        step = Step(name, (table.numel(), int(right)), words.view(torch.int64))
        return Lowered(form._replace(dtype=torch.int64), (step,))

    def kernel(self) -> Kernel:
        """Return the kernel."""
        tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

        def kernel(column: Column) -> Column:
            form = numbers("Bucketize", Form.of(column))
            values = column.values if form.dtype in FLOATS else ids_of(column)
            key = values.dtype, values.device
            if key not in tables:
                tables[key] = self.table(values.dtype).to(values.device)
            right = self.right or values.dtype == torch.int64
            found = ops.transform.bucketize(values, tables[key], right=right, refuse_nan=True, used=_used(column))
            return column._replace(values=found)

        return kernel

    def __str__(self) -> str:
        return f"bucketize[{len(self.boundaries)} boundaries{'' if self.right else ', right=False'}]"


def _first_above(spec: Bucketize) -> list[int]:
    """Return the smallest int64 above each boundary, or at it if ``right``; boundaries above all int64 are omitted."""
    firsts: list[int] = []
    for boundary in spec.boundaries:
        if boundary == math.inf:
            continue
        if boundary == -math.inf:
            firsts.append(LEAST)
            continue
        first = math.ceil(boundary) if spec.right else math.floor(boundary) + 1
        if first <= MOST:
            firsts.append(max(first, LEAST))
    return firsts


def _used(column: Column) -> Tensor | None:
    """Return offsets whose last element is the number of values in use; None if all are."""
    return None if column.offsets is None else column.offsets.contiguous()


def _mapped(column: Column, where: str, kind: MapKind, first: float, second: float = 0.0) -> Column:
    values = column.values if column.values.dtype in FLOATS else column.values.to(torch.float32)
    first, second = _in_dtype(where, values.dtype, first, second)
    return column._replace(values=ops.transform.map_values(values, kind, first, second, used=_used(column)))


def _map_kernel(where: str, kind: MapKind, first: float, second: float = 0.0) -> Kernel:
    """Return the kernel of a map of numbers; integers become float32 first."""

    def kernel(column: Column) -> Column:
        numbers(where, Form.of(column))
        return _mapped(column, where, kind, first, second)

    return kernel


def _map_steps(where: str, kind: str, form: Form, *parameters: float) -> Lowered:
    """Return the instructions of a map of floats; integers become float32 first."""
    numbers(where, form)
    dtype = form.dtype if form.dtype in FLOATS else torch.float32
    parameters = _in_dtype(where, dtype, *parameters)
    steps = () if form.dtype in FLOATS else (Step("i64_to_f32"),)
    name = f"{kind}_{'f32' if dtype == torch.float32 else 'f64'}"
    return Lowered(form._replace(dtype=dtype), (*steps, Step(name, tuple(bits(number) for number in parameters))))


def _in_dtype(where: str, dtype: torch.dtype, *parameters: float) -> tuple[float, ...]:
    """Return parameters that the dtype of a column can hold: bounds of Clip are clamped, others are checked.

    Raises:
        TypeError: If a parameter would become infinite, or a divisor 0.
    """
    most = torch.finfo(dtype).max
    if where == "Clip":
        return tuple(one if math.isinf(one) else min(max(one, -most), most) for one in parameters)
    for number in parameters:
        representable = fits(number, dtype)
        if representable and where == "Normalize" and dtype == torch.float32 and number != 0:
            representable = np.float32(number) != 0
        if not representable:
            raise TypeError(
                f"{where}: a column of {dtype} cannot hold the value {number!r}; put Cast(torch.float64) before it"
            )
    return parameters


@dataclass(frozen=True)
class Log:
    """Numbers → the natural logarithm of ``x + plus``.

    The column keeps its shape; integers become float32 first. The sum must be positive.

    Args:
        plus: Number to add to x; 1 allows counts of 0.
    """

    plus: float = 0.0

    def fault(self) -> str | None:
        """Return what is wrong with ``plus``, or None."""
        fault = _number_fault(self.plus)
        return None if fault is None else f"plus {fault}"

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that takes logarithms."""
        return _map_steps("Log", "log", one(forms), self.plus)

    def kernel(self) -> Kernel:
        """Return the kernel."""
        return _map_kernel("Log", "log", self.plus)

    def __str__(self) -> str:
        return f"log[x + {self.plus:g}]" if self.plus else "log"


@dataclass(frozen=True)
class Clip:
    """Numbers → numbers clipped to ``[least, most]``.

    The column keeps its shape. Floats keep their dtype; integers become int64 and require integer bounds.

    Args:
        least: Lower bound.
        most: Upper bound.
    """

    least: float
    most: float

    def fault(self) -> str | None:
        """Return what is wrong with the bounds, or None."""
        for name, bound in (("least", self.least), ("most", self.most)):
            fault = _number_fault(bound)
            if fault is not None:
                return f"{name} {fault}"
        if self.least > self.most:
            return f"least must not be above most, got {self.least} and {self.most}; swap them"
        return None

    def whole(self) -> tuple[int, int]:
        """Return the bounds for integers.

        Raises:
            TypeError: If a bound is not an integer.
        """
        for bound in (self.least, self.most):
            if not math.isinf(bound) and bound != int(bound):
                raise TypeError(
                    f"Clip of integers requires integer bounds, got {bound}; put Cast(torch.float32) before it"
                )
        least = LEAST if self.least == -math.inf else min(max(int(self.least), LEAST), MOST)
        most = MOST if self.most == math.inf else min(max(int(self.most), LEAST), MOST)
        return least, most

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that clips."""
        form = numbers("Clip", one(forms))
        if form.dtype in FLOATS:
            return _map_steps("Clip", "clip", form, self.least, self.most)
        return Lowered(form._replace(dtype=torch.int64), (Step("clip_i64", self.whole()),))

    def kernel(self) -> Kernel:
        """Return the kernel."""

        def kernel(column: Column) -> Column:
            if numbers("Clip", Form.of(column)).dtype in FLOATS:
                return _mapped(column, "Clip", "clip", self.least, self.most)
            return column._replace(values=ops.transform.clip_ids(ids_of(column), *self.whole()))

        return kernel

    def __str__(self) -> str:
        return f"clip[{self.least:g} to {self.most:g}]"


@dataclass(frozen=True)
class Normalize:
    """Numbers → ``(x - mean) / std``.

    The column keeps its shape; integers become float32 first.

    Args:
        mean: Number to subtract.
        std: Divisor, positive.
    """

    mean: float
    std: float

    def fault(self) -> str | None:
        """Return what is wrong with the parameters, or None."""
        for name, number in (("mean", self.mean), ("std", self.std)):
            fault = _number_fault(number)
            if fault is not None:
                return f"{name} {fault}"
        if math.isinf(self.mean) or not 0 < self.std < math.inf:
            return f"mean must be finite and std above 0, got {self.mean} and {self.std}; drop a constant column"
        return None

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that normalizes."""
        return _map_steps("Normalize", "normalize", one(forms), self.mean, self.std)

    def kernel(self) -> Kernel:
        """Return the kernel."""
        return _map_kernel("Normalize", "normalize", self.mean, self.std)

    def __str__(self) -> str:
        return f"normalize[{self.mean:g}, {self.std:g}]"


@dataclass(frozen=True)
class FillNan:
    """Floats → floats without NaN; integers are unchanged. The part of :class:`FillNull` that changes values.

    Args:
        value: Replacement for NaN.
    """

    value: float

    def fault(self) -> str | None:
        """Return what is wrong with the value, or None."""
        fault = _number_fault(self.value)
        return None if fault is None else f"value {fault}"

    def check(self, form: Form) -> Form:
        """Return the form if the column can have nulls.

        Raises:
            TypeError: If it cannot.
        """
        form = numbers("FillNull", form)
        if form.dtype in INTEGERS and form.levels == 0:
            raise TypeError(
                "FillNull takes columns that can have nulls, got a dense column of integers, which has none; set a "
                "default where it is read, e.g. with columnio.Dense(default=0)"
            )
        return form

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that fills."""
        form = self.check(one(forms))
        return _map_steps("FillNull", "fill", form, self.value) if form.dtype in FLOATS else Lowered(form, ())

    def kernel(self) -> Kernel:
        """Return the kernel."""

        def kernel(column: Column) -> Column:
            return (
                _mapped(column, "FillNull", "fill", self.value)
                if self.check(Form.of(column)).dtype in FLOATS
                else column
            )

        return kernel

    def __str__(self) -> str:
        return f"fill_nan[{self.value:g}]"


@dataclass(frozen=True)
class Cast:
    """Numbers → numbers of another dtype.

    Floats become integers by truncation; NaN and values outside the range of int64 are refused. Integers keep their low
    32 bits as int32. Columns of bool (as 0 and 1) and dense columns of uint8 are accepted too.

    Args:
        dtype: torch.int32, int64, float32 or float64.
    """

    dtype: torch.dtype

    def fault(self) -> str | None:
        """Return what is wrong with the dtype, or None."""
        if self.dtype not in (torch.int32, torch.int64, *FLOATS):
            return f"dtype must be torch.int32, int64, float32 or float64, got {self.dtype!r}"
        return None

    def check(self, form: Form) -> Form:
        """Return the form of the result.

        Raises:
            TypeError: If the column does not hold numbers.
        """
        if form.dtype != torch.bool and not (form.dtype == torch.uint8 and form.levels == 0):
            numbers("Cast", form)
        return form._replace(dtype=self.dtype)

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instructions that cast."""
        form = one(forms)
        result = self.check(form)
        names = {torch.float32: "f32", torch.float64: "f64"}
        source = names.get(form.dtype, "i64")
        target = names.get(self.dtype, "i64")
        steps = () if source == target else (Step(f"{source}_to_{target}"),)
        return Lowered(result, (*steps, Step("wrap_32")) if self.dtype == torch.int32 else steps)

    def kernel(self) -> Kernel:
        """Return the kernel."""

        def kernel(column: Column) -> Column:
            self.check(Form.of(column))
            values = column.values
            if values.dtype in FLOATS and self.dtype not in FLOATS:
                values = ops.transform.cast_to_ids(values, used=_used(column))
            return column._replace(values=values.to(self.dtype))

        return kernel

    def __str__(self) -> str:
        return f"cast[{str(self.dtype).removeprefix('torch.')}]"
