"""State of metrics over all ranks: sums are added, rows are put one after another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def ranks_of(process_group: dist.ProcessGroup | None) -> int:
    """Return how many ranks share a metric: 1 where torch.distributed is not initialised."""
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def added(sums: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum over all ranks of a tensor of one shape."""
    total = sums.to(_device(process_group), copy=True)
    dist.all_reduce(total, group=process_group)
    return total


def gathered(columns: dict[str, Tensor], process_group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Return the rows of all ranks, in the order of the ranks.

    Args:
        columns: ``[n]`` each; n may differ from rank to rank and be 0, names and dtypes may not.
        process_group: The ranks.
    """
    device, ranks = _device(process_group), dist.get_world_size(process_group)
    own = torch.tensor([next(iter(columns.values())).numel()], device=device)
    sizes = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(sizes, own, group=process_group)
    counts = [int(size) for size in sizes]
    result = {}
    for name, values in columns.items():
        # Collectives take equal shapes: each rank fills its part up to the longest.
        padded = torch.zeros(max(counts), dtype=values.dtype, device=device)
        padded[: values.numel()] = values.to(device)
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=process_group)
        result[name] = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return result


def _device(process_group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's backend takes tensors."""
    backend = dist.get_backend(process_group)
    return torch.device("cpu" if "gloo" in backend or "mpi" in backend else "cuda")
