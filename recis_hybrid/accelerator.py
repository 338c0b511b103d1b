"""The accelerator that operators have kernels for, beside the CPU.

All other modules ask here, and not ``torch.cuda``, so that tests can put another device in its place.
"""

from __future__ import annotations

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


def record_event(where: torch.device) -> torch.Event:
    """Record an event on the current stream of an accelerator."""
    event = torch.Event(where.type)
    event.record(torch.accelerator.current_stream(where))
    return event
