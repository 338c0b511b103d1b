"""A Trainer killed on two ranks continues from its checkpoint bitwise, on the same or another number of ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import optim
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, dense_parameters
from recis_hybrid.pipelines import EMA, Callback, PeriodicCheckpoint, SaveCheckpoint, TorchStep, Train, Trainer
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from tests.support.programs import free_port, in_processes
from tests.support.small import bce

STEPS, KILLED_AT = 10, 8


class Model(nn.Module):
    """Tables with every kind of sharding, and dropout with one generator per rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.engine = EmbeddingEngine(
            {
                "user": EmbeddingConfig(dim=4),
                "item": EmbeddingConfig(dim=4, sharding="table", admission=MinFrequency(2)),
                "country": EmbeddingConfig(dim=4, sharding="auto", expected_rows=20),
            },
            optimizer=optim.Adam,
        )
        self.tower: nn.Module = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, batch: Batch) -> Tensor:
        return self.tower(torch.cat(list(self.engine(batch).values()), 1))[:, 0]  # type: ignore[no-any-return]


class Kill(Callback):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def write_data(path: Path) -> None:
    draw, rows = np.random.default_rng(0), 64 * STEPS
    columns = {name: draw.integers(0, most, rows) for name, most in (("user", 90), ("item", 60), ("country", 20))}
    pq.write_table(pa.table({**columns, "label": draw.integers(0, 2, rows).astype(np.float32)}), path)


def fit(rank: int, ranks: int, folder: Path, run: str, killed: bool, asynchronous: bool) -> None:
    model = Model()
    if ranks > 1:
        model.tower = DistributedDataParallel(model.tower)
    optimizers = [torch.optim.Adam(dense_parameters(model), lr=0.01), optim.Adam(model.engine.parameters(), lr=0.01)]
    data = ColumnDataset(
        folder / "data.parquet", ["user", "item", "country", "label"], 64 // ranks, shuffle=True, seed=3
    )
    saver = Saver(folder / run, keep=None, async_save=asynchronous)
    ema = EMA(model, decay=0.5)
    callbacks = [PeriodicCheckpoint(steps=3), ema, *([Kill()] if killed and rank == ranks - 1 else [])]
    step = TorchStep(model, bce, optimizers)
    trainer = Trainer(step, data, saver=saver, callbacks=callbacks, log_every=5, seed=5)
    trainer.fit([Train(max_steps=STEPS), SaveCheckpoint()], resume="latest")
    assert trainer.steps_done == STEPS
    assert sorted(ema.averages) == ["tower.0.bias", "tower.0.weight", "tower.2.bias", "tower.2.weight"]
    if ranks > 1:
        for average in ema.averages.values():
            first = average.clone()
            dist.broadcast(first, 0)
            assert torch.equal(average, first)


def on_rank(rank: int, port: int, *arguments: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    fit(rank, 2, *arguments)  # type: ignore[arg-type]
    dist.destroy_process_group()


def on_two_ranks(*arguments: object) -> None:
    port = free_port()
    in_processes(on_rank, (port, *arguments), 2)


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*.safetensors")}


@pytest.mark.quick
def test_a_killed_run_of_two_ranks_continues_bitwise(tmp_path: Path) -> None:
    write_data(tmp_path / "data.parquet")
    on_two_ranks(tmp_path, "uninterrupted", False, True)
    with pytest.raises(mp.ProcessExitedException):
        on_two_ranks(tmp_path, "killed", True, False)
    assert Saver(tmp_path / "killed").latest() == 6
    on_two_ranks(tmp_path, "killed", False, False)
    last = f"step_{STEPS:06d}"
    assert files(tmp_path / "killed" / last) == files(tmp_path / "uninterrupted" / last)
    assert "dense/generators%5B1%5D.safetensors" in files(tmp_path / "killed" / last)
    # One process continues a run of two, and two continue a run of one.
    (tmp_path / "one").mkdir()
    (tmp_path / "uninterrupted" / "step_000006").rename(tmp_path / "one" / "step_000006")
    fit(0, 1, tmp_path, "one", False, False)
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "step_000009").rename(tmp_path / "two" / "step_000009")
    on_two_ranks(tmp_path, "two", False, False)
    assert Saver(tmp_path / "two").steps() == [9, STEPS]
