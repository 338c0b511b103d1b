"""The processes that save and load together: what they tell each other, and how all of them fail alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid.checkpointing import owned_buckets
from recis_hybrid.saver.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint
from recis_hybrid.saver.parts.protocol import JSON

_ERRORS = {error.__name__: error for error in (CheckpointError, CheckpointMismatch, CorruptCheckpoint)}


class Ranks:
    """This process among those that save together.

    Everything is exchanged as bytes and JSON: nothing that comes from another process is executed.

    Args:
        group: a gloo group of them that nobody else uses; None for a process that is alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """Find the processes of a job.

        Args:
            group: as the user gave it; None makes a group of all processes, where torch.distributed has several.

        Raises:
            CheckpointError: the group is not of gloo.
        """
        if group is None:
            if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
                return cls(None)
            # A group of its own: a save in the background must not meet the collectives of the training.
            group = dist.new_group(backend="gloo", use_local_synchronization=True)
        if not hasattr(group, "name") or group.name() != "gloo":
            raise CheckpointError(
                f"Saver: group must be a gloo process group that nothing else uses, got {group!r}. Make one with "
                "torch.distributed.new_group(ranks, backend='gloo'), or leave it out."
            )
        return cls(group)

    @property
    def buckets(self) -> tuple[int, int]:
        """The first bucket that is this rank's, and the one after its last."""
        return owned_buckets(self.rank, self.size)

    def exchange(self, value: Any) -> list[Any]:
        """Return what every rank gave, in their order.

        Args:
            value: what JSON can hold.
        """
        if self._group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self._gathered(torch.tensor([data.numel()]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = self._gathered(padded)
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def together(self, work: Callable[[], JSON]) -> list[Any]:
        """Let every rank do its work; where one fails, all raise, and none waits for it for ever.

        Args:
            work: may raise; returns what JSON can hold.

        Returns:
            What the work of every rank returned, in their order.

        Raises:
            CheckpointError: the work of another rank failed; it says which and why. A failure of its own is raised as
                it is.
        """
        if self._group is None:
            return [work()]
        value: JSON = None
        failure: BaseException | None = None
        try:
            value = work()
        except BaseException as error:  # the others must hear of it
            failure = error
        answers = self.exchange([value, None if failure is None else [type(failure).__name__, str(failure)]])
        try:
            if failure is not None:
                raise failure
        finally:
            failure = None  # or the error and this frame would keep each other
        for rank, (_, told) in enumerate(answers):
            if told is not None:
                raise _ERRORS.get(told[0], CheckpointError)(f"rank {rank} of {self.size} failed: {told[1] or told[0]}")
        return [answer for answer, _ in answers]

    def send(self, data: Tensor, to: int, tag: int) -> None:
        """Send bytes to a rank that receives them; returns when they are on their way.

        Args:
            data: uint8 [n], contiguous, on the CPU.
            to: the rank.
            tag: as the receiver has it.
        """
        assert self._group is not None
        if data.numel():
            self._done(lambda group: group.send([data], to, tag))

    def receive(self, size: int, source: int, tag: int) -> Tensor:
        """Receive bytes, uint8 [size], that a rank sends.

        Args:
            size: how many.
            source: the rank.
            tag: as the sender has it.
        """
        data = torch.empty(size, dtype=torch.uint8)
        if size:
            self._done(lambda group: group.recv([data], source, tag))
        return data

    def _gathered(self, data: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(data) for _ in range(self.size)]
        self._done(lambda group: group.allgather([parts], [data]))
        return parts

    def _done(self, start: Callable[[Any], Any]) -> None:
        try:
            start(self._group).wait()
        except RuntimeError as error:
            raise CheckpointError(
                f"Saver: rank {self.rank} of {self.size} lost another one ({error}). See what it said last; the "
                "checkpoints before are whole."
            ) from error
