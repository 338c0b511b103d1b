"""Which share of the rows a process reads, where nobody says so."""

from __future__ import annotations

from recis_hybrid import distributed


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Fill in this process's number and how many there are.

    Args:
        rank: As given.
        world_size: As given.

    Returns:
        What was given; for None what torch.distributed says, which is initialised where a launcher has started several
        processes; 0 of 1 without it. In a worker of a DataLoader, what the launcher says.

    Raises:
        RuntimeError: The processes of a launcher cannot be joined.
        ValueError: Only one was given, or the environment holds no rank and world size.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"ColumnDataset: rank and world_size must be given together, got {rank} and {world_size}; leave both out "
            f"to take torch.distributed's"
        )
    if rank is not None and world_size is not None:
        return rank, world_size
    distributed.join("ColumnDataset")
    if distributed.is_initialized():
        return distributed.rank(), distributed.world_size()
    return distributed.launcher_rank_and_size("ColumnDataset")
