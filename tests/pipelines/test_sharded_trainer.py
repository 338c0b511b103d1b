"""A Trainer with tables sharded over two ranks trains like one rank, writes one log, and times the exchange."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import ops, optim
from recis_hybrid.app.report import write_report
from recis_hybrid.embedding import Capacity, EmbeddingConfig, EmbeddingEngine, Unused, dense_parameters
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    Callback,
    Evaluate,
    Evict,
    JsonLog,
    PeriodicEviction,
    Profile,
    ProgressBar,
    TensorBoard,
    TorchStep,
    Train,
    Trainer,
)
from recis_hybrid.ragged import Batch
from tests.support.near import assert_near
from tests.support.programs import free_port, in_processes, redirect
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


class RecordInFlight(Callback):
    """Records the number of batches in flight before each step, including that of the step."""

    def __init__(self) -> None:
        self.batches: set[int] = set()

    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        prefetcher = trainer.engines[0]._prefetcher
        self.batches.add(0 if prefetcher is None else len(prefetcher))


def unchanged(batch: Batch) -> Batch:
    return batch


def copied(batch: Batch) -> Batch:
    return {**batch, "id": batch["id"] + 0}  # type: ignore[operator]


def renamed(batch: Batch) -> Batch:
    return {"id": batch["item"]}


def train(
    rank: int, ranks: int, folder: Path, prefetch: int | None = 0, read: Callable[[Batch], Batch] = unchanged
) -> tuple[Trainer, set[int]]:
    # Use the smallest prefetch_depth that the trainer needs. None: the defaults of engines and trainers.
    model, batches = Model(prefetch + 1 if prefetch else prefetch, read), make_batches(rank, ranks)
    if read is renamed:
        batches = [{"item": batch["id"], "label": batch["label"]} for batch in batches]
    if ranks > 1:
        model.tower = DistributedDataParallel(model.tower)
    optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.5), optim.SGD(model.engine.parameters(), lr=0.5)]
    step = TorchStep(model, bce, optimizers, clip_grad_norm=1.0)
    run = folder / f"{ranks}.{prefetch}"
    callbacks = [JsonLog(run / "log.jsonl"), StopAt14(), in_flight := RecordInFlight()]
    if ranks > 1 and prefetch is None and read is unchanged:
        callbacks += [ProgressBar(), TensorBoard(run / "tensorboard"), Profile(run / "trace.json", first=3, steps=1)]
    trainer = Trainer(
        step, batches, batches, metrics={"auc": AUC()}, log_every=2, callbacks=callbacks, prefetch=prefetch
    )
    trainer.fit([Train(epochs=2), Evaluate(), Evict(Unused(steps=100)), Train(epochs=1)])
    return trainer, in_flight.batches


def on_rank(rank: int, port: int, folder: Path, auc: float) -> None:
    redirect(folder / f"{rank}.out", folder / f"{rank}.err")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    (first, first_in_flight), *others = (train(rank, 2, folder, prefetch) for prefetch in (0, 1, 2, None))
    assert_near(first.figures["eval"]["auc"], auc)
    assert first_in_flight == {0}
    # There is none before the first update, and their number falls at the end of a stage.
    assert [in_flight for _, in_flight in others] == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2}]
    for trainer, _ in others:
        assert trainer.figures == first.figures
        trainer.fit([Train(max_steps=2), Evaluate()])  # the stop left no batch in flight
        assert trainer.steps_done == 16
    # Models that compute the columns of ids themselves train without prefetching.
    for read in (copied, renamed):
        trainer, in_flight = train(rank, 2, folder / "computed", None, read)
        assert trainer.figures == first.figures
        assert in_flight == {0}
    shallow, none = (
        Trainer(trainer.steps[""], make_batches(rank, 2), prefetch=1, accumulate=2) for trainer in (others[0][0], first)
    )
    with pytest.raises(ValueError, match="prefetch=1 with accumulate=2 sends 4 .* build it with prefetch_depth=4"):
        shallow.fit([Train()])
    none.fit([Train()])  # its engine does not prefetch
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_that_share_tables_train_like_one(tmp_path: Path) -> None:
    trainer, _ = train(0, 1, tmp_path)
    port = free_port()
    in_processes(on_rank, (port, tmp_path, trainer.figures["eval"]["auc"]), 2)
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
    # The time of the exchange appears in the report and in TensorBoard, written by one rank.
    run = tmp_path / "2.None"
    assert sorted(path.name for path in run.iterdir()) == ["log.jsonl", "tensorboard", "trace.json"]
    assert re.search(r"<title>exchange: [\d.e-]+ ms on average", write_report(run).read_text())
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    waits = [record["time/exchange"] for record in ahead if "time/exchange" in record]
    assert [event.value for event in events.Scalars("time/exchange")] == pytest.approx(waits)
    output, errors = (
        "".join((tmp_path / f"{rank}.{kind}").read_text() for rank in range(2)) for kind in ("out", "err")
    )
    assert output == ""
    assert len(re.findall(r"train: 100%.*12/12", errors)) == 1
    assert errors.count("step 12, eval: auc") == 1


class OwnIds(Callback):
    """The ids that have a row on this rank after each step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def after_step(self, trainer: Trainer) -> None:
        self.steps.append(trainer.engines[0].tables[0].ids(0).tolist())


EVICTIONS = [
    Unused(steps=3),
    {"id": Capacity(rows=150, by="lfu", half_life=3.3)},
]


def evict_in_parts(rank: int, ranks: int) -> list[list[list[int]]]:
    """Return the ids on this rank after each step, for each rule; the first rank of two owns 19 of 20 ids."""
    ids = torch.arange(2000)
    is_first = ops.id_map.bucket_of(ids) < 1 << 15
    pool = torch.cat([ids[is_first][:570], ids[~is_first][:30]])[torch.randperm(600, generator=torch.Generator())]
    parts = [*pool.split(60), *pool[:60].repeat(6).split(60)]
    batches: list[Batch] = [{"id": part[rank::ranks], "label": (part[rank::ranks] % 2).float()} for part in parts]
    found = []
    for rule in EVICTIONS:
        model = Model(0, unchanged)
        if ranks > 1:
            model.tower = DistributedDataParallel(model.tower)
        optimizers = [torch.optim.SGD(dense_parameters(model), lr=0.5), optim.SGD(model.engine.parameters(), lr=0.5)]
        # The ranks have compacted their tables after numbers of steps that differ.
        eviction = PeriodicEviction(rule, steps=5, rows_per_step=70, compact=True)
        own = OwnIds()
        Trainer(TorchStep(model, bce, optimizers), batches, callbacks=[eviction, own]).fit([Train()])
        found.append(own.steps)
    return found


def evict_on_rank(rank: int, port: int, folder: Path) -> None:
    redirect(folder / f"{rank}.out", folder / f"{rank}.err")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(evict_in_parts(rank, 2)))
    dist.destroy_process_group()


def test_ranks_of_unlike_size_evict_in_parts_like_one_process(tmp_path: Path) -> None:
    in_processes(evict_on_rank, (free_port(), tmp_path), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for rule, (expected, *parts) in enumerate(zip(evict_in_parts(0, 1), first, second, strict=True)):
        assert [sorted([*a, *b]) for a, b in zip(*parts, strict=True)] == expected
        erased = [set(before) - set(now) for before, now in zip(expected, expected[1:], strict=False)]
        assert sum(map(bool, erased)) > 3, rule
        assert all(10 * len(b) < len(a) for a, b in zip(*parts, strict=True) if len(b) > 3)
