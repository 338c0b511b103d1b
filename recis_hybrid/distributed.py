"""Rank, world size and process group of a job.

A launcher (torchrun, or a scheduler whose script exports the same variables) tells each process its ``RANK``, the
``WORLD_SIZE`` and where rank 0 is. What several ranks share, ``EmbeddingEngine``, ``ColumnDataset`` and ``Trainer``,
calls :func:`join` as it is built, so that a program written for one process needs no line of its own for several.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

_ADVICE = (
    "start the ranks with torchrun, or call torch.distributed.init_process_group(...) first; a process that trains by "
    "itself has no WORLD_SIZE, or WORLD_SIZE=1"
)
# Whether this module has made the default group, and whether something keeps the towers of the ranks alike.
_joined = _attended = False
# The default group that there was when it was made, and the group of messages.
_messages: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


def is_initialized() -> bool:
    """Return whether torch.distributed has a default group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process in the default group; 0 without one."""
    return dist.get_rank() if is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of processes in a group, None for the default one; 1 without one."""
    return dist.get_world_size(group) if is_initialized() else 1


def launched(where: str) -> tuple[int, int]:
    """Return the rank and world size from the launcher's environment variables; (0, 1) without a launcher.

    Args:
        where: What messages begin with.

    Raises:
        ValueError: Only one of the two is there, or they are no rank and world size.
    """
    texts = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if texts == (None, None):
        return 0, 1
    try:
        rank, size = int(texts[0] or ""), int(texts[1] or "")
    except ValueError:
        rank, size = -1, -1
    if not 0 <= rank < size:
        raise ValueError(
            f"{where}: the environment has RANK={texts[0]} and WORLD_SIZE={texts[1]}, of which both must be integers, "
            f"RANK from 0 to WORLD_SIZE - 1; {_ADVICE}"
        )
    return rank, size


def join(where: str) -> None:
    """Initialize the default group if a launcher started several processes and the program has not done so.

    The backend is Gloo, and NCCL beside it for tensors on GPUs where there are any; the current GPU becomes that of
    ``LOCAL_RANK``. The group is left when the process ends. In workers of a DataLoader nothing happens.

    Args:
        where: What messages begin with.

    Raises:
        RuntimeError: The environment is that of several processes, and they cannot be joined.
        ValueError: The environment holds no rank and world size.
    """
    if is_initialized() or get_worker_info() is not None:
        return
    rank, size = launched(where)
    if size == 1:
        return
    said = f"{where}: the environment says that this is process {rank} of {size} (RANK, WORLD_SIZE)"
    if not dist.is_available():
        raise RuntimeError(f"{said}, and this build of torch has no torch.distributed; install another, or start one")
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RuntimeError(f"{said}, and not how to reach the others: {' and '.join(missing)} must be set; {_ADVICE}")
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    global _joined
    _joined = True
    atexit.register(_leave)
    logging.getLogger(__name__).info("rank %d of %d has joined the others by %s", rank, size, backend)


def message_group() -> dist.ProcessGroup:
    """Return a Gloo group of all ranks for small messages between training loops; collective."""
    world = dist.group.WORLD
    assert world is not None
    global _messages
    if _messages is None or _messages[0] is not world:
        _messages = world, dist.new_group(backend="gloo", timeout=_timeout_of(world), group_desc="recis_hybrid turns")
    return _messages[1]


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


def attend() -> None:
    """Record that towers are kept equal on all ranks, as ``Trainer`` and ``TorchStep`` do."""
    global _attended
    _attended = True


def is_unattended() -> bool:
    """Return whether :func:`join` initialized the group and nothing is known to keep towers equal."""
    return _joined and not _attended and is_initialized()


def refuse_unattended(where: str) -> None:
    """Raise if a loop written for one process is about to train a separate model on each rank.

    Args:
        where: What the message begins with.

    Raises:
        RuntimeError: If so.
    """
    if is_unattended():
        raise RuntimeError(
            f"{where}: {world_size()} processes were started together, and nothing averages the gradients of this "
            f"loop's towers over them; train with pipelines.Trainer, which does, or wrap the towers in "
            f"DistributedDataParallel and say so by torch.distributed.init_process_group(...) at the program's start"
        )


def _leave() -> None:
    # A process of Gloo's that ends with its groups is aborted. NCCL, after an error, would wait here for a collective
    # that others are in.
    failed = getattr(sys, "last_value", None) is not None
    if is_initialized() and not (failed and "nccl" in dist.get_backend()):
        dist.destroy_process_group()
