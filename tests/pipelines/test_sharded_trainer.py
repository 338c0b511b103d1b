"""A Trainer over tables that two ranks share: one rank's numbers, one log of both, and the time of the exchange."""

import json
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Unused, dense_parameters
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import Callback, Evaluate, Evict, JsonLog, TorchStep, Train, Trainer
from recis_hybrid.ragged import Batch
from tests.support.small import bce


class Model(nn.Module):
    def __init__(self, prefetch_depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.engine = EmbeddingEngine(
            {"id": EmbeddingConfig(dim=4)}, optimizer_state=optim.SGD.row_state(), prefetch_depth=prefetch_depth
        )
        self.tower: nn.Module = nn.Linear(4, 1)

    def forward(self, batch: Batch) -> Tensor:
        return self.tower(self.engine(batch)["id"])[:, 0]  # type: ignore[no-any-return]


def make_batches(rank: int, ranks: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 40, (32,), generator=generator)[rank::ranks] for _ in range(6)]
    return [{"id": ids, "label": (ids % 2).float()} for ids in drawn]


class StopAt14(Callback):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == 14:
            trainer.stop("it is enough")


def train(rank: int, ranks: int, folder: Path, prefetch: int = 0) -> Trainer:
    model, batches = Model(2 * (prefetch + 1) if prefetch else 0), make_batches(rank, ranks)
    if ranks > 1:
        model.tower = DistributedDataParallel(model.tower)
    optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.5), optim.SGD(model.engine.parameters(), lr=0.5)]
    step = TorchStep(model, bce, optimizers, clip_grad_norm=1.0)
    log = JsonLog(folder / f"{ranks}.{prefetch}.jsonl")
    trainer = Trainer(
        step, batches, batches, metrics={"auc": AUC()}, log_every=2, callbacks=[log, StopAt14()], prefetch=prefetch
    )
    trainer.fit([Train(epochs=2), Evaluate(), Evict(Unused(steps=100)), Train(epochs=1)])
    return trainer


def on_rank(rank: int, port: int, folder: Path, auc: float) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trainers = [train(rank, 2, folder, prefetch) for prefetch in (0, 1, 2)]
    assert abs(trainers[0].figures["eval"]["auc"] - auc) < 1e-6
    for ahead in trainers[1:]:
        assert ahead.figures == trainers[0].figures
        ahead.fit([Train(steps=2), Evaluate()])  # nothing is left on its way by the stop
        assert ahead.steps_done == 16
    dist.destroy_process_group()


def test_two_ranks_that_share_tables_train_as_one(tmp_path: Path) -> None:
    trainer = train(0, 1, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_rank, (port, tmp_path, trainer.figures["eval"]["auc"]), nprocs=2)  # type: ignore[no-untyped-call]
    one, two, ahead = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("1.0", "2.0", "2.2")
    )
    losses = [[record["loss"] for record in log if "loss" in record] for log in (two, ahead)]
    assert losses[1][: len(losses[0])] == losses[0]
    assert not any("time/exchange" in record for record in one)
    logged = [record for record in two if "time/towers" in record]
    assert logged
    assert all(record["time/exchange"] > 0 for record in logged)
    for first, second in zip(one, two, strict=True):
        for name in ("event", "step", "samples", "rows/id", "admitted", "evicted", "tables"):
            assert first.get(name) == second.get(name), name
        if "loss" in first:
            assert abs(first["loss"] - second["loss"]) < 1e-5
