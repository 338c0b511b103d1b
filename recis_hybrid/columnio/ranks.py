"""Which share of the rows a process reads, where nobody says so."""

from __future__ import annotations

import os

import torch.distributed as dist


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Fills in this process's number and how many there are.

    Args:
        rank: As given.
        world_size: As given.

    Returns:
        What was given; for None what torch.distributed says once it is initialised, then torchrun's environment (RANK
        and WORLD_SIZE), then 0 of 1.

    Raises:
        ValueError: Only one was given, or only one is in the environment.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"ColumnDataset: rank and world_size must be given together, got {rank} and {world_size}; leave both out "
            f"to take torch.distributed's"
        )
    if rank is not None and world_size is not None:
        return rank, world_size
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    texts = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if texts == (None, None):
        return 0, 1
    try:
        return int(texts[0] or ""), int(texts[1] or "")
    except ValueError:
        raise ValueError(
            f"ColumnDataset: the environment has RANK={texts[0]} and WORLD_SIZE={texts[1]}, of which both must be "
            f"integers; start with torchrun, or give rank and world_size"
        ) from None
