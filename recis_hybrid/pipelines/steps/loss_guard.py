"""LossGuard: a loss that is no finite number ends the training, and says what was in the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.ragged import Batch, RaggedTensor


class NonFiniteLossError(FloatingPointError):
    """The loss is NaN or infinite; the message names the step and the columns that have such values."""


@dataclass(frozen=True, eq=False)
class _Watched:
    step: int
    batches: Sequence[Batch]
    loss: Tensor
    """On the CPU; of a step on a GPU it is there once ``copied`` has happened."""
    copied: Any


class LossGuard:
    """Looks at the loss of every step without making the host wait.

    On a CPU at once. On a GPU the loss is copied behind the step and looked at when it has arrived, a few steps later;
    until then the step's batches are kept, to say what was in them.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Watched] = deque()

    def watch(self, step: int, loss: Tensor, batches: Sequence[Batch]) -> None:
        """Look at the losses that are there; raises NonFiniteLossError for one that is not finite."""
        if loss.device.type == "cpu":
            _check(_Watched(step, batches, loss, None))
            return
        copy = torch.empty((), dtype=loss.dtype, pin_memory=True)
        copy.copy_(loss, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._waiting.append(_Watched(step, batches, copy, copied))
        self.look()

    def look(self, *, wait: bool = False) -> None:
        """Look at the losses that have arrived; at all of them, if it is to wait."""
        while self._waiting and (wait or self._waiting[0].copied.query()):
            watched = self._waiting.popleft()
            watched.copied.synchronize()
            _check(watched)


def _check(watched: _Watched) -> None:
    loss = float(watched.loss)
    if loss - loss == 0:  # neither NaN nor infinite
        return
    found = [fault for batch in watched.batches for fault in non_finite_columns(batch)]
    where = f"the loss is {loss} at step {watched.step}"
    if found:
        raise NonFiniteLossError(
            f"{where}: of its batch the columns {', '.join(found)} are not finite; mend the data, or put FillNull and "
            f"Clip before the model"
        )
    raise NonFiniteLossError(f"{where}: its batch is finite; lower the learning rate, or clip gradients")


def non_finite_columns(batch: Batch) -> list[str]:
    """Return the columns of a batch that hold NaN or infinities, each with how many of how many values."""
    found = []
    for name, column in batch.items():
        values = column.values if isinstance(column, RaggedTensor) else column
        if values.is_floating_point() and (count := int((~values.isfinite()).sum())):
            found.append(f"{name!r} ({count} of {values.numel()} values)")
    return found
