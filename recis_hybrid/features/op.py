"""Operations on features: comparable descriptions, and their kernels.

Letters: B rows of a batch, N values over all rows, M strings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from recis_hybrid.ragged import RaggedTensor


class Column(NamedTuple):
    """A column between operations: the parts of a tensor or a RaggedTensor, without checks."""

    values: Tensor
    """``[B, ...]`` if ``offsets`` is None, else ``[N, ...]``."""
    offsets: Tensor | None = None
    """int64 offsets of the innermost lists into ``values``; ``[B + 1]`` for one level of lists."""
    weights: Tensor | None = None
    """float32 ``[N]`` of a weighted ragged column; ``[M]`` if the values are the bytes of M strings in lists."""
    outer: tuple[Tensor, ...] = ()
    """int64 offsets of the outer levels, the outermost (``[B + 1]``) first."""

    @classmethod
    def of(cls, column: Tensor | RaggedTensor) -> Column:
        """Return the parts of a column of a batch."""
        if isinstance(column, RaggedTensor):
            return cls(column.values, column.offsets, column.weights, column.outer)
        return cls(column)

    def pack(self) -> Tensor | RaggedTensor:
        """Return the tensor or RaggedTensor of these parts."""
        if self.offsets is None:
            return self.values
        return RaggedTensor.unchecked(self.values, self.offsets, self.weights, self.outer)


class Form(NamedTuple):
    """The properties of a column that are known without its content; programs are compiled for forms."""

    dtype: torch.dtype
    levels: int
    """Levels of lists: 0 for a dense column; a string is a list of bytes."""
    weighted: bool
    dims: int
    """Dimensions of the values."""
    device: torch.device

    @classmethod
    def of(cls, column: Column) -> Form:
        """Return the form of a column."""
        values = column.values
        levels = 0 if column.offsets is None else 1 + len(column.outer)
        return cls(values.dtype, levels, column.weights is not None, values.dim(), values.device)

    @property
    def strings(self) -> bool:
        """True if the innermost lists are strings."""
        return self.dtype == torch.uint8 and self.levels > 0


Kernel: TypeAlias = Callable[[Column], Column]
"""A function from column to column. It raises TypeError or ValueError for columns that it does not accept, and the
engine adds the name of the feature."""


class Step(NamedTuple):
    """One instruction of a fused program; see :mod:`recis_hybrid.ops.program`."""

    name: str
    numbers: tuple[int, ...] = ()
    table: Tensor | None = None
    """int64 words that the instruction reads; their position becomes its first number."""


class Lowered(NamedTuple):
    """An element-wise operation as a chain of instructions; an empty chain changes nothing."""

    form: Form
    steps: tuple[Step, ...]


class Op(Protocol):
    """An operation in the declaration of a feature.

    Equal operations on equal inputs are computed once, so an operation must be hashable, compare by its parameters, and
    be deterministic. A frozen dataclass meets the first two requirements. The printed plan shows ``str(op)``.

    Custom operations need only these two methods. ``in_reader = True`` allows their kernels to run in the threads of a
    reader.
    """

    def fault(self) -> str | None:
        """Return what is wrong with the parameters and the remedy, or None."""

    def kernel(self) -> Kernel:
        """Return the kernel; called once for each place in a plan, and only if ``fault()`` returns None."""


@runtime_checkable
class Elementwise(Protocol):
    """An operation that maps each value (or string) to one value, and can be fused."""

    def lower(self, forms: Sequence[Form]) -> Lowered | None:
        """Return the instructions for inputs of these forms; None if the operation changes their rows.

        Raises:
            TypeError: If the operation does not take these forms.
        """


@runtime_checkable
class Shaping(Protocol):
    """An operation that changes the number of values in rows. Operations of one kind run in one call."""

    kind: ClassVar[type[ShapeCall]]

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the form of the result for inputs of these forms; the same object if the column stays unchanged.

        Raises:
            TypeError: If the operation does not take these forms.
        """


@runtime_checkable
class Joining(Protocol):
    """An operation that joins all columns of a chain into one if ``joins`` is true."""

    @property
    def joins(self) -> bool:
        """True if the operation joins columns; otherwise it applies to each."""

    def kernel(self) -> Callable[..., Column]:
        """Return the kernel, which takes a column for each input."""


@runtime_checkable
class Pairwise(Joining, Protocol):
    """A joining operation on two columns; several are joined from the left, one after another."""

    def parts(self) -> tuple[Any | None, Any]:
        """Return the operation on each column before the join, or None, and the join without it."""


@runtime_checkable
class Compound(Protocol):
    """An operation that consists of others.

    A class may have ``suffixes``, a string for each chain: a feature ``f`` that ends with the operation becomes columns
    ``f_suffix`` instead of ``f_0``, ``f_1``, and so on.
    """

    def fault(self) -> str | None:
        """Return what is wrong with the parameters and the remedy, or None."""

    def expand(self) -> Sequence[Sequence[Any]]:
        """Return chains of operations; each chain maps the input column to one output column."""


def missing_method(op: Any) -> str | None:
    """Return the name of a required method that an operation or its class lacks, or None.

    Required methods are ``fault``, and ``kernel`` or ``expand``.
    """
    if not callable(getattr(op, "fault", None)):
        return "fault"
    return None if any(callable(getattr(op, method, None)) for method in ("kernel", "expand")) else "kernel"


class Job(NamedTuple):
    """One shaping operation of a call."""

    op: Any
    forms: tuple[Form, ...]
    label: str


class ShapeCall(Protocol):
    """Shaping operations of one kind in one native call: built once for their forms, run for each batch."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None: ...

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Return the column of each job for its input columns."""
