"""What ranks of torch.distributed find out together, so that none waits for one that saw other files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist
from torch.utils.data import get_worker_info

from recis_hybrid import distributed

T = TypeVar("T")
# How many files a message names, and letters of each value.
_SHOWN, _LENGTH = 5, 80


def has_other_ranks() -> bool:
    """Return whether this process can talk to other ranks: a DataLoader's worker has their group by name only."""
    initialized = dist.is_available() and dist.is_initialized()
    return initialized and get_worker_info() is None and dist.get_world_size() > 1


@cache
def warn_unattended() -> None:
    """Warn once, in a loop written for one process, that this rank reads only its share of the rows."""
    if distributed.averages_no_gradients():
        warnings.warn(
            f"ColumnDataset: rank {distributed.rank()} of {distributed.world_size()} was given its share of the rows, "
            f"and nothing is known to average what it learns from them over the ranks; train with pipelines.Trainer, "
            f"or call torch.distributed.init_process_group(...) at the program's start to say that the loop does it",
            RuntimeWarning,
            stacklevel=2,
        )


@contextmanager
def agreement(together: bool) -> Iterator[dict[str, Any]]:
    """Run the same on all ranks, which either all come to the same or all raise.

    It yields a dictionary for what all ranks must find alike; what is under `"notes"` is only shown if they do not.

    Args:
        together: Whether there are other ranks that do it at the same time.

    Raises:
        ValueError: Another rank failed, or found something else.
    """
    found: dict[str, Any] = {}
    try:
        yield found
    except Exception as error:
        if together:
            _gathered((f"{type(error).__name__}: {error}", ""))
        raise
    if not together:
        return
    notes = found.pop("notes", "")
    ranks = _gathered((None, hashlib.blake2b(repr(found).encode()).hexdigest()))
    for rank, (failure, _) in enumerate(ranks):
        if failure is not None:
            raise ValueError(
                f"ColumnDataset: rank {rank} could not open the data set ({failure}); this rank could, but all "
                f"must read the same"
            )
    if len({digest for _, digest in ranks}) > 1:
        # All ranks have seen that, so that all come here.
        every = _gathered((found, notes))
        other = next(rank for rank, (_, digest) in enumerate(ranks) if digest != ranks[0][1])
        differences = _differences(every[0][0], every[other][0], other)
        noted = "".join(f"; rank {rank} {notes}" for rank, (_, notes) in enumerate(every) if notes)
        raise ValueError(
            f"ColumnDataset: all ranks must open the same, and rank {other} found other things than rank 0: "
            f"{differences}{noted}; open it alike on all ranks, once all files are there"
        )


def first_rank_says(say: Callable[[], T]) -> T:
    """Return what the first rank finds, on all ranks.

    Args:
        say: Called on rank 0 alone.

    Raises:
        RuntimeError: It failed there. Rank 0 raises the error itself.
    """
    said: list[Any] = [None, None]
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            said[0] = say()
        except Exception as error:
            failed, said[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(said, src=0)
    if failed is not None:
        raise failed
    if said[1] is not None:
        raise RuntimeError(f"columnio: rank 0, which chooses for all, failed: {said[1]}")
    found: T = said[0]
    return found


def _gathered(own: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], rank: int) -> str:
    said = []
    for name in first:
        one, other = first[name], second[name]
        if not isinstance(one, dict):
            said += [f"{name} is {_short(one)} on rank 0 and {_short(other)} on rank {rank}"] * (one != other)
            continue
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        said += [
            f"{key} has {_short(one.get(key))} on rank 0 and {_short(other.get(key))} on rank {rank}"
            for key in keys[:_SHOWN]
        ]
        said += [f"{len(keys) - _SHOWN} more"] * (len(keys) > _SHOWN)
    return ", ".join(said) or "its files are in another order"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}..."
