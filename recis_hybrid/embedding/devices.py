"""Devices by name, with their number."""

from __future__ import annotations

import torch


def device_of(device: torch.device | str, index: int | None = None) -> torch.device:
    """Return the device with its number, which tensors carry: the current one where ``index`` is None."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"a device must be one of torch's, as 'cpu' or 'cuda:0', got {device!r}: {error}") from None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)
    return device
