"""A Trainer over tables that two ranks share: one rank's numbers, one log of both, and the time of the exchange."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import optim
from recis_hybrid.app.report import write_report
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Unused, dense_parameters
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    Callback,
    Evaluate,
    Evict,
    JsonLog,
    Profile,
    ProgressBar,
    TensorBoard,
    TorchStep,
    Train,
    Trainer,
)
from recis_hybrid.ragged import Batch
from tests.support.near import assert_near
from tests.support.small import bce


class Model(nn.Module):
    def __init__(self, prefetch_depth: int | None, read: Callable[[Batch], Batch]) -> None:
        super().__init__()
        self.read = read
        torch.manual_seed(0)
        self.engine = EmbeddingEngine(
            {"id": EmbeddingConfig(dim=4)}, optimizer=optim.SGD, prefetch_depth=prefetch_depth
        )
        self.tower: nn.Module = nn.Linear(4, 1)

    def forward(self, batch: Batch) -> Tensor:
        return self.tower(self.engine(self.read(batch))["id"])[:, 0]  # type: ignore[no-any-return]


def make_batches(rank: int, ranks: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 40, (32,), generator=generator)[rank::ranks] for _ in range(6)]
    return [{"id": ids, "label": (ids % 2).float()} for ids in drawn]


class StopAt14(Callback):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == 14:
            trainer.stop("it is enough")


class Ahead(Callback):
    """Number of batches in flight before each step, its own included."""

    def __init__(self) -> None:
        self.batches: set[int] = set()

    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        prefetcher = trainer.engines[0]._prefetcher
        self.batches.add(0 if prefetcher is None else len(prefetcher))


def as_it_is(batch: Batch) -> Batch:
    return batch


def copied(batch: Batch) -> Batch:
    return {**batch, "id": batch["id"] + 0}  # type: ignore[operator]


def renamed(batch: Batch) -> Batch:
    return {"id": batch["item"]}


def train(
    rank: int, ranks: int, folder: Path, prefetch: int | None = 0, read: Callable[[Batch], Batch] = as_it_is
) -> tuple[Trainer, set[int]]:
    # As few batches as the trainer needs on their way; None: what engines and trainers do if nothing is said.
    model, batches = Model(prefetch + 1 if prefetch else prefetch, read), make_batches(rank, ranks)
    if read is renamed:
        batches = [{"item": batch["id"], "label": batch["label"]} for batch in batches]
    if ranks > 1:
        model.tower = DistributedDataParallel(model.tower)
    optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.5), optim.SGD(model.engine.parameters(), lr=0.5)]
    step = TorchStep(model, bce, optimizers, clip_grad_norm=1.0)
    run = folder / f"{ranks}.{prefetch}"
    callbacks = [JsonLog(run / "log.jsonl"), StopAt14(), ahead := Ahead()]
    if ranks > 1 and prefetch is None and read is as_it_is:
        callbacks += [ProgressBar(), TensorBoard(run / "tensorboard"), Profile(run / "trace.json", first=3, steps=1)]
    trainer = Trainer(
        step, batches, batches, metrics={"auc": AUC()}, log_every=2, callbacks=callbacks, prefetch=prefetch
    )
    trainer.fit([Train(epochs=2), Evaluate(), Evict(Unused(steps=100)), Train(epochs=1)])
    return trainer, ahead.batches


def on_rank(rank: int, port: int, folder: Path, auc: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    (first, ahead_of_first), *others = (train(rank, 2, folder, prefetch) for prefetch in (0, 1, 2, None))
    assert_near(first.figures["eval"]["auc"], auc)
    assert ahead_of_first == {0}
    # At the end of a stage there is nothing to come.
    assert [ahead for _, ahead in others] == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2}]
    for trainer, _ in others:
        assert trainer.figures == first.figures
        trainer.fit([Train(max_steps=2), Evaluate()])  # nothing is left on its way by the stop
        assert trainer.steps_done == 16
    # Models that compute the columns of ids: nothing is sent ahead.
    for read in (copied, renamed):
        trainer, ahead = train(rank, 2, folder / "made", None, read)
        assert trainer.figures == first.figures
        assert ahead == {0}
    shallow, none = (
        Trainer(trainer.steps[""], make_batches(rank, 2), prefetch=1, accumulate=2) for trainer in (others[0][0], first)
    )
    with pytest.raises(ValueError, match="prefetch=1 with accumulate=2 sends 4 .* build it with prefetch_depth=4"):
        shallow.fit([Train()])
    none.fit([Train()])  # its engine sends nothing ahead
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_that_share_tables_train_as_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer, _ = train(0, 1, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_rank, (port, tmp_path, trainer.figures["eval"]["auc"]), nprocs=2)  # type: ignore[no-untyped-call]
    one, two, ahead = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("1.0", "2.0", "2.None")
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
            assert_near(second["loss"], first["loss"])
    # The wait for the other rank is shown wherever the split of a step's time is; and by one rank alone.
    run = tmp_path / "2.None"
    assert sorted(path.name for path in run.iterdir()) == ["log.jsonl", "tensorboard", "trace.json"]
    assert re.search(r"<title>exchange: [\d.e-]+ ms on the average", write_report(run).read_text())
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    waits = [record["time/exchange"] for record in ahead if "time/exchange" in record]
    assert [event.value for event in found.Scalars("time/exchange")] == pytest.approx(waits)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert len(re.findall(r"train: 100%.*12/12", shown.err)) == 1
    assert shown.err.count("step 12, eval: auc") == 1
