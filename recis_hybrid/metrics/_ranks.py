"""Rows of a metric gathered over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid.distributed import sendable, world_size


def gather_rows(columns: dict[str, Tensor], process_group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Return the rows of all ranks, in rank order; collective.

    Args:
        columns: ``[n]`` each, by name. Names and dtypes are equal on all ranks; n may differ and be 0.
        process_group: The ranks; None for the default group.
    """
    own = sendable(torch.tensor([next(iter(columns.values())).numel()]), process_group)
    sizes = [torch.empty_like(own) for _ in range(world_size(process_group))]
    dist.all_gather(sizes, own, group=process_group)
    counts = [int(size) for size in sizes]
    result = {}
    for name, values in columns.items():
        # all_gather needs equal shapes, so each rank pads its rows to the largest count.
        padded = torch.zeros(max(counts), dtype=values.dtype, device=own.device)
        padded[: values.numel()] = values.to(own.device)
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=process_group)
        result[name] = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return result
