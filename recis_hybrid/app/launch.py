"""Process group and device under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from recis_hybrid import distributed
from recis_hybrid.accelerator import is_available


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes started by torchrun while the context is open; without torchrun, do nothing.

    Args:
        device: Device of model and tables, ``cpu`` or ``cuda``.

    Yields:
        The device of this process; for ``cuda``, the one of LOCAL_RANK.
    """
    before = distributed.is_initialized()
    distributed.join("recis-hybrid")
    if before or distributed.world_size() == 1:
        yield device
        return
    if device == "cuda" and is_available(torch.device(device)):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        yield device
    except BaseException:
        # NCCL would wait here for a collective that other ranks are in. With Gloo, exiting without this call aborts.
        if "nccl" not in dist.get_backend():
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
