"""Exchange: the all-to-all collectives of a process group.

All ranks call the same methods in the same order, even with nothing to send. Letter: W ranks.
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
from recis_hybrid.accelerator import copied, is_accelerator
from recis_hybrid.validation import describe_value

WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExchangeError(RuntimeError):
    """The ranks of a group cannot continue together: one failed, died, hangs, or has different settings."""


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks; bytes to itself are not counted."""

    sizes: int = 0
    """Sizes of the other messages, numbers of samples, and compared settings."""
    ids: int = 0
    """Ids, 8 bytes each."""
    counts: int = 0
    """Number of occurrences of each id, in training."""
    rows: int = 0
    """Embeddings, from the owners of the rows."""
    gradients: int = 0
    """Row gradients, to the owners of the rows."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def total(self) -> int:
        """Sum over all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass
class Transfer:
    """A collective in progress."""

    what: str
    received: Tensor
    work: dist.Work | None
    exchange: Exchange
    sent: Tensor
    """Keeps the sent tensor alive until the collective has completed."""

    def wait(self) -> Tensor:
        """Wait, and return the received tensor, ordered by rank."""
        with self.exchange.wait_context(), self.exchange.explained(self.what):
            if self.work is not None:
                self.work.wait()
        return self.received


class Exchange:
    """Collectives of one process group.

    Args:
        group: The ranks.
        device: Device of the tables; tensors are sent from it if the group's backend supports that.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.rank = distributed.rank(group)
        self.size = distributed.world_size(group)
        # NCCL sends from GPUs only, Gloo from host memory.
        self.device = device if is_accelerator(device) and "nccl" in dist.get_backend(group) else torch.device("cpu")
        self.traffic = Traffic()
        self.wait_context: Callable[[], AbstractContextManager[None]] = nullcontext
        """Factory of a context around each wait for other ranks, e.g. to time it."""

    def sizes(self, send: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Send each rank a row of int64 ``[W, n]``, with the same n on all ranks, and wait.

        Returns:
            The n numbers sent to each rank, and the n numbers received from it.
        """
        send = copied(send, self.device)
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
        """Start sending each rank a slice along the first dimension, in rank order.

        Args:
            what: Kind of message, for ``traffic`` and error messages.
            values: ``[sum(send), ...]``.
            send: For each rank, the length of the slice sent to it.
            receive: For each rank, the length of the slice received from it.
        """
        values = copied(values, self.device).contiguous()
        received = ops.memory.empty((sum(receive), *values.shape[1:]), values.dtype, self.device)
        width = values[0].numel() if len(values) else int(values.shape[1:].numel())
        remote = sum(send) - send[self.rank]
        setattr(self.traffic, what, getattr(self.traffic, what) + remote * width * values.element_size())
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
        """Return the numbers of every rank; all ranks must pass equally many."""
        return self.sizes(torch.tensor(numbers, dtype=torch.int64).expand(self.size, -1))[1]

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Convert errors of the backend to an ExchangeError that names the kind of message."""
        try:
            yield
        except ExchangeError:
            raise
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {self.rank} of {self.size}: the exchange of {what} between embedding tables failed: another "
                f"rank has died, raised an error, or does not take part; check the errors of the other ranks first, "
                f"and restart all ranks from a checkpoint. Error of the backend: {error}"
            ) from error


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Return the timeout of a group's collectives; None for torch's default."""
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


def group_of(group: dist.ProcessGroup | Literal[False] | None) -> dist.ProcessGroup | None:
    """Return the group whose ranks share an engine's tables; None if this process has all tables.

    Args:
        group: A process group; None: all ranks, which this process joins if a launcher has started several; False:
            only this process.

    Raises:
        RuntimeError: If the processes of a launcher cannot be joined.
        TypeError: If the argument is none of these.
        ValueError: If this rank is not in the group.
    """
    # `new_group` returns a number to the ranks that are not in the group.
    kinds = (dist.ProcessGroup,) if dist.is_available() else ()
    outside = dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER
    if not (group is None or group is False or outside or isinstance(group, kinds)):
        raise TypeError(
            f"EmbeddingEngine: group must be a process group, None for all ranks, or False for only this process, "
            f"got {describe_value(group)}"
        )
    if group is None:
        distributed.join("EmbeddingEngine")
    if group is False or not distributed.is_initialized():
        return None
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"EmbeddingEngine: rank {distributed.rank()} is not in the process group {group!r}; build the engine on "
            f"the group's ranks only, or with group=False"
        )
    return group if distributed.world_size(group) > 1 else None
