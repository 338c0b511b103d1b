"""Shared parts of the operations that change rows: arguments and results of native calls, and unfused kernels.

A native operator on ragged columns takes all tensors of its jobs in one list, with the index of each in that list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.features.op import Column, Form, Job


class ShapingOp:
    """Base of the operations that change rows. An unfused one uses the native call for many, with one job."""

    def kernel(self) -> Callable[..., Column]:
        """Return the kernel of this operation alone."""
        op: Any = self
        calls: dict[tuple[Form, ...], Any] = {}

        def kernel(*columns: Column) -> Column:
            forms = tuple(Form.of(column) for column in columns)
            if forms not in calls:
                form = op.shape(forms)
                # A column that the operation leaves unchanged needs no call.
                unchanged = len(forms) == 1 and form is forms[0]
                calls[forms] = None if unchanged else op.kind([Job(op, forms, "")], parallel=True)
            call = calls[forms]
            return columns[0] if call is None else call([columns])[0]

        return kernel


class LabeledCall:
    """Base of native calls that name the operation in their errors: one line of labels for each job."""

    def __init__(self, jobs: Sequence[Job], *, parallel: bool) -> None:
        self._labels = "\n".join(job.label for job in jobs)
        self._parallel = parallel


class TensorList:
    """A list of tensors, and the index of each in it; -1 for a tensor that is None."""

    def __init__(self) -> None:
        self.list: list[Tensor] = []
        self.index: list[int] = []

    def add(self, *tensors: Tensor | None) -> None:
        """Append tensors."""
        for tensor in tensors:
            if tensor is None:
                self.index.append(-1)
            else:
                self.index.append(len(self.list))
                self.list.append(tensor.contiguous())


def unpack(outputs: Iterable[Tensor], ragged: Sequence[bool], weighted: Sequence[bool]) -> list[Column]:
    """Return the columns in the results of a native call.

    Args:
        outputs: For each column its offsets if it is ragged, its values, and its weights if it has any.
        ragged: Whether each column has offsets.
        weighted: Whether each column has weights.
    """
    tensors = iter(outputs)
    columns = []
    for has_offsets, has_weights in zip(ragged, weighted, strict=True):
        offsets = next(tensors) if has_offsets else None
        columns.append(Column(next(tensors), offsets, next(tensors) if has_weights else None))
    return columns


def exact_on(device: torch.device) -> bool:
    """Return whether results have their exact size; on a GPU they have an upper bound, to avoid synchronizing."""
    return device.type == "cpu"


def count_fault(name: str, count: object, *, least: int = 1) -> str | None:
    """Return what is wrong with a number of values, rows or classes, or None."""
    if not isinstance(count, int) or isinstance(count, bool) or not least <= count < 2**31:
        return f"{name} must be an int from {least} to {2**31 - 1}, got {count!r}"
    return None


def level_fault(level: object) -> str | None:
    """Return what is wrong with a level of lists, or None."""
    return None if type(level) is int and level in (1, 2) else f"level must be 1 or 2, got {level!r}"
