"""The accelerator that operators have kernels for, beside the CPU.

All other modules ask here, and not ``torch.cuda``, so that tests can put another device in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KIND = "cuda"
"""Type of the accelerator, as torch names it."""


def is_accelerator(where: Tensor | torch.device) -> bool:
    """Return whether a tensor or device is not the CPU's, so that operators are queued and the host runs ahead."""
    return (where.device if isinstance(where, Tensor) else where).type == KIND


def is_available(where: torch.device) -> bool:
    """Return whether this machine has a device: the CPU, or the accelerator that torch finds."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return where.type == "cpu" or (found is not None and found.type == where.type)


def is_initialized() -> bool:
    """Return whether this process uses the accelerator already."""
    return bool(torch.get_device_module(KIND).is_initialized())


def accelerator(index: int | None = None) -> torch.device:
    """Return the accelerator with its number, the current one where ``index`` is None."""
    return torch.device(KIND, torch.accelerator.current_device_index() if index is None else index)


def copied(tensor: Tensor, where: torch.device) -> Tensor:
    """Return a tensor on a device. The host waits for a copy to the CPU only; others are queued."""
    return tensor.to(where, non_blocking=is_accelerator(where))


def numbers_on(where: torch.device, numbers: Sequence[int]) -> Tensor:
    """Return whole numbers as int64 ``[n]`` on a device, for which ``torch.tensor`` would wait."""
    if not is_accelerator(where):
        return torch.tensor(numbers, dtype=torch.int64, device=where)
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(where, non_blocking=True)


def record_event(where: torch.device) -> torch.Event:
    """Record an event on the current stream of an accelerator."""
    event = torch.Event(where.type)
    event.record(torch.accelerator.current_stream(where))
    return event


class FaultWord:
    """A word in which kernels of an accelerator record an element that they refuse, and which the host reads later.

    The word is pinned memory, which kernels write to only if they refuse something, so that neither they nor the host
    ever wait for it.

    Args:
        where: The accelerator.
    """

    def __init__(self, where: torch.device) -> None:
        # Tensors created in inference mode cannot be written outside of it.
        with torch.inference_mode(False):
            self._word = torch.zeros(1, dtype=torch.int64, pin_memory=True)
            self.address = torch.tensor([self._word.data_ptr()], device=where)
        """int64 ``[1]`` on the accelerator: the address of the word, for operators."""
        self._view = self._word.numpy()

    def take(self) -> int:
        """Return 1 + an element that a kernel has refused so far, or 0, and clear the word; does not wait."""
        fault = int(self._view[0])
        if fault:
            self._view[0] = 0
        return fault
