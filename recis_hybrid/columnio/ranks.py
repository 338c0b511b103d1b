"""Rank and world size of a dataset, and the check that all ranks opened the same data."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from torch.utils.data import get_worker_info

from recis_hybrid import distributed
from recis_hybrid.columnio.options import ShardOptions, Uneven

T = TypeVar("T")
# Maximum number of files in a message, and of characters per value.
_SHOWN, _LENGTH = 5, 80


@dataclass
class Opening:
    """A dataset being opened, by all ranks together or by one process alone."""

    rank: int
    """Rank of this process."""
    world_size: int
    """Number of processes that share the rows."""
    uneven: Uneven
    """See ``ShardOptions``."""
    follows_group: bool
    """True if rank and world size are those of torch.distributed."""
    together: bool
    """True if other ranks open the dataset too and compare ``settings``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that must be equal on all ranks, in JSON types."""
    notes: str = ""
    """Text shown if the settings differ; not compared."""


def _rank_and_world_size(shard: ShardOptions) -> tuple[int, int]:
    if shard.rank is not None and shard.world_size is not None:
        return shard.rank, shard.world_size
    distributed.join("ColumnDataset")
    if distributed.is_initialized():
        return distributed.rank(), distributed.world_size()
    return distributed.launcher_rank_and_size("ColumnDataset")


def has_other_ranks() -> bool:
    """Return whether collectives reach other ranks; False in a DataLoader worker."""
    return get_worker_info() is None and distributed.world_size() > 1


@cache
def warn_gradients_not_averaged() -> None:
    """Warn once if a loop written for one process runs on several ranks that do not average gradients."""
    if distributed.averages_no_gradients():
        warnings.warn(
            f"ColumnDataset: rank {distributed.rank()} of {distributed.world_size()} read its share of the rows, but "
            f"nothing is known to average gradients over the ranks; train with pipelines.Trainer, or, if the loop "
            f"averages them itself, call torch.distributed.init_process_group(...) when the program starts",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def open_on_all_ranks(shard: ShardOptions) -> Iterator[Opening]:
    """Run a block on all ranks to open a dataset: all succeed with equal settings, or all raise. Collective.

    Without an explicit rank, the rank of torch.distributed is used; if a launcher started several processes, the
    default group is initialized first. A DataLoader worker takes its rank from the launcher's environment variables and
    compares nothing. A process with an explicit rank compares nothing either, because it may open the dataset alone.

    Args:
        shard: Rank and world size, if explicit.

    Yields:
        The rank and world size; the block fills in the settings.

    Raises:
        RuntimeError: The launched processes cannot form a process group.
        ValueError: Another rank failed or has different settings, or the environment has no valid rank and world size.
    """
    follows_group = shard.rank is None
    opening = Opening(
        *_rank_and_world_size(shard), shard.uneven, follows_group, together=follows_group and has_other_ranks()
    )
    failure: Exception | None = None
    try:
        yield opening
    except Exception as error:
        if not opening.together:
            raise
        failure = error
    if opening.together:
        _compare(failure, opening.settings, opening.notes)


def _compare(failure: Exception | None, settings: Mapping[str, Any], notes: str) -> None:
    try:
        digests = distributed.all_succeed_or_raise(failure, hashlib.blake2b(repr(settings).encode()).hexdigest())
    except distributed.OtherRankError as error:
        raise ValueError(
            f"ColumnDataset: rank {error.rank} could not open the dataset ({error.kind}: {error.text}); all ranks must "
            f"open the same data, so all of them stop"
        ) from error
    finally:
        failure = None  # else the exception and this frame would refer to each other
    if len(set(digests)) > 1:
        ranks = distributed.exchange([settings, notes])
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        differences = _differences(ranks[0][0], ranks[other][0], other)
        noted = "".join(f"; rank {rank} {notes}" for rank, (_, notes) in enumerate(ranks) if notes)
        raise ValueError(
            f"ColumnDataset: all ranks must open the same data, but rank {other} differs from rank 0: "
            f"{differences}{noted}; open it with the same files and options on all ranks, once all files are there"
        )


def choose_on_first_rank(choose: Callable[[], T]) -> T:
    """Return the choice of rank 0 on all ranks; collective.

    Args:
        choose: Called on rank 0 only; returns a value in JSON types.

    Raises:
        RuntimeError: ``choose`` failed on rank 0, which raises the original error.
    """
    choice: T | None = None
    failure: Exception | None = None
    if distributed.rank() == 0:
        try:
            choice = choose()
        except Exception as error:
            failure = error
    try:
        result: T = distributed.all_succeed_or_raise(failure, choice)[0]
    except distributed.OtherRankError as error:
        raise RuntimeError(
            f"columnio: rank 0, which chooses for all ranks, failed: {error.kind}: {error.text}"
        ) from error
    finally:
        failure = None  # else the exception and this frame would refer to each other
    return result


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], rank: int) -> str:
    texts = []
    for name in first:
        one, other = first[name], second[name]
        if not isinstance(one, dict):
            texts += [f"{name} is {_short(one)} on rank 0 and {_short(other)} on rank {rank}"] * (one != other)
            continue
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        texts += [
            f"{key} has {_short(one.get(key))} on rank 0 and {_short(other.get(key))} on rank {rank}"
            for key in keys[:_SHOWN]
        ]
        texts += [f"{len(keys) - _SHOWN} more"] * (len(keys) > _SHOWN)
    return ", ".join(texts) or "its files are in a different order"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}..."
