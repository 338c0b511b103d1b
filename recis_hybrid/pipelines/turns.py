"""Turns: ranks agree on each step before it starts, so that none waits for a rank without batches.

What a rank has read for a step it announces, and it looks at what the others have announced once that step's turn
comes: a step later, as a rule, when the answers are there. A rank that has no batch left takes part with an empty one
until all ranks have come to the end of their pass.
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

_ENDED, _FAILED, _BARE, _INTERRUPTED = 1, 2, 4, 8


class RanksInterrupted(Exception):
    """Some rank received a signal to end; raised on all ranks at the same turn."""


@dataclass(frozen=True)
class Agreed:
    """The announcements of all ranks for a turn."""

    ended: bool
    """Whether all ranks have reached the end of their pass."""
    rows: list[list[int]]
    """For each batch of the turn, its rows on each rank."""
    alike: bool
    """Whether all ranks announced the digest of a batch, and the same one."""


@dataclass(frozen=True, eq=False)
class Announcement:
    """This rank's announcement, with those of the others pending."""

    batches: int
    received: Tensor
    work: Any
    sent: Tensor
    """Kept alive until the exchange completes."""

    def agreed(self, failure: Exception | None = None) -> Agreed:
        """Wait for the other ranks.

        Args:
            failure: What kept this rank from reading; raised, as the others raise ExchangeError.

        Raises:
            ExchangeError: Another rank has failed or died.
            RanksInterrupted: A signal has asked some rank to end.
            ValueError: A rank has no batch at all, and cannot know the columns of an empty one.
        """
        rank = distributed.rank()
        try:
            self.work.wait()
        except RuntimeError as error:
            raise ExchangeError(
                f"rank {rank} of {distributed.world_size()}: another rank has died or raised an error, or has not come "
                f"to this step; see what the others say first, and start all ranks anew from a checkpoint. The "
                f"backend says: {error}"
            ) from error
        if failure is not None:
            raise failure
        lines: list[list[int]] = self.received.tolist()
        if failed := [other for other, line in enumerate(lines) if line[0] & _FAILED and other != rank]:
            raise ExchangeError(f"rank {rank}: the ranks {failed} could not read their next batch; see what they say")
        if any(line[0] & _INTERRUPTED for line in lines):
            raise RanksInterrupted
        columns = [list(column) for column in zip(*(line[2:] for line in lines), strict=True)]
        rows = [column for column in columns if max(column) >= 0]
        lacking = [r for r, line in enumerate(lines) if line[0] & _BARE and any(column[r] < 0 for column in rows)]
        if lacking:
            raise ValueError(
                f"the ranks {lacking} were given no batch at all, and others were; give every rank at least one"
            )
        return Agreed(
            all(line[0] & _ENDED for line in lines),
            [[max(count, 0) for count in column] for column in rows],
            lines[0][1] != 0 and all(line[1] == lines[0][1] for line in lines),
        )


def announce(
    batches: list[Batch],
    most: int,
    *,
    ended: bool,
    bare: bool = False,
    failed: bool = False,
    interrupted: bool = False,
    digest: int = 0,
) -> Announcement:
    """Announce this rank's batches of a turn to the others; collective.

    Args:
        batches: At most ``most``.
        most: Batches of a turn.
        ended: Whether this rank's pass has come to its end.
        bare: Whether this rank has met no batch yet.
        failed: Whether it could not read.
        interrupted: Whether a signal asks it to end.
        digest: Of this rank's first batch, in its turn; 0 later.
    """
    flags = _ENDED * ended + _FAILED * failed + _BARE * bare + _INTERRUPTED * interrupted
    sent = torch.tensor(
        [flags, digest, *map(_rows, batches), *[-1] * (most - len(batches))], dtype=torch.int64, device="cpu"
    )
    received = torch.empty(distributed.world_size(), len(sent), dtype=torch.int64, device="cpu")
    parts = list(received.unbind(0))
    work = dist.all_gather(parts, sent, group=distributed.message_group(), async_op=True)
    return Announcement(len(batches), received, work, sent)


def _rows(batch: Any) -> int:
    """Return the number of rows; the largest if columns differ, which a transform may still change."""
    if isinstance(batch, RaggedTensor):
        return batch.batch_size
    if isinstance(batch, Mapping):
        return max(map(_rows, batch.values()), default=0)
    if isinstance(batch, list | tuple):
        return max(map(_rows, batch), default=0) if _holds_columns(batch) else len(batch)
    shape = getattr(batch, "shape", None)
    return int(shape[0]) if shape else 0


def without_rows(batch: Any) -> Any:
    """Return an empty batch of the same columns, in its own memory.

    Args:
        batch: Columns by name, or what a transform makes them from: tensors, arrays and lists, within tuples.
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
    """Return whether a list contains columns, as (inputs, labels), and is not itself a column, as of strings."""
    return any(isinstance(value, RaggedTensor | Mapping) or getattr(value, "shape", None) for value in values)


def digest_of(batch: Any) -> int:
    """Return a positive digest of a batch."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, RaggedTensor):
            add((value.values, value.offsets))
        elif isinstance(value, Mapping):
            add([*value.items()])
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)
        else:
            found.update(repr(value).encode())

    add(batch)
    return int.from_bytes(found.digest()[:7], "little") + 1


def in_turns(data: Iterable[Batch], interruption: Interruption | None = None) -> Iterator[Batch]:
    """Yield the batches of a pass, equally many on all ranks: empty ones once a rank has no more.

    Args:
        data: This rank's batches.
        interruption: Of the training that this belongs to.

    Raises:
        ExchangeError: Another rank has failed or died.
        RanksInterrupted: A signal has asked some rank to end.
        ValueError: A rank has no batch at all, and others have.
        WaitInterrupted: A signal has asked this process to end, and it is alone.
    """
    # A DataLoader draws a seed as it begins, which an evaluation is not to take from the training's generator.
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
            batches, 1, ended=ended, bare=empty is None, failed=failure is not None, interrupted=interrupted
        )

    batches, announced = read()
    while batches or not alone:
        following: tuple[list[Batch], Announcement | None] | None = None
        if announced is not None:
            agreed = announced.agreed(failure)
            if agreed.ended:
                return
            if not batches:
                assert empty is not None
                batches = [empty]
            following = read()
        yield batches[0]
        batches, announced = following or read()
