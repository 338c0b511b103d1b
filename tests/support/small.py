"""A small model with tables and its batches, for tests of pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.checkpointing import tables_apart
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, dense_parameters
from recis_hybrid.pipelines import Callback, Record, TorchStep, Trainer
from recis_hybrid.ragged import Batch, batch_to

bce = nn.functional.binary_cross_entropy_with_logits


class Model(nn.Module):
    """An embedding and a linear tower with dropout (generators) and batch norm (running statistics)."""

    def __init__(self, heads: tuple[str, ...] = (), device: str = "cpu") -> None:
        super().__init__()
        self.engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)}, optimizer=optim.Adam, device=device)
        self.tower: nn.Module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, max(len(heads), 1)))
        self.tower.to(device)
        self.heads = heads

    def forward(self, batch: Batch) -> Any:
        outputs = self.tower(self.engine(batch)["id"])
        return dict(zip(self.heads, outputs.unbind(1), strict=True)) if self.heads else outputs[:, 0]


def make_batches(number: int = 8, rows: int = 64, seed: int = 0, device: str = "cpu") -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    for _ in range(number):
        ids = torch.randint(0, 20, (rows,), generator=generator)
        batches.append({"id": ids, "label": (ids % 2).float(), "other": (ids % 3 == 0).float(), "user": ids // 4})
    return [batch_to(batch, device) for batch in batches]


def make_step(
    loss: Any = bce,
    heads: tuple[str, ...] = (),
    *,
    lr: float = 0.05,
    tower: nn.Module | None = None,
    device: str = "cpu",
    **options: Any,
) -> TorchStep:
    torch.manual_seed(0)
    model = Model(heads, device)
    if tower is not None:
        model.tower = tower
    dense = torch.optim.Adam(dense_parameters(model), lr=lr)
    sparse = optim.Adam(model.engine.parameters(), lr=lr)
    return TorchStep(model, loss, {"dense": dense, "sparse": sparse}, **options)


def state_of(step: TorchStep) -> dict[str, Tensor]:
    """Return all trained state: towers and rows, in order of ids."""
    assert isinstance(step.model, Model)
    rows = {f"table.{name}": values for name, values in step.model.engine.tables[0].export(0).items()}
    with tables_apart():
        towers = step.model.state_dict()
    return {**{name: value.clone() for name, value in towers.items()}, **rows}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class Records(Callback):
    """Callback that records all log entries and training batches."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.batches: list[Batch] = []

    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        self.batches += batches

    def on_log(self, trainer: Trainer, record: Record) -> None:
        self.records.append(record)

    def of(self, event: str) -> list[Record]:
        return [record for record in self.records if record["event"] == event]
