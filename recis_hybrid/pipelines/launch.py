"""Under torchrun: the process group, and the device of this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the processes that torchrun has started, for as long as it is open; without torchrun it does nothing.

    Args:
        device: Where models and tables are to be: ``cpu``, by Gloo, or ``cuda``, by NCCL.

    Yields:
        The device of this process: for ``cuda`` the one that LOCAL_RANK names.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    except BaseException:
        # NCCL would wait here for a collective that others are in; a process of Gloo's that just ends is aborted.
        if dist.get_backend() == "gloo":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
