"""Workload W: what one training step of a click model asks of its tables.

26 features of 100,000 ids each, spread over the 64-bit space, drawn by Zipf's law with exponent 1.05; a sample has
one id a feature. 2,520 samples make 65,520 ids a step, 157 make 4,082.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEATURES = 26
IDS = 100_000
EXPONENT = 1.05
BATCHES = 8
SIZES = {"65k": 2520, "4k": 157}


@dataclass(frozen=True)
class Workload:
    """Some batches, as ids and as ready row numbers."""

    ids: list[Tensor]
    """For each feature, all of its ids: int64 ``[IDS]``; the row number of an id is its place here."""
    rows: list[list[Tensor]]
    """For each batch and feature, int64 ``[samples]``."""
    gradients: list[Tensor]
    """For each feature, float32 ``[samples, dim]``: a fixed gradient."""

    @property
    def step_ids(self) -> int:
        """Ids of one step."""
        return FEATURES * self.gradients[0].size(0)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Return a batch of 64-bit ids by feature."""
        rows = self.rows[number % BATCHES]
        return {name(f): self.ids[f][rows[f]] for f in range(FEATURES)}


def name(feature: int) -> str:
    """Return the name of a feature."""
    return f"feature{feature:02d}"


def make(size: str, dim: int, device: torch.device, seed: int = 0) -> Workload:
    """Draws the workload; the same for the same arguments."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, IDS + 1) ** EXPONENT
    weights /= weights.sum()
    samples = SIZES[size]

    def draw() -> Tensor:
        # Ranks are dealt to places at random, so that hot ids do not lie together in a static table either.
        return torch.from_numpy(random.choice(IDS, size=samples, p=weights)).to(device)

    ids = [torch.from_numpy(random.integers(-(2**63), 2**63 - 1, IDS)).to(device) for _ in range(FEATURES)]
    deals = [torch.from_numpy(random.permutation(IDS)).to(device) for _ in range(FEATURES)]
    rows = [[deals[f][draw()] for f in range(FEATURES)] for _ in range(BATCHES)]
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(samples, dim, generator=generator).to(device) for _ in range(FEATURES)]
    return Workload(ids, rows, gradients)
