"""Host memory for blocks, slots and large outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Smaller tensors come from the heap without page faults, and would waste most of a huge page.
_HUGE_FROM = 1 << 20


@torch.library.register_fake("recis::huge_empty")  # type: ignore[untyped-decorator]
def _huge_empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@torch.library.register_fake("recis::huge_zeros")  # type: ignore[untyped-decorator]
def _huge_zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def empty_bytes(size: int, device: torch.device) -> Tensor:
    """Return an uninitialized uint8 tensor of ``size`` bytes, 64-byte aligned.

    Large host tensors are on huge pages, and their memory is reused after they are freed.
    """
    if device.type == "cpu" and size >= _HUGE_FROM:
        return torch.ops.recis.huge_empty(size)  # type: ignore[no-any-return]
    return torch.empty(size, dtype=torch.uint8, device=device)


def zero_bytes(size: int, device: torch.device) -> Tensor:
    """Return a zeroed uint8 tensor of ``size`` bytes, 64-byte aligned.

    Large host tensors are on huge pages that are cleared, and take memory, only when they are first accessed.
    """
    if device.type == "cpu" and size >= _HUGE_FROM:
        return torch.ops.recis.huge_zeros(size)  # type: ignore[no-any-return]
    return torch.zeros(size, dtype=torch.uint8, device=device)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor in memory from :func:`empty_bytes`."""
    return empty_bytes(math.prod(shape) * dtype.itemsize, device).view(dtype).view(shape)
