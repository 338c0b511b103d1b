"""Exchange: the all-to-all collectives of a process group.

All ranks call the same methods in the same order, even with nothing to send. Letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import distributed, ops
from recis_hybrid.validation import describe_value

WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExchangeError(RuntimeError):
    """The ranks of a group cannot continue together: one failed, died, hangs, or has other settings."""


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks; bytes to itself are not counted."""

    sizes: int = 0
    """Sizes of the other messages, numbers of samples, and settings that ranks compare."""
    ids: int = 0
    """Ids, 8 bytes each."""
    counts: int = 0
    """Number of times that each id occurs, in training."""
    rows: int = 0
    """Embeddings, from the owners of the rows."""
    gradients: int = 0
    """Row gradients, to the owners of the rows."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def total(self) -> int:
        """Sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass
class Transfer:
    """A collective in progress."""

    what: str
    received: Tensor
    work: dist.Work | None
    exchange: Exchange
    sent: Tensor
    """Held until the collective has ended."""

    def wait(self) -> Tensor:
        """Return the received tensor, from rank 0 first, after waiting."""
        with self.exchange.wait_context(), self.exchange.explained(self.what):
            if self.work is not None:
                self.work.wait()
        return self.received


class Exchange:
    """Collectives of one process group.

    Args:
        group: The ranks.
        device: Device of the tables; tensors are sent from there if the group's backend can.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # NCCL sends from GPUs only, Gloo from host memory.
        self.device = device if device.type == "cuda" and "nccl" in dist.get_backend(group) else torch.device("cpu")
        self.traffic = Traffic()
        self.wait_context: Callable[[], AbstractContextManager[None]] = nullcontext
        """Makes a context around each wait for other ranks, to time it."""

    def sizes(self, send: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Send each rank a row of int64 ``[W, n]``; n is the same on all ranks. Waits.

        Returns:
            The numbers sent to each rank, and those received from it, n each.
        """
        send = send.to(self.device)
        receive = self.start("sizes", send, [1] * self.size, [1] * self.size).wait()
        sent, received = torch.stack([send, receive]).tolist()
        return sent, received

    def start(
        self,
        what: Literal["sizes", "ids", "counts", "rows", "gradients"],
        values: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
    ) -> Transfer:
        """Start sending each rank a slice of the first dimension, rank 0 the first slice.

        Args:
            what: Kind of the message, for ``traffic`` and error messages.
            values: ``[sum(send), ...]``.
            send: For each rank, the length of the slice sent to it.
            receive: For each rank, the length of the slice received from it.
        """
        values = values.to(self.device).contiguous()
        received = ops.memory.empty((sum(receive), *values.shape[1:]), values.dtype, self.device)
        each = values[0].numel() if len(values) else int(values.shape[1:].numel())
        remote = sum(send) - send[self.rank]
        setattr(self.traffic, what, getattr(self.traffic, what) + remote * each * values.element_size())
        with self.explained(what):
            work = dist.all_to_all_single(received, values, list(receive), list(send), group=self.group, async_op=True)
        return Transfer(what, received, work, self, values)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        total = value.detach().to(self.device, copy=True)
        with self.wait_context(), self.explained("norms"):
            dist.all_reduce(total, group=self.group)
        return total.to(value.device)

    def all(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the numbers of every rank, as many on each."""
        return self.sizes(torch.tensor(numbers, dtype=torch.int64).expand(self.size, -1))[1]

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn an error of the backend into an ExchangeError that says what was being exchanged."""
        try:
            yield
        except ExchangeError:
            raise
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {self.rank} of {self.size}: the exchange of {what} between embedding tables failed: another "
                f"rank has died or raised an error, or does not take part; see the errors of the others first, and "
                f"restart all ranks from a checkpoint. The backend says: {error}"
            ) from error


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Return the timeout of a group's collectives; None for torch's default."""
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


def group_of(group: dist.ProcessGroup | Literal[False] | None) -> dist.ProcessGroup | None:
    """Return the group whose ranks share an engine's tables; None where one process has them all.

    Args:
        group: A process group; None for all ranks, which this process joins if a launcher has started several; False
            for this process alone.

    Raises:
        RuntimeError: If the processes of a launcher cannot be joined.
        TypeError: If it is none of these.
        ValueError: If this rank is not in the group.
    """
    # `new_group` gives a number to the ranks that are not in the group.
    kinds = (dist.ProcessGroup,) if dist.is_available() else ()
    outside = dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER
    if not (group is None or group is False or outside or isinstance(group, kinds)):
        raise TypeError(
            f"EmbeddingEngine: group must be a process group, None for all ranks, or False for this process alone, "
            f"got {describe_value(group)}"
        )
    if group is None:
        distributed.join("EmbeddingEngine")
    if group is False or not distributed.is_initialized():
        return None
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(
            f"EmbeddingEngine: rank {dist.get_rank()} is not in the process group {group!r}; build the engine on the "
            f"group's ranks only, or with group=False"
        )
    return group if dist.get_world_size(group) > 1 else None
