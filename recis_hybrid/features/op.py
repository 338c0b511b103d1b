"""What an operation on a feature is: a description that can be compared, and the kernel that it stands for.

Letters: B rows of a batch, N values over all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from recis_hybrid.ragged import RaggedTensor


class Column(NamedTuple):
    """A column on its way through operations.

    It is a RaggedTensor without the checks: operations change values, seldom rows, so what was checked holds.
    """

    values: Tensor
    """``[B, ...]`` where ``offsets`` is None, else ``[N, ...]``."""
    offsets: Tensor | None = None
    """int64 ``[B + 1]`` of a ragged column."""
    weights: Tensor | None = None
    """float32 ``[N]`` of a weighted ragged column."""

    @classmethod
    def of(cls, column: Tensor | RaggedTensor) -> Column:
        """Takes a batch's column apart."""
        if isinstance(column, RaggedTensor):
            return cls(column.values, column.offsets, column.weights)
        return cls(column)

    def pack(self) -> Tensor | RaggedTensor:
        """Puts it together again, as a batch has it."""
        if self.offsets is None:
            return self.values
        return RaggedTensor(self.values, self.offsets, self.weights)


Kernel: TypeAlias = Callable[[Column], Column]
"""What runs. It raises TypeError or ValueError for a column that it cannot work on; the engine adds the feature."""


class Op(Protocol):
    """An operation as the user writes it down.

    Equal operations on equal inputs are computed once, so an operation must be hashable, compare by what it does, and
    always give the same result; a frozen dataclass is all of that. ``str()`` of it is its name in the printed plan.
    """

    def fault(self) -> str | None:
        """Returns what is wrong with its parameters, with the remedy, or None."""

    def kernel(self) -> Kernel:
        """Returns what runs; called once for each place in a plan, and only where ``fault()`` is None."""
