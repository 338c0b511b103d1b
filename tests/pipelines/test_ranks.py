"""A Trainer on two ranks: the same steps as one rank of all rows, one log of both, written and shown by rank 0."""

import json
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid.metrics import AUC, LogLoss
from recis_hybrid.pipelines import Evaluate, JsonLog, TorchStep, Train, Trainer
from recis_hybrid.ragged import Batch
from tests.support.small import bce


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(3, 1)

    def forward(self, batch: Batch) -> Tensor:
        return self.tower(batch["x"])[:, 0]  # type: ignore[no-any-return]


def make_batches(rank: int, ranks: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(32, 3, generator=generator) for _ in range(6)]
    return [{"x": x[rank::ranks], "label": (x.sum(1) > 0).float()[rank::ranks]} for x in rows]


def train(rank: int, ranks: int, folder: Path) -> tuple[Trainer, nn.Module]:
    torch.manual_seed(0)
    model = Dense()
    wrapped = model if ranks == 1 else DistributedDataParallel(model)
    step = TorchStep(wrapped, bce, [torch.optim.SGD(model.parameters(), lr=0.5)], clip_grad_norm=1.0)
    batches = make_batches(rank, ranks)
    trainer = Trainer(
        step, batches, batches, metrics={"auc": AUC(), "logloss": LogLoss()}, log_every=2, seed=0,
        callbacks=[JsonLog(folder / f"{ranks}" / "log.jsonl")],
    )  # fmt: skip
    trainer.fit([Train(epochs=2), Evaluate()])
    return trainer, model


def on_rank(rank: int, port: int, folder: Path, weight: Tensor, figures: dict[str, float]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trainer, model = train(rank, 2, folder)
    torch.testing.assert_close(model.tower.weight.detach(), weight)
    for name, value in figures.items():
        assert abs(trainer.figures["eval"][name] - value) < 1e-5
    assert trainer.samples == 6 * 16 * 2
    assert set(trainer.steps[""].parts()["model"].state_dict()) == {"tower.weight", "tower.bias"}  # type: ignore[attr-defined]
    dist.destroy_process_group()


def test_two_ranks_train_as_one_and_keep_one_log(tmp_path: Path) -> None:
    trainer, model = train(0, 1, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, tmp_path, model.tower.weight.detach(), dict(trainer.figures["eval"]))
    mp.spawn(on_rank, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    logs = [
        [json.loads(line) for line in (tmp_path / ranks / "log.jsonl").read_text().splitlines()] for ranks in ("1", "2")
    ]
    for one, two in zip(*logs, strict=True):
        assert (one["event"], one["step"], one.get("samples")) == (two["event"], two["step"], two.get("samples"))
        if "loss" in one:
            assert abs(one["loss"] - two["loss"]) < 1e-5
