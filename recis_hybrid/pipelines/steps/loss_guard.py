"""LossGuard: ends the training when the loss is not finite and diagnoses the batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.accelerator import record_event
from recis_hybrid.ragged import Batch, RaggedTensor


class NonFiniteLossError(FloatingPointError):
    """The loss is NaN or infinite. The message names the step and the columns with non-finite values."""


@dataclass(frozen=True, eq=False)
class _PendingLoss:
    step: int
    batches: Sequence[Batch]
    loss: Tensor
    """On the CPU. The loss of a GPU step is valid after the event ``copied``."""
    copied: Any


class LossGuard:
    """Checks the loss of every step without blocking the host.

    A loss on the CPU is checked immediately. A loss on a GPU is copied asynchronously and checked when it has arrived,
    a few steps later. Until then the step's batches are kept for the error message.
    """

    def __init__(self) -> None:
        self._waiting: deque[_PendingLoss] = deque()

    def watch(self, step: int, loss: Tensor, batches: Sequence[Batch]) -> None:
        """Add the loss of a step and check the losses that have arrived.

        Raises:
            NonFiniteLossError: A loss is not finite.
        """
        if loss.device.type == "cpu":
            _check(_PendingLoss(step, batches, loss, None))
            return
        copy = torch.empty((), dtype=loss.dtype, pin_memory=True)
        copy.copy_(loss, non_blocking=True)
        self._waiting.append(_PendingLoss(step, batches, copy, record_event(loss.device)))
        self.check()

    def check(self, *, wait: bool = False) -> None:
        """Check the losses that have arrived, or with ``wait`` all losses.

        Raises:
            NonFiniteLossError: A loss is not finite.
        """
        while self._waiting and (wait or self._waiting[0].copied.query()):
            pending = self._waiting.popleft()
            pending.copied.synchronize()
            _check(pending)


def _check(pending: _PendingLoss) -> None:
    loss = float(pending.loss)
    if loss - loss == 0:  # neither NaN nor infinite
        return
    found = [fault for batch in pending.batches for fault in non_finite_columns(batch)]
    where = f"the loss is {loss} at step {pending.step}"
    if found:
        raise NonFiniteLossError(
            f"{where}: the columns {', '.join(found)} of its batch are not finite; fix the data, or apply FillNull and "
            f"Clip before the model"
        )
    raise NonFiniteLossError(
        f"{where}: its batch is finite; lower the learning rate, or clip gradients; a step "
        f"with check_gradients=True names the tables, features and ids, or the parameters, at fault"
    )


def non_finite_columns(batch: Batch) -> list[str]:
    """Describe the columns of a batch that contain NaN or infinities, with counts."""
    found = []
    for name, column in batch.items():
        values = column.values if isinstance(column, RaggedTensor) else column
        if values.is_floating_point() and (count := int((~values.isfinite()).sum())):
            found.append(f"{name!r} ({count} of {values.numel()} values)")
    return found
