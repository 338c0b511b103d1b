"""Lockstep: ranks agree on each step before it starts, so that none waits for a rank without batches.

A rank announces the batches that it has read for a step and reads the announcements of the other ranks when the step
starts, usually one step later, when they have arrived. A rank that runs out of batches takes part with empty ones until
all ranks have reached the end of their pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import distributed
from recis_hybrid.embedding import ExchangeError
from recis_hybrid.pipelines.interruption import Interruption, WaitInterrupted
from recis_hybrid.ragged import Batch, RaggedTensor

# Flags of an announcement. NO_COLUMNS: the rank has read no batch yet and cannot build an empty one.
_ENDED, _FAILED, _NO_COLUMNS, _INTERRUPTED = 1, 2, 4, 8


class RanksInterrupted(Exception):
    """A rank received a signal to terminate; raised on all ranks at the same step."""


@dataclass(frozen=True)
class Agreement:
    """The announcements of all ranks for a step."""

    ended: bool
    """True if all ranks have reached the end of their pass."""
    rows: list[list[int]]
    """For each batch of the step, its number of rows on each rank."""
    alike: bool
    """True if all ranks announced the same digest."""


@dataclass(frozen=True, eq=False)
class Announcement:
    """This rank's announcement; those of the other ranks are pending."""

    batches: int
    received: Tensor
    work: Any
    sent: Tensor
    """Kept alive until the exchange completes."""

    def wait(self, failure: Exception | None = None) -> Agreement:
        """Wait for the announcements of the other ranks.

        Args:
            failure: This rank's error in reading; raised here, while the other ranks raise ExchangeError.

        Raises:
            ExchangeError: Another rank failed or died.
            RanksInterrupted: A rank received a signal to terminate.
            ValueError: A rank has no batch at all, so the columns of an empty one are unknown.
        """
        rank = distributed.rank()
        try:
            self.work.wait()
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {rank} of {distributed.world_size()}: another rank died, raised an error, or did not reach this "
                f"step; read the messages of the other ranks first, then restart all ranks from a checkpoint. The "
                f"backend reports: {error}"
            ) from error
        if failure is not None:
            raise failure
        lines: list[list[int]] = self.received.tolist()
        if failed := [other for other, line in enumerate(lines) if line[0] & _FAILED and other != rank]:
            raise ExchangeError(f"rank {rank}: ranks {failed} could not read their next batch; see their messages")
        if any(line[0] & _INTERRUPTED for line in lines):
            raise RanksInterrupted
        columns = [list(column) for column in zip(*(line[2:] for line in lines), strict=True)]
        rows = [column for column in columns if max(column) >= 0]
        empty = [r for r, line in enumerate(lines) if line[0] & _NO_COLUMNS and any(column[r] < 0 for column in rows)]
        if empty:
            raise ValueError(f"ranks {empty} have no batch, but others do; give every rank at least one batch")
        return Agreement(
            all(line[0] & _ENDED for line in lines),
            [[max(count, 0) for count in column] for column in rows],
            lines[0][1] != 0 and all(line[1] == lines[0][1] for line in lines),
        )


def announce(
    batches: list[Batch],
    most: int,
    *,
    ended: bool,
    no_columns: bool = False,
    failed: bool = False,
    interrupted: bool = False,
    digest: int = 0,
) -> Announcement:
    """Announce this rank's batches of a step to the other ranks; collective.

    Args:
        batches: At most ``most``.
        most: Maximum number of batches per step.
        ended: Whether this rank's pass has ended.
        no_columns: Whether this rank has read no batch yet.
        failed: Whether this rank failed to read.
        interrupted: Whether this rank received a signal to terminate.
        digest: Digest of this rank's first batch, announced with it; 0 afterwards.
    """
    flags = _ENDED * ended + _FAILED * failed + _NO_COLUMNS * no_columns + _INTERRUPTED * interrupted
    sent = torch.tensor(
        [flags, digest, *map(_rows, batches), *[-1] * (most - len(batches))], dtype=torch.int64, device="cpu"
    )
    received = torch.empty(distributed.world_size(), len(sent), dtype=torch.int64, device="cpu")
    parts = list(received.unbind(0))
    work = dist.all_gather(parts, sent, group=distributed.message_group(), async_op=True)
    return Announcement(len(batches), received, work, sent)


def _rows(batch: Any) -> int:
    """Return the number of rows. If columns differ, return the largest: a transform may still change them."""
    if isinstance(batch, RaggedTensor):
        return batch.batch_size
    if isinstance(batch, Mapping):
        return max(map(_rows, batch.values()), default=0)
    if isinstance(batch, list | tuple):
        return max(map(_rows, batch), default=0) if _holds_columns(batch) else len(batch)
    shape = getattr(batch, "shape", None)
    return int(shape[0]) if shape else 0


def without_rows(batch: Any) -> Any:
    """Return an empty batch with the same columns, which shares no memory with the batch.

    Args:
        batch: Columns by name, or the input of a transform: nested tuples of tensors, arrays and lists.
    """
    if isinstance(batch, Tensor):
        return batch[:0].clone() if batch.dim() > 0 else batch
    if isinstance(batch, RaggedTensor):
        return batch[torch.empty(0, dtype=torch.int64, device=batch.device)]
    if isinstance(batch, Mapping):
        return {name: without_rows(column) for name, column in batch.items()}
    if isinstance(batch, list | tuple):
        if not _holds_columns(batch):
            return type(batch)()
        columns = map(without_rows, batch)
        return type(batch)(*columns) if hasattr(batch, "_fields") else type(batch)(columns)
    if getattr(batch, "shape", None):
        return batch[:0].copy() if hasattr(batch, "copy") else batch[:0]
    return batch


def _holds_columns(values: Sequence[Any]) -> bool:
    """Return whether a list contains columns, like (inputs, labels), rather than being one, like a list of strings."""
    return any(isinstance(value, RaggedTensor | Mapping) or getattr(value, "shape", None) for value in values)


def digest_of(batch: Any) -> int:
    """Return a positive digest of a batch."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, RaggedTensor):
            add((value.values, value.offsets))
        elif isinstance(value, Mapping):
            add([*value.items()])
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)
        else:
            digest.update(repr(value).encode())

    add(batch)
    return int.from_bytes(digest.digest()[:7], "little") + 1


def in_lockstep(data: Iterable[Batch], interruption: Interruption | None = None) -> Iterator[Batch]:
    """Yield the batches of a pass, the same number on all ranks; a rank that runs out yields empty ones.

    Args:
        data: This rank's batches.
        interruption: Interruption of the surrounding training.

    Raises:
        ExchangeError: Another rank failed or died.
        RanksInterrupted: A rank received a signal to terminate.
        ValueError: A rank has no batch at all, but others do.
        WaitInterrupted: This process, the only one, received a signal to terminate.
    """
    # A DataLoader draws a seed when it starts. An evaluation must not advance the training's generator.
    with torch.random.fork_rng(devices=[]):
        iterator = iter(data)
    alone = distributed.world_size() == 1
    interruptible = nullcontext if interruption is None else interruption.waiting
    empty: Batch | None = None
    ended = False
    failure: Exception | None = None

    def read() -> tuple[list[Batch], Announcement | None]:
        nonlocal empty, ended, failure
        batches: list[Batch] = []
        interrupted = False
        try:
            if not ended:
                with interruptible():
                    batches = [batch] if (batch := next(iterator, None)) is not None else []
                ended = not batches
        except WaitInterrupted:
            if alone:
                raise
            batches, interrupted = [], True
        except Exception as error:
            if alone:
                raise
            failure = error
        if alone:
            return batches, None
        if batches and empty is None:
            empty = without_rows(batches[0])
        interrupted = interrupted or (interruption is not None and interruption.requested is not None)
        return batches, announce(
            batches, 1, ended=ended, no_columns=empty is None, failed=failure is not None, interrupted=interrupted
        )

    batches, announcement = read()
    while batches or not alone:
        following: tuple[list[Batch], Announcement | None] | None = None
        if announcement is not None:
            agreement = announcement.wait(failure)
            if agreement.ended:
                return
            if not batches:
                assert empty is not None
                batches = [empty]
            following = read()
        yield batches[0]
        batches, announcement = following or read()
