"""The processes that save and load together: what they tell each other, and how all of them fail alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import distributed
from recis_hybrid.checkpointing import JSON, owned_buckets
from recis_hybrid.saver.errors import CheckpointError, CheckpointMismatch, CorruptCheckpoint

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
            if distributed.world_size() == 1:
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
        """Return the values of all ranks, by rank.

        Args:
            value: Anything that JSON can hold.
        """
        if self._group is None:
            return [value]
        try:
            return distributed.exchange(value, self._group)
        except RuntimeError as error:
            raise self._lost(error) from error

    def together(self, work: Callable[[], JSON]) -> list[Any]:
        """Call a function on every rank; if one fails, all raise, and none waits for it for ever.

        Args:
            work: May raise; returns what JSON can hold.

        Returns:
            The results of all ranks, by rank.

        Raises:
            CheckpointError: The function failed on another rank; the message says which and why. This rank's own
                exception is raised as it is.
        """
        if self._group is None:
            return [work()]
        value: JSON = None
        failure: BaseException | None = None
        try:
            value = work()
        except BaseException as error:  # raised again below, once the others know
            failure = error
        try:
            return distributed.all_succeed_or_raise(failure, value, self._group)
        except distributed.OtherRankError as error:
            raise _ERRORS.get(error.kind, CheckpointError)(str(error)) from None
        except RuntimeError as error:
            if error is failure:
                raise
            raise self._lost(error) from error
        finally:
            failure = None  # else the exception and this frame would refer to each other

    def send(self, data: Tensor, to: int, tag: int) -> None:
        """Send bytes to a rank that receives them; returns when they are on their way.

        Args:
            data: uint8 [n], contiguous, on the CPU.
            to: the rank.
            tag: as the receiver has it.
        """
        assert self._group is not None
        if data.numel():
            self._wait(lambda group: group.send([data], to, tag))

    def receive(self, size: int, source: int, tag: int) -> Tensor:
        """Receive bytes, uint8 [size], that a rank sends.

        Args:
            size: how many.
            source: the rank.
            tag: as the sender has it.
        """
        data = torch.empty(size, dtype=torch.uint8)
        if size:
            self._wait(lambda group: group.recv([data], source, tag))
        return data

    def _wait(self, start: Callable[[Any], Any]) -> None:
        try:
            start(self._group).wait()
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> CheckpointError:
        return CheckpointError(
            f"Saver: rank {self.rank} of {self.size} lost the connection to another ({error}). See that rank's last "
            "messages; earlier checkpoints are whole."
        )
