"""Under torchrun: the process group, and the device of this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from recis_hybrid import distributed


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that torchrun has started, for as long as it is open; without torchrun it does nothing.

    Args:
        device: Where models and tables are to be, ``cpu`` or ``cuda``.

    Yields:
        The device of this process: for ``cuda`` the one that LOCAL_RANK names.
    """
    before = distributed.is_initialized()
    distributed.join("recis-hybrid")
    if before or distributed.world_size() == 1:
        yield device
        return
    if device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        yield device
    except BaseException:
        # NCCL would wait here for a collective that others are in; a process of Gloo's that just ends is aborted.
        if "nccl" not in dist.get_backend():
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
