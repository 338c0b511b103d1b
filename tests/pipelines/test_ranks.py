"""A Trainer on two ranks takes the same steps as one rank with all rows, and rank 0 writes and shows one log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid.app import cli
from recis_hybrid.app.build import trainer_of
from recis_hybrid.app.config import load_config
from recis_hybrid.app.launch import joined
from recis_hybrid.app.template import write_starter
from recis_hybrid.metrics import AUC, LogLoss, auc
from recis_hybrid.pipelines import (
    Callback,
    CallbackError,
    Evaluate,
    JsonLog,
    PeriodicCheckpoint,
    TorchStep,
    Train,
    Trainer,
)
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from tests.support.near import assert_near
from tests.support.programs import free_port, in_processes, on_two_ranks
from tests.support.small import Records, bce


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
        step,
        batches,
        batches,
        metrics={"auc": AUC(), "logloss": LogLoss()},
        log_every=2,
        seed=0,
        callbacks=[JsonLog(folder / f"{ranks}" / "log.jsonl")],
    )
    trainer.fit([Train(epochs=2), Evaluate()])
    return trainer, model


class StopAt(Callback):
    """Requests a stop after a step, or raises."""

    def __init__(self, at: int, error: Exception | None = None) -> None:
        self.at, self.error = at, error

    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == self.at:
            if self.error is not None:
                raise self.error
            trainer.stop("it is enough")


def check_stop_of_one_rank(trainer: Trainer, rank: int, folder: Path) -> None:
    """Check that a request of one rank's callback takes effect on both, after the next logged step."""
    step, batches = trainer.steps[""], make_batches(rank, 2)
    stopped = Trainer(step, batches, callbacks=[StopAt(2)] if rank == 0 else [], log_every=4)
    stopped.fit([Train()])
    reasons = ["it is enough", "requested by ranks [0]"]
    assert (stopped.steps_done, stopped.stopped) == (4, reasons[rank])
    saver = Saver(folder)
    raising = [StopAt(2, OSError("disk is gone"))] if rank == 1 else []
    failed = Trainer(step, batches, callbacks=raising, log_every=4, saver=saver)
    with pytest.raises(CallbackError) as caught:
        failed.fit([Train()])
    assert failed.steps_done == 4
    messages = [
        "a callback on rank 1 raised OSError at or before step 4: disk is",
        "the callback StopAt raised in after_step at step 4: OSError: disk is",
    ]
    assert messages[rank] in str(caught.value)
    assert "the state of step 4 is saved" in str(caught.value)
    assert saver.steps() == [4]
    saver.wait()
    # The same in the last step of a stage, which is not logged.
    for raises, callbacks in ((False, [StopAt(6)]), (True, [StopAt(6, OSError("disk is gone"))])):
        last = Trainer(step, batches, callbacks=callbacks if rank == 0 else [], log_every=4)
        with pytest.raises(CallbackError) if raises else nullcontext():
            last.fit([Train(), Train()])
        assert last.steps_done == 6


class LoggingModel(Dense):
    """Logs a figure on all ranks, and another on rank 0 only."""

    step: TorchStep

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, batch: Batch) -> Tensor:
        self.step.log("rank", torch.tensor(float(self.rank)))
        if self.rank == 0:
            self.step.log("of rank 0", 2.0)
        return super().forward(batch)


def check_means_over_ranks(rank: int, folder: Path) -> None:
    """Check that records contain means over the steps of all ranks, even if only some ranks log, and after a save."""
    torch.manual_seed(0)
    model, records = LoggingModel(rank), Records()
    model.step = TorchStep(model, bce, [torch.optim.SGD(model.parameters(), lr=0.0)], metrics={"auc": AUC()})
    batches = make_batches(rank, 2)
    trainer = Trainer(
        model.step, batches, callbacks=[records, PeriodicCheckpoint(steps=4)], log_every=6, saver=Saver(folder)
    )
    trainer.fit([Train()])
    (line,) = records.of("train")
    rows = [batch for r in range(2) for batch in make_batches(r, 2)]
    labels = [batch["label"] for batch in rows]
    with torch.no_grad():
        logits = [model.tower(batch["x"])[:, 0] for batch in rows]
    losses = [float(bce(*pair)) for pair in zip(logits, labels, strict=True)]
    assert line["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert (line["rank"], line["of rank 0"]) == (0.5, 2.0)
    assert line["auc"] == pytest.approx(auc(torch.cat(labels), torch.cat(logits).sigmoid()), rel=1e-12)  # type: ignore[arg-type]
    if rank == 0:
        model.step.metrics[""]["alone"] = LogLoss()
    with pytest.raises(
        ValueError, match=r"all ranks must have the same metrics, .*\[\['alone', 'auc'\], \['auc'\]\] by"
    ):
        Trainer(model.step, batches).fit([Train()])


def configured(config: Path, rows: int) -> Trainer:
    settings = [f"data.batch_size={rows}", "model.dropout=0", "train.log_every=10"]
    trainer = trainer_of(load_config(config, settings), quiet=True)
    trainer.saver = None
    trainer.fit([Train(), Evaluate()])
    return trainer


def as_configured(rank: int, port: int, config: Path, figures: dict[str, float]) -> None:
    """Run ``recis-hybrid train`` on a configuration, on two ranks."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    with joined("cpu") as device:
        assert (device, dist.get_world_size(), dist.get_backend()) == ("cpu", 2, "gloo")
        trainer = configured(config, 128)
        assert trainer.steps_done == 40
        # One rank has all 16 rows of the last batch, and counts half of it.
        assert trainer.figures["eval"] == pytest.approx(figures, abs=5e-3)
    assert not dist.is_initialized()


def on_rank(
    rank: int, ports: list[int], folder: Path, weight: Tensor, figures: dict[str, float], configured: dict[str, float]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{ports[0]}", rank=rank, world_size=2)
    trainer, model = train(rank, 2, folder)
    assert_near(model.tower.weight, weight)
    for name, value in figures.items():
        assert_near(trainer.figures["eval"][name], value, where=name)
    assert trainer.samples == 6 * 16 * 2
    assert trainer.steps[""].parts()["model"] is model
    check_stop_of_one_rank(trainer, rank, folder / "rescued")
    check_means_over_ranks(rank, folder / "figures")
    dist.destroy_process_group()
    as_configured(rank, ports[1], folder / "config.yaml", configured)


@pytest.mark.slow
def test_two_ranks_train_like_one_and_write_one_log(tmp_path: Path) -> None:
    trainer, model = train(0, 1, tmp_path)
    of_config = dict(configured(write_starter(tmp_path), 256).figures["eval"])
    ports = [free_port(), free_port()]
    arguments = (ports, tmp_path, model.tower.weight.detach(), dict(trainer.figures["eval"]), of_config)
    in_processes(on_rank, arguments, 2)
    logs = [
        [json.loads(line) for line in (tmp_path / ranks / "log.jsonl").read_text().splitlines()] for ranks in ("1", "2")
    ]
    for one, two in zip(*logs, strict=True):
        assert (one["event"], one["step"], one.get("samples")) == (two["event"], two["step"], two.get("samples"))
        if "loss" in one:
            assert_near(two["loss"], one["loss"])


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_starter(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, "recis_hybrid.app.cli", "train", str(config), "train.epochs=1"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert (json.loads(line)["steps"], done.stderr.count("step 20, eval: auc")) == (20, 1)
    # An evaluation on the same number of ranks returns bitwise the metrics of the training.
    command = (
        f"import sys\nfrom recis_hybrid.app import cli\nsys.exit(cli.main(['evaluate', {str(tmp_path / 'run')!r}]))\n"
    )
    evaluated = on_two_ranks(command, tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    figures = {name: value for name, value in json.loads(line).items() if name.startswith("eval/")}
    assert json.loads(evaluated.stdout) == {"step": 20, **figures}
    # One process continues a run of two.
    assert cli.main(["train", str(config), "train.epochs=2", "--resume", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 20 + 40
