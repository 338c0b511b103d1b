"""The ranks that save and load together: they exchange messages, and all raise if one fails."""

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

    Messages are bytes and JSON: nothing received from another process is executed.

    Args:
        group: A gloo group of these processes, used by nothing else; None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """Return the ranks of a job.

        Args:
            group: The user's group; None makes a group of all processes if torch.distributed has several.

        Raises:
            CheckpointError: The backend of the group is not gloo.
        """
        if group is None:
            if distributed.world_size() == 1:
                return cls(None)
            # A separate group: background saves must not interfere with the collectives of training.
            group = dist.new_group(backend="gloo", use_local_synchronization=True)
        if not hasattr(group, "name") or group.name() != "gloo":
            raise CheckpointError(
                f"Saver: group must be a gloo process group that nothing else uses, got {group!r}. Make one with "
                "torch.distributed.new_group(ranks, backend='gloo'), or omit it."
            )
        return cls(group)

    @property
    def buckets(self) -> tuple[int, int]:
        """The buckets that this rank owns: the first, and the one after the last."""
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
        """Call a function on every rank; if it fails on one, all raise, so that no rank waits forever.

        Args:
            work: May raise; returns a value that JSON can hold.

        Returns:
            The results by rank.

        Raises:
            CheckpointError: The function failed on another rank; the message says which and why. An exception on this
                rank is raised unchanged.
        """
        if self._group is None:
            return [work()]
        value: JSON = None
        failure: BaseException | None = None
        try:
            value = work()
        except BaseException as error:  # raised below, once the other ranks know
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
            failure = None  # break the cycle of the exception and this frame

    def send(self, data: Tensor, to: int, tag: int) -> None:
        """Send bytes to a rank that calls :meth:`receive`; return once they are sent.

        Args:
            data: uint8 ``[n]``, contiguous, on the CPU.
            to: Rank of the receiver.
            tag: The same at the receiver.
        """
        assert self._group is not None
        if data.numel():
            self._wait(lambda group: group.send([data], to, tag))

    def receive(self, size: int, source: int, tag: int) -> Tensor:
        """Receive uint8 ``[size]`` from a rank.

        Args:
            size: Number of bytes.
            source: Rank of the sender.
            tag: The same at the sender.
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
            "messages; earlier checkpoints are intact."
        )
