"""A small model with tables and a tower, for tests of checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, dense_parameters
from recis_hybrid.ragged import Batch
from tests.support.devices import EDGE_IDS


class Toy(nn.Module):
    def __init__(self, seed: int = 0, dim: int = 6, device: str = "cpu") -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = EmbeddingConfig(dim=dim, initializer=Normal(0, 0.1))
        self.engine = EmbeddingEngine({"user": config, "item": config}, optimizer=optim.Adam, seed=seed, device=device)
        self.tower = nn.Sequential(nn.Linear(2 * dim, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).to(device)
        self.sparse = optim.Adam(self.engine.parameters(), lr=0.01)
        self.dense = torch.optim.Adam(dense_parameters(self), lr=0.01)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.tower(torch.cat(list(self.engine(batch).values()), 1))[:, 0]  # type: ignore[no-any-return]

    def train_steps(self, steps: int) -> None:
        self.train()
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            batch = self.some_batch(generator)
            for optimizer in (self.sparse, self.dense):
                optimizer.zero_grad()
            (self(batch) - 1).square().mean().backward()
            for optimizer in (self.sparse, self.dense):
                optimizer.step()

    def predictions(self) -> torch.Tensor:
        self.eval()
        with torch.no_grad():
            return self(self.some_batch(torch.Generator().manual_seed(2)))

    def some_batch(self, generator: torch.Generator) -> Batch:
        return {name: column.to(self.engine.device) for name, column in some_batch(generator).items()}

    def parts(self) -> dict[str, object]:
        return {"engine": self.engine, "model": self, "sparse": self.sparse, "dense": self.dense}


def some_batch(generator: torch.Generator) -> Batch:
    users = torch.tensor(EDGE_IDS)[torch.randint(0, len(EDGE_IDS), (32,), generator=generator)]
    return {"user": users, "item": torch.randint(-(2**62), 2**62, (32,), generator=generator)}
