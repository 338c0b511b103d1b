"""What an operation on features is: a description that can be compared, and the kernel that it stands for.

Letters: B rows of a batch, N values over all rows, M strings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from recis_hybrid.ragged import RaggedTensor


class Column(NamedTuple):
    """A column on its way through operations.

    It is a RaggedTensor without the checks: operations change values, and rows by rules that keep them right.
    """

    values: Tensor
    """``[B, ...]`` where ``offsets`` is None, else ``[N, ...]``."""
    offsets: Tensor | None = None
    """int64 offsets of the innermost lists into ``values``; ``[B + 1]`` where there is one level of lists."""
    weights: Tensor | None = None
    """float32 ``[N]`` of a weighted ragged column; ``[M]`` where the values are the bytes of M strings in lists."""
    outer: tuple[Tensor, ...] = ()
    """int64 offsets of the levels above, the outermost (``[B + 1]``) first."""

    @classmethod
    def of(cls, column: Tensor | RaggedTensor) -> Column:
        """Take a batch's column apart."""
        if isinstance(column, RaggedTensor):
            return cls(column.values, column.offsets, column.weights, column.outer)
        return cls(column)

    def pack(self) -> Tensor | RaggedTensor:
        """Put it together again, as a batch has it."""
        if self.offsets is None:
            return self.values
        return RaggedTensor.unchecked(self.values, self.offsets, self.weights, self.outer)


class Form(NamedTuple):
    """What is known of a column without looking at its content: programs are made for forms."""

    dtype: torch.dtype
    levels: int
    """Levels of lists: 0 of a dense column; a string counts as a list of bytes."""
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
        """Whether its innermost lists are strings."""
        return self.dtype == torch.uint8 and self.levels > 0


Kernel: TypeAlias = Callable[[Column], Column]
"""What runs. It raises TypeError or ValueError for a column that it cannot work on; the engine adds the feature."""


class Step(NamedTuple):
    """One instruction of a fused program, see :mod:`recis_hybrid.ops.program`."""

    name: str
    numbers: tuple[int, ...] = ()
    table: Tensor | None = None
    """int64 words that it reads; where they lie becomes its first number, before the others."""


class Lowered(NamedTuple):
    """An element-wise operation as instructions, each on the result of the one before; none changes nothing."""

    form: Form
    steps: tuple[Step, ...]


class Op(Protocol):
    """An operation as the user writes it down.

    Equal operations on equal inputs are computed once, so an operation must be hashable, compare by what it does, and
    always give the same result; a frozen dataclass is all of that. ``str()`` of it is its name in the printed plan.

    What is here is all that an operation of one's own needs. It may also have ``in_reader = True``: that its kernel may
    run in the threads of a reader.
    """

    def fault(self) -> str | None:
        """Return what is wrong with its parameters, with the remedy, or None."""

    def kernel(self) -> Kernel:
        """Return what runs; called once for each place in a plan, and only where ``fault()`` is None."""


@runtime_checkable
class Elementwise(Protocol):
    """An operation that makes one value of each value (or string), and that can be fused."""

    def lower(self, forms: Sequence[Form]) -> Lowered | None:
        """Return the instructions for inputs of these forms; None where it changes rows there.

        Raises:
            TypeError: If it does not take them.
        """


@runtime_checkable
class Shaping(Protocol):
    """An operation that changes how many values rows have. Those of one kind run in one call."""

    kind: ClassVar[type[ShapeCall]]

    def shape(self, forms: Sequence[Form]) -> Form:
        """Return the form of what it makes of inputs of these forms; the same one where it leaves a column as it is.

        Raises:
            TypeError: If it does not take them.
        """


@runtime_checkable
class Joining(Protocol):
    """An operation that joins all columns of a chain into one, if ``joins`` is true."""

    @property
    def joins(self) -> bool:
        """Whether it joins columns; else it works on each."""

    def kernel(self) -> Callable[..., Column]:
        """Return what runs, with a column for each input."""


@runtime_checkable
class Pairwise(Joining, Protocol):
    """A joining operation on two columns; several are joined from the left, each with the result so far."""

    def parts(self) -> tuple[Any | None, Any]:
        """Return the operation on each column before the join, None for none, and the join without it."""


@runtime_checkable
class Compound(Protocol):
    """An operation that stands for others."""

    def expand(self) -> Sequence[Sequence[Any]]:
        """Return chains of operations; each chain makes one column of the one that comes in."""


def missing_method(op: Any) -> str | None:
    """Return the name of a method that an operation, or a class of them, needs and lacks; None if it has all.

    It needs ``fault``, and ``kernel``; or ``expand`` in place of that, where it stands for others.
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
    """Shaping operations of one kind as one native call: made for forms once, run for each batch."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None: ...

    def __call__(self, columns: Sequence[tuple[Column, ...]]) -> list[Column]:
        """Make a column for each job of its input columns."""
