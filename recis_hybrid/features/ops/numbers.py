"""Operations on numbers: buckets, maps of one number to another, casts."""

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


def _as_written(value: Any) -> str | None:
    """Return what is wrong with a number that a user has written, or None."""
    if not isinstance(value, kinds_of_numbers.Real) or isinstance(value, bool):
        return f"must be a number, got {value!r}"
    return "must be a number, got NaN" if math.isnan(value) else None


@dataclass(frozen=True)
class Bucketize:
    """Numbers → the number of the bucket that they lie in, int64 from 0 to ``len(boundaries)``.

    The column keeps its form. The bucket of v is the number of boundaries b with b <= v, or b < v where ``right`` is
    False (``right`` as in :func:`torch.bucketize`). Integers are compared exactly, also with fractional boundaries; for
    a float32 or float64 column the boundaries are rounded to its dtype first, so that a value written as 0.7 equals the
    boundary 0.7 in either. A NaN is refused: put a :class:`FillNull` before it. (On CUDA, where nobody waits for it, it
    goes to the last bucket as in torch, and ``FeatureEngine.check()`` says so.)

    Args:
        boundaries: At least one number, never decreasing. Equal ones have an empty bucket between them.
        right: Whether a value that equals a boundary goes to the bucket above it: ``upper_bound``, as RecIS has it.

    Example:
        >>> engine = FeatureEngine([Feature("age", ops=[Bucketize([18, 65])])])
        >>> engine({"age": torch.tensor([17, 18, 70])})
        {'age': tensor([0, 1, 2])}
    """

    boundaries: Sequence[float]
    right: bool = True

    def __post_init__(self) -> None:
        listed = self.boundaries.tolist() if hasattr(self.boundaries, "tolist") else self.boundaries
        # A tuple, so that equal specs are found by their hash and nobody changes them afterwards.
        object.__setattr__(self, "boundaries", tuple(listed) if isinstance(listed, Iterable) else listed)

    def fault(self) -> str | None:
        """Return what is wrong with its parameters, or None."""
        if not isinstance(self.right, bool):
            return f"right must be True or False, got {self.right!r}"
        if not isinstance(self.boundaries, tuple):
            return f"boundaries must be a list of numbers, got {self.boundaries!r}"
        if not self.boundaries:
            return "boundaries must be at least one number, got none; without boundaries there is but one bucket"
        for i, boundary in enumerate(self.boundaries):
            if not isinstance(boundary, kinds_of_numbers.Real) or isinstance(boundary, bool):
                return f"boundaries must be numbers, got {boundary!r} at {i}"
            if math.isnan(boundary):
                return f"boundaries must be numbers, got NaN at {i}; drop it, for nothing compares with NaN"
        for i, (before, after) in enumerate(zip(self.boundaries, self.boundaries[1:], strict=False)):
            if after < before:
                return f"boundaries must not decrease, got {before} and then {after} at {i + 1}; sort them"
        return None

    def table(self, dtype: torch.dtype) -> Tensor:
        """Return the boundaries for values of a dtype, in it: int64, float32 or float64."""
        listed = _first_above(self) if dtype == torch.int64 else [float(boundary) for boundary in self.boundaries]
        return torch.tensor(listed, dtype=dtype, device="cpu")

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that finds buckets."""
        form = numbers("Bucketize", one(forms))
        dtype = form.dtype if form.dtype in FLOATS else torch.int64
        table = self.table(dtype)
        words = torch.cat([table, table.new_zeros(table.numel() % 2)]) if dtype.itemsize == 4 else table
        name = {torch.int64: "bucket_i64", torch.float32: "bucket_f32", torch.float64: "bucket_f64"}[dtype]
        # What _first_above says of an integer is always "at or above".
        right = self.right or dtype == torch.int64
        step = Step(name, (table.numel(), int(right)), words.view(torch.int64))
        return Lowered(form._replace(dtype=torch.int64), (step,))

    def kernel(self) -> Kernel:
        """Return what puts a column into buckets."""
        tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

        def kernel(column: Column) -> Column:
            form = numbers("Bucketize", Form.of(column))
            values = column.values if form.dtype in FLOATS else ids_of(column)
            key = values.dtype, values.device
            if key not in tables:
                tables[key] = self.table(values.dtype).to(values.device)
            right = self.right or values.dtype == torch.int64
            return column._replace(values=ops.transform.bucketize(values, tables[key], right=right, refuse_nan=True))

        return kernel

    def __str__(self) -> str:
        return f"bucketize[{len(self.boundaries)} boundaries{'' if self.right else ', right=False'}]"


def _first_above(spec: Bucketize) -> list[int]:
    """Return for each boundary the least int64 above it (as ``right`` says); without those that none is above."""
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


def _mapped(column: Column, where: str, kind: MapKind, first: float, second: float = 0.0) -> Column:
    values = column.values if column.values.dtype in FLOATS else column.values.to(torch.float32)
    first, second = _held(where, values.dtype, first, second)
    return column._replace(values=ops.transform.map_values(values, kind, first, second))


def _map_kernel(where: str, kind: MapKind, first: float, second: float = 0.0) -> Kernel:
    """Return the kernel of a map of numbers; integers become float32 before it."""

    def kernel(column: Column) -> Column:
        numbers(where, Form.of(column))
        return _mapped(column, where, kind, first, second)

    return kernel


def _map_steps(where: str, kind: str, form: Form, *given: float) -> Lowered:
    """Return the instructions of a map of floats; integers become float32 before it."""
    numbers(where, form)
    dtype = form.dtype if form.dtype in FLOATS else torch.float32
    given = _held(where, dtype, *given)
    steps = () if form.dtype in FLOATS else (Step("i64_to_f32"),)
    name = f"{kind}_{'f32' if dtype == torch.float32 else 'f64'}"
    return Lowered(form._replace(dtype=dtype), (*steps, Step(name, tuple(bits(number) for number in given))))


def _held(where: str, dtype: torch.dtype, *given: float) -> tuple[float, ...]:
    """Return numbers as a column's dtype holds them: bounds beyond its range become its ends, others are refused.

    Raises:
        TypeError: If it would hold infinity, or 0 in place of a divisor.
    """
    most = torch.finfo(dtype).max
    if where == "Clip":
        return tuple(one if math.isinf(one) else min(max(one, -most), most) for one in given)
    for number in given:
        held = fits(number, dtype)
        if held and where == "Normalize" and dtype == torch.float32 and number != 0:
            held = np.float32(number) != 0
        if not held:
            raise TypeError(
                f"{where}: a column of {dtype} cannot hold the value {number!r}; put Cast(torch.float64) before it"
            )
    return given


@dataclass(frozen=True)
class Log:
    """Numbers → their natural logarithms, of ``x + plus``.

    The column keeps its form; integers become float32 before. The sum must be above 0.

    Args:
        plus: Added before; 1 makes it the logarithm of counts that may be 0.
    """

    plus: float = 0.0

    def fault(self) -> str | None:
        """Return what is wrong with ``plus``, or None."""
        fault = _as_written(self.plus)
        return None if fault is None else f"plus {fault}"

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that takes logarithms."""
        return _map_steps("Log", "log", one(forms), self.plus)

    def kernel(self) -> Kernel:
        """Return what takes logarithms of a column."""
        return _map_kernel("Log", "log", self.plus)

    def __str__(self) -> str:
        return f"log[x + {self.plus:g}]" if self.plus else "log"


@dataclass(frozen=True)
class Clip:
    """Numbers → the nearest numbers within ``[least, most]``.

    The column keeps its form and, where it holds floats, its dtype; integers become int64, and take whole bounds.

    Args:
        least: The least number that is left.
        most: The greatest number that is left.
    """

    least: float
    most: float

    def fault(self) -> str | None:
        """Return what is wrong with the bounds, or None."""
        for name, bound in (("least", self.least), ("most", self.most)):
            fault = _as_written(bound)
            if fault is not None:
                return f"{name} {fault}"
        if self.least > self.most:
            return f"least must not be above most, got {self.least} and {self.most}; swap them"
        return None

    def whole(self) -> tuple[int, int]:
        """Return the bounds for integers.

        Raises:
            TypeError: If they are fractions or outside of int64, or there are none between.
        """
        for bound in (self.least, self.most):
            if not math.isinf(bound) and bound != int(bound):
                raise TypeError(f"Clip of integers takes whole bounds, got {bound}; put Cast(torch.float32) before it")
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
        """Return what clips a column."""

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

    The column keeps its form; integers become float32 before.

    Args:
        mean: What becomes 0.
        std: What becomes a distance of 1; above 0.
    """

    mean: float
    std: float

    def fault(self) -> str | None:
        """Return what is wrong with the numbers, or None."""
        for name, number in (("mean", self.mean), ("std", self.std)):
            fault = _as_written(number)
            if fault is not None:
                return f"{name} {fault}"
        if math.isinf(self.mean) or not 0 < self.std < math.inf:
            return f"mean must be finite and std above 0, got {self.mean} and {self.std}; drop a constant column"
        return None

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that normalizes."""
        return _map_steps("Normalize", "normalize", one(forms), self.mean, self.std)

    def kernel(self) -> Kernel:
        """Return what normalizes a column."""
        return _map_kernel("Normalize", "normalize", self.mean, self.std)

    def __str__(self) -> str:
        return f"normalize[{self.mean:g}, {self.std:g}]"


@dataclass(frozen=True)
class FillNan:
    """Floats → floats without NaN; integers are left alone. It is the part of :class:`FillNull` that works on values.

    Args:
        value: What comes in the place of NaN.
    """

    value: float

    def fault(self) -> str | None:
        """Return what is wrong with the value, or None."""
        fault = _as_written(self.value)
        return None if fault is None else f"value {fault}"

    def check(self, form: Form) -> Form:
        """Return the form, if it has nulls that can be filled.

        Raises:
            TypeError: If nothing in it can be null.
        """
        form = numbers("FillNull", form)
        if form.dtype in INTEGERS and form.levels == 0:
            raise TypeError(
                "FillNull has nothing to fill in a dense column of integers, where no value stands for null; give a "
                "default where it is read, as in columnio.Dense(default=0)"
            )
        return form

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instruction that fills."""
        form = self.check(one(forms))
        return _map_steps("FillNull", "fill", form, self.value) if form.dtype in FLOATS else Lowered(form, ())

    def kernel(self) -> Kernel:
        """Return what fills a column."""

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

    Floats lose their fraction on the way to integers; NaN and what an int64 cannot hold are refused. Integers keep
    their low 32 bits on the way to int32. bool is taken too, and becomes 0 and 1, and so is a dense column of uint8.

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
        """Return the form that a column gets.

        Raises:
            TypeError: If it holds no numbers.
        """
        if form.dtype != torch.bool and not (form.dtype == torch.uint8 and form.levels == 0):
            numbers("Cast", form)
        return form._replace(dtype=self.dtype)

    def lower(self, forms: Sequence[Form]) -> Lowered:
        """Return the instructions that cast."""
        form = one(forms)
        made = self.check(form)
        names = {torch.float32: "f32", torch.float64: "f64"}
        source = names.get(form.dtype, "i64")
        target = names.get(self.dtype, "i64")
        steps = () if source == target else (Step(f"{source}_to_{target}"),)
        return Lowered(made, (*steps, Step("wrap_32")) if self.dtype == torch.int32 else steps)

    def kernel(self) -> Kernel:
        """Return what casts a column."""

        def kernel(column: Column) -> Column:
            self.check(Form.of(column))
            values = column.values
            if values.dtype in FLOATS and self.dtype not in FLOATS:
                values = ops.transform.cast_to_ids(values)
            return column._replace(values=values.to(self.dtype))

        return kernel

    def __str__(self) -> str:
        return f"cast[{str(self.dtype).removeprefix('torch.')}]"
