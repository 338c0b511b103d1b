"""Rank and world size of a job, and collective operations on its ranks.

A launcher (torchrun, or a scheduler whose script exports the same variables) sets ``RANK``, ``WORLD_SIZE`` and the
address of rank 0 for each process. ``EmbeddingEngine``, ``ColumnDataset`` and ``Trainer`` call :func:`join` in their
constructors, so a program written for one process runs on several without changes.

All rooms use this module for ranks, sums over ranks, and the rule that all ranks succeed or all raise. Functions with
an argument ``group`` use the default process group if it is None. Without torch.distributed, a process is rank 0 of 1.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

from recis_hybrid.accelerator import accelerator, is_accelerator

_ADVICE = (
    "start the ranks with torchrun, or call torch.distributed.init_process_group(...) first; to train in a single "
    "process, unset WORLD_SIZE or set WORLD_SIZE=1"
)
# Whether this module initialized the default group, and whether a trainer or step averages the gradients of towers.
_joined = _averages_gradients = False
# The default group, and the group for messages created for it.
_messages: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


class OtherRankError(RuntimeError):
    """Another rank failed in an operation of all ranks.

    Args:
        rank: The rank that failed.
        world_size: Number of ranks.
        kind: Class name of its exception.
        text: Message of its exception.
    """

    def __init__(self, rank: int, world_size: int, kind: str, text: str) -> None:
        super().__init__(f"rank {rank} of {world_size} failed: {text or kind}")
        self.rank, self.kind, self.text = rank, kind, text


def is_initialized() -> bool:
    """Return whether torch.distributed has a default group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return the rank of this process in a group; 0 without torch.distributed."""
    if group is not None:
        return group.rank()
    return dist.get_rank() if is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of processes in a group; 1 without torch.distributed."""
    if group is not None:
        return group.size()
    return dist.get_world_size() if is_initialized() else 1


def sendable(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return a contiguous tensor on a device that the group's backend can send from.

    The tensor is copied only if the backend requires it: to the CPU for Gloo, to the GPU for NCCL.
    """
    # get_backend fails for a group that is not registered with torch.distributed. A raw Gloo group has the name "gloo".
    backend = "gloo" if group is not None and group.name() == "gloo" else dist.get_backend(group)
    if is_accelerator(tensor) and "nccl" not in backend:
        return tensor.cpu()
    if not is_accelerator(tensor) and "gloo" not in backend and "mpi" not in backend:
        return tensor.to(accelerator())
    return tensor.contiguous()


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum of a tensor over all ranks, on its device; collective.

    Args:
        values: Tensor with the same shape and dtype on all ranks; not modified.
        group: The ranks.
    """
    if world_size(group) == 1:
        return values
    total = sendable(values.clone(), group)
    dist.all_reduce(total, group=group)
    return total.to(values.device)


def exchange(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, by rank; collective.

    Values are sent as JSON, so no received data is executed.

    Args:
        value: Any JSON value.
        group: The ranks.
    """
    if world_size(group) == 1:
        return [value]
    data = sendable(torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8), group)
    counts = [int(size) for size in _gather(torch.tensor([data.numel()], device=data.device), group)]
    padded = data.new_zeros(max(counts))
    padded[: data.numel()] = data
    parts = _gather(padded, group)
    return [json.loads(bytes(part[:count].cpu().numpy())) for part, count in zip(parts, counts, strict=True)]


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    group = dist.group.WORLD if group is None else group
    assert group is not None
    tensors = [torch.empty_like(tensor) for _ in range(group.size())]
    group.allgather([tensors], [tensor]).wait()
    return tensors


def all_succeed_or_raise(
    failure: BaseException | None, value: Any = None, group: dist.ProcessGroup | None = None
) -> list[Any]:
    """Return the results of all ranks, or raise on all ranks if one of them failed; collective.

    Each rank does its part, catches exceptions, and passes the outcome to this function. No rank then waits for one
    that failed.

    Args:
        failure: This rank's exception, which is raised again; None if it succeeded.
        value: This rank's result, any JSON value.
        group: The ranks.

    Returns:
        The values by rank.

    Raises:
        OtherRankError: Another rank failed, but this one did not.

    Example:
        >>> all_succeed_or_raise(None, {"rows": 3})
        [{'rows': 3}]
    """
    error = None if failure is None else [type(failure).__name__, str(failure)]
    try:
        outcomes = exchange([value if failure is None else None, error], group)
        if failure is not None:
            raise failure
    finally:
        failure = None  # otherwise the exception and this frame would form a reference cycle
    for number, (_, error) in enumerate(outcomes):
        if error is not None:
            raise OtherRankError(number, len(outcomes), *error)
    return [result for result, _ in outcomes]


def launcher_rank_and_size(where: str) -> tuple[int, int]:
    """Return the rank and world size from the launcher's environment variables; (0, 1) without a launcher.

    Args:
        where: The caller, for messages.

    Raises:
        ValueError: One of the two is missing, or they are not a valid rank and world size.
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
            f"{where}: the environment variables RANK and WORLD_SIZE must be integers, with RANK from 0 to "
            f"WORLD_SIZE - 1, got RANK={texts[0]} and WORLD_SIZE={texts[1]}; {_ADVICE}"
        )
    return rank, size


def join(where: str) -> None:
    """Initialize the default group if a launcher started several processes and the program has not done so.

    The backend is Gloo, plus NCCL for GPU tensors if there are GPUs. The current GPU is set to ``LOCAL_RANK``. The
    group is destroyed when the process exits. In DataLoader workers this does nothing.

    Args:
        where: The caller, for messages.

    Raises:
        RuntimeError: The launcher started several processes, but they cannot be joined.
        ValueError: The environment contains no valid rank and world size.
    """
    if is_initialized() or get_worker_info() is not None:
        return
    rank, size = launcher_rank_and_size(where)
    if size == 1:
        return
    process = f"{where}: according to RANK and WORLD_SIZE this is process {rank} of {size}"
    if not dist.is_available():
        raise RuntimeError(
            f"{process}, but this build of torch has no torch.distributed; install another build, or use one process"
        )
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RuntimeError(
            f"{process}, but the address of rank 0 is missing: {' and '.join(missing)} must be set; {_ADVICE}"
        )
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    global _joined
    _joined = True
    atexit.register(_destroy_group)
    logging.getLogger(__name__).info("rank %d of %d joined the default group (%s)", rank, size, backend)


def message_group() -> dist.ProcessGroup:
    """Return the Gloo group of all ranks for small messages between training loops; collective."""
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


def mark_gradients_averaged() -> None:
    """Record that ``Trainer`` or ``TorchStep`` averages the gradients of towers over the ranks."""
    global _averages_gradients
    _averages_gradients = True


def averages_no_gradients() -> bool:
    """Return whether :func:`join` initialized the group and no :func:`mark_gradients_averaged` followed."""
    return _joined and not _averages_gradients and is_initialized()


def check_gradients_averaged(where: str) -> None:
    """Raise if a loop written for one process would train a separate model on each rank.

    Args:
        where: The caller, for the message.

    Raises:
        RuntimeError: Gradients of towers are not averaged over the ranks.
    """
    if averages_no_gradients():
        raise RuntimeError(
            f"{where}: {world_size()} processes were started together, but this loop does not average the gradients of "
            f"its towers over them; train with pipelines.Trainer, which does, or wrap the towers in "
            f"DistributedDataParallel and call torch.distributed.init_process_group(...) when the program starts"
        )


def _destroy_group() -> None:
    # A process that exits with open Gloo groups aborts. After an error, NCCL would wait here for a collective that
    # other ranks are in.
    global _messages
    _messages = None  # a reference would keep the group open
    failed = getattr(sys, "last_value", None) is not None
    if is_initialized() and not (failed and "nccl" in dist.get_backend()):
        dist.destroy_process_group()
