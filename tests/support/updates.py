"""A small model that trains on, and its bundles and updates, for tests of updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, dense_parameters
from recis_hybrid.publish import write_bundle
from recis_hybrid.publish.towers import WrittenTower, written_tower
from recis_hybrid.saver import Saver
from recis_hybrid.saver.checkpoint.chain import open_checkpoint
from recis_hybrid.serving import Bundle

IDS = 400


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 1)

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        return torch.sigmoid(self.layer(torch.cat([user, items], dim=1))[:, 0])


class Training:
    """A training whose checkpoints are incremental, and the bundles of its steps.

    Args:
        folder: The run is saved in ``run`` within it, bundles are written to ``bundles``.
        seed: Seed of the data.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        torch.manual_seed(seed)
        configs = {"user": EmbeddingConfig(dim=4), "items": EmbeddingConfig(dim=8, table="item", combiner="mean")}
        self.engine = EmbeddingEngine(configs, optimizer=optim.Adam, seed=1)
        self.tower = Tower()
        self.optimizers = {
            "sparse": optim.Adam(self.engine.parameters(), lr=0.1),
            "dense": torch.optim.SGD(dense_parameters(self.tower), lr=0.1),
        }
        self.folder, self.step = folder, 0
        self.saver = Saver(folder / "run", keep=None)
        self._towers: dict[int, WrittenTower] = {}
        self.random = np.random.default_rng(seed)

    def train(self, rows: int = 30) -> None:
        """Train a step with new, old and removed ids, and save an incremental checkpoint."""
        self.step += 1
        self.engine.train()
        ids = torch.from_numpy(self.random.integers(-IDS, IDS, (3, rows)))
        batch = {"user": ids[0], "items": ids[1:].T.contiguous()}
        vectors = self.engine(batch)
        loss = (self.tower(vectors["user"], vectors["items"]) - (ids[0] % 2)).square().mean()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        for table in self.engine.tables:
            gone = torch.from_numpy(self.random.integers(-IDS, IDS, 10))
            for member in range(len(table.members)):
                table.erase(member, gone)
        self.saver.save(self.step, {"engine": self.engine, "tower": self.tower}, delta=True)

    def export(self, out: Path | None = None, *, update: bool = False, live: bool = False, **options: Any) -> Path:
        """Write a bundle or an update of the current step.

        Args:
            out: Folder.
            update: Whether to write an update.
            live: Whether to take the tables from the engine instead of the checkpoint.
            options: Further arguments of ``write_bundle``.
        """
        digest = self.saver.digest(self.step)
        batch = {"user": torch.arange(2), "items": torch.arange(4).view(2, 2)}
        with mock.patch("recis_hybrid.publish.bundle.written_tower", self._written):
            path = write_bundle(
                str(self.folder / "bundles" if out is None else out),
                self.step,
                features=None,
                engine=self.engine,
                tower=self.tower.eval(),
                inputs=["user", "items"],
                batch=batch,
                source={"step": self.step, "sha256": digest},
                update=update,
                checkpoint=None if live else open_checkpoint(self.folder / "run", self.step),
                **options,
            )
        return Path(str(path))

    def _written(self, *args: Any) -> WrittenTower:
        """Convert the tower once for all bundles of a step, because that takes a second."""
        if self.step not in self._towers:
            self._towers[self.step] = written_tower(*args)
        return self._towers[self.step]


def columns() -> dict[str, Any]:
    """Return a request with all ids, and some without a row."""
    every = np.arange(-IDS - 5, IDS + 5)
    return {"user": every, "items": np.stack([every, every[::-1]], axis=1)}


def state_of(bundle: Bundle) -> dict[str, Any]:
    """Return all rows of the tables, which ids have one, and the scores of all ids."""
    every = np.arange(-IDS - 5, IDS + 5)
    found: dict[str, Any] = {"scores": bundle.predict(columns())["score"]}
    for name, table in bundle.tables.items():
        vectors, exists = table.read(every)
        found[name] = np.where(exists[:, None], vectors, np.nan)
    return found


def assert_same(first: Bundle, second: Bundle) -> None:
    """Assert that two bundles have bitwise equal rows and scores."""
    states = state_of(first), state_of(second)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.tobytes() == states[1][name].tobytes(), name
