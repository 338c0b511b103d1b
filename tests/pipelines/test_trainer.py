import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from recis_hybrid import optim
from recis_hybrid.columnio import ColumnDataset, Window, Windows
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Unused, dense_parameters
from recis_hybrid.metrics import AUC, GAUC, MSE, LogLoss
from recis_hybrid.pipelines import (
    Callback,
    Checkpoint,
    EarlyStop,
    Evaluate,
    Evict,
    Mixture,
    Objective,
    PlateauSchedule,
    Record,
    Save,
    Stage,
    TorchStep,
    Train,
    Trainer,
    WindowStages,
)
from recis_hybrid.ragged import Batch, batch_to
from recis_hybrid.saver import Saver
from tests.support.small import Model, assert_same, bce, make_batches, make_step, state_of


class Records(Callback):
    def __init__(self) -> None:
        self.records: list[Record] = []
        self.batches: list[Batch] = []

    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        self.batches += batches

    def on_log(self, trainer: Trainer, record: Record) -> None:
        self.records.append(record)

    def of(self, event: str) -> list[Record]:
        return [record for record in self.records if record["event"] == event]


def test_it_learns_and_evaluates() -> None:
    step, batches = make_step(groups="user"), make_batches()
    metrics = {"auc": AUC(), "logloss": LogLoss(), "gauc": GAUC()}
    trainer = Trainer(step, batches, batches, metrics=metrics)
    figures = trainer.fit([Evaluate(name="before"), Train(epochs=10), Evaluate()])
    assert figures["before"]["auc"] < 0.8
    assert figures["eval"]["auc"] > 0.99
    assert figures["eval"]["gauc"] > 0.99
    assert figures["eval"]["logloss"] < 0.3
    assert (trainer.steps_done, trainer.samples) == (80, 80 * 64)


def test_evaluation_inserts_nothing() -> None:
    step, batches = make_step(), make_batches()
    Trainer(step, batches, batches, metrics={"auc": AUC()}).fit([Evaluate()])
    assert len(step.engines[0].tables[0]) == 0


@pytest.mark.parametrize(
    ("stages", "read"),
    [
        ([Train()], [0, 1, 2, 3]),
        ([Train(epochs=2)], [0, 1, 2, 3] * 2),
        ([Train(steps=6)], [0, 1, 2, 3, 0, 1]),
        ([Train(steps=6, epochs=1)], [0, 1, 2, 3]),
        ([Train(steps=3), Train(epochs=1)], [0, 1, 2, 3]),  # goes on with the pass begun
        ([Train(steps=4), Train(epochs=1)], [0, 1, 2, 3] * 2),  # which is at its end
        ([Train(steps=3), Train(steps=3)], [0, 1, 2, 3, 0, 1]),
    ],
)
@pytest.mark.parametrize("prefetch", [0, 1, 3, 9])
def test_the_bounds_of_a_stage(stages: list[Stage], read: list[int], prefetch: int) -> None:
    batches, seen = make_batches(4), Records()
    Trainer(make_step(), batches, callbacks=[seen], prefetch=prefetch).fit(stages)
    assert [next(n for n, b in enumerate(batches) if b is batch) for batch in seen.batches] == read


def test_accumulation_ends_with_the_pass() -> None:
    batches, seen = make_batches(5), Records()
    trainer = Trainer(make_step(), batches, callbacks=[seen], accumulate=2, log_every=1)
    trainer.fit([Train(epochs=2)])
    assert trainer.steps_done == 6  # 2 + 2 + 1, twice
    assert len(seen.batches) == 10
    assert [record["samples"] for record in seen.of("train")] == [128, 256, 320, 448, 576, 640]


def test_frozen_towers_stand_still_while_tables_warm_up() -> None:
    step, batches = make_step(), make_batches()
    before = [p.detach().clone() for p in step.model.tower.parameters()]  # type: ignore[union-attr]
    trainer = Trainer(step, batches)
    stages = [Train(steps=5, freeze=[step.model.tower])]  # type: ignore[list-item]
    trainer.fit(stages)
    after = list(step.model.tower.parameters())  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert int(step.engines[0].tables[0].export(0)["updated_step"].max()) == 5
    trainer.fit([Train(steps=5)])
    assert trainer.steps_done == 10
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_student_learns_from_its_teacher() -> None:
    teacher = make_step()
    student = make_step(label="taught")
    batches = make_batches()

    def taught(batch: Batch) -> Batch:
        return {**batch, "taught": teacher.predict(batch)[""].scores}

    trainer = Trainer({"teacher": teacher, "student": student}, batches, batches)
    trainer.fit([
        Train(epochs=10, step="teacher"), Evaluate(name="teacher", step="teacher", metrics={"auc": AUC()}),
        Evaluate(name="before", step="student", transform=taught, metrics={"mse": MSE()}),
        Train(epochs=10, step="student", transform=taught),
        Evaluate(name="after", step="student", transform=taught, metrics={"mse": MSE()}),
    ])  # fmt: skip
    assert trainer.figures["teacher"]["auc"] > 0.99
    assert trainer.figures["after"]["mse"] < 0.01 < 0.1 < trainer.figures["before"]["mse"]
    assert {"teacher.model", "teacher.engine", "student.dense", "trainer"} <= set(trainer.parts())


def test_tables_that_two_steps_share_are_saved_once() -> None:
    first, second = make_step(), make_step()
    second.model.engine = first.model.engine  # type: ignore[union-attr]
    parts = Trainer({"first": first, "second": second}).parts()
    assert ("first.engine" in parts, "second.engine" in parts) == (True, False)


def test_sources_by_proportion() -> None:
    ads, organic = make_batches(3, seed=1), make_batches(5, seed=2)
    mixture = Mixture({"ads": ads, "organic": organic}, {"ads": 1, "organic": 3}, seed=4)
    seen = Records()
    Trainer(make_step(), mixture, callbacks=[seen]).fit([Train(steps=400)])
    of_ads = sum(any(batch is one for one in ads) for batch in seen.batches)
    assert abs(of_ads - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)
    for name, share in (("organic", 0.0), ("organic", math.inf)):
        with pytest.raises(ValueError, match=f"the proportion of '{name}' must be a finite number above 0, got"):
            Mixture({"ads": ads, "organic": organic}, {"ads": 1, name: share})
    with pytest.raises(ValueError, match="must have the same names"):
        Mixture({"ads": ads}, {"organic": 1})


def test_each_objective_has_figures_of_its_own() -> None:
    objectives = {"click": Objective(loss=bce, groups="user"), "buy": Objective(loss=bce, label="other")}
    batches = make_batches()
    trainer = Trainer(make_step(objectives, ("click", "buy")), batches, batches, metrics={"loss": LogLoss()})
    trainer.fit([Train(epochs=10), Evaluate(), Evaluate(metrics={"click": {"gauc": GAUC()}}, name="by_user")])
    assert set(trainer.figures["eval"]) == {"click.loss", "buy.loss"}
    assert trainer.figures["eval"]["click.loss"] != trainer.figures["eval"]["buy.loss"]
    assert max(trainer.figures["eval"].values()) < 0.3
    assert set(trainer.figures["by_user"]) == {"click.gauc"}
    with pytest.raises(ValueError, match=r"there are metrics of \['sell'\], and the objectives are"):
        trainer.fit([Evaluate(metrics={"sell": {"auc": AUC()}})])
    with pytest.raises(ValueError, match="the metric 'gauc' is by group; say which column has groups"):
        trainer.fit([Evaluate(metrics={"gauc": GAUC()})])


def test_eviction_and_admissions_are_counted() -> None:
    step, seen = make_step(), Records()
    first, second = make_batches(2), make_batches(2, seed=1)
    for batch in second:
        batch["id"] = batch["id"] + 100  # type: ignore[operator]
    trainer = Trainer(step, callbacks=[seen], log_every=2)
    trainer.fit([Train(data=first), Train(data=second), Evict(Unused(steps=2), compact=True), Train(data=second)])
    rows = [record["rows/id"] for record in seen.of("train")]
    assert rows == [20, 40, 20]
    assert [record["admitted"] for record in seen.of("train")] == [20, 20, 0]
    assert [record["evicted"] for record in seen.of("train")] == [0, 0, 20]
    assert seen.of("evict")[0]["evicted"] == 20
    (tables,) = seen.of("tables")
    assert tables["tables"]["id"]["rows"] == sum(tables["tables"]["id"]["frequency"]) == 20


def test_a_line_of_the_log() -> None:
    seen = Records()
    trainer = Trainer(
        make_step(clip_grad_norm=1.0), make_batches(5), callbacks=[seen], log_every=2, transform=lambda batch: batch
    )
    trainer.fit([Train()])
    lines = seen.of("train")
    assert [line["step"] for line in lines] == [2, 4, 5]
    expected = {
        "event", "step", "name", "loss", "grad_norm", "samples", "samples_per_s", "seconds", "time/data", "admitted",
        "evicted", "rows/id", "lr/dense", "lr/sparse", "memory/tables", "memory/process",
    }  # fmt: skip
    phases = {"time/features", "time/lookup", "time/towers", "time/update"}
    assert set(lines[0]) == expected | phases
    assert set(lines[2]) == expected  # the stage's end, which was not a step to be logged
    assert all(line["samples_per_s"] > 0 for line in lines)


def test_the_time_of_a_step_is_booked_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = make_step(), Records()
    pauses = {"data": 0.02, "features": 0.03, "lookup": 0.04, "towers": 0.05, "update": 0.06}

    def pausing(phase: str, function: Any) -> Any:
        def paused(*args: Any) -> Any:
            time.sleep(pauses[phase])
            return function(*args)

        return paused

    class Slow(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                time.sleep(pauses["data"])
                yield batch

    model = step.model
    monkeypatch.setattr(model.engine, "forward", pausing("lookup", model.engine.forward))  # type: ignore[union-attr]
    monkeypatch.setattr(model.tower, "forward", pausing("towers", model.tower.forward))  # type: ignore[union-attr]
    monkeypatch.setattr(step.optimizers["sparse"], "step", pausing("update", step.optimizers["sparse"].step))
    trainer = Trainer(
        step, Slow(make_batches(1)), callbacks=[seen], log_every=1, transform=pausing("features", lambda batch: batch)
    )
    begin = time.perf_counter()
    trainer.fit([Train()])
    elapsed = time.perf_counter() - begin
    (line,) = seen.of("train")
    booked = {phase: line[f"time/{phase}"] for phase in pauses}
    assert all(booked[phase] >= pause for phase, pause in pauses.items())
    assert sum(booked.values()) <= elapsed  # no time is booked twice


def test_a_step_that_does_not_log_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step()
    fetched: set[int] = set()
    # torch's Adam keeps a counter on the host and reads that.
    step.optimizers["dense"] = torch.optim.SGD(dense_parameters(step.model), lr=0.1)
    trainer = Trainer(step, make_batches(6), callbacks=[Records()], log_every=3)
    # The guard reads the loss at once on a CPU, where nothing has to be waited for; on a GPU it does not.
    monkeypatch.setattr("recis_hybrid.pipelines.guard.LossGuard.watch", lambda *args: None)

    def counted(function: Any) -> Any:
        def count(self: torch.Tensor, *args: Any) -> Any:
            fetched.add(trainer.steps_done)
            return function(self, *args)

        return count

    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    trainer.fit([Train()])  # tables that grow look at how many rows they have
    fetched.clear()
    trainer.fit([Train()])
    assert fetched == {9, 12}


class NoWaiting(Callback):
    def before_step(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        if trainer.steps_done >= 10:  # the first steps make workspaces
            torch.cuda.set_sync_debug_mode("error")

    def after_step(self, trainer: Trainer) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_wait() -> None:
    class OnGpu(Model):
        def __init__(self) -> None:
            super().__init__()
            self.engine = EmbeddingEngine(
                {"id": EmbeddingConfig(dim=4)}, optimizer_state=optim.Adam.row_state(), device="cuda"
            )
            self.tower.cuda()

    model = OnGpu()
    optimizers = [torch.optim.Adam(dense_parameters(model)), optim.Adam(model.engine.parameters())]
    step = TorchStep(model, bce, optimizers, clip_grad_norm=1.0)
    batches = [batch_to(batch, "cuda") for batch in make_batches(30)]
    trainer = Trainer(step, batches, callbacks=[NoWaiting()], log_every=1000)
    trainer.fit([Train()])
    assert trainer.steps_done == 30


def test_early_stop_and_plateau_follow_a_metric() -> None:
    step, batches = make_step(lr=1e-9), make_batches()
    plateaus = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0, threshold=0.0, eps=0.0)
        for optimizer in step.optimizers.values()
    ]
    stop = EarlyStop("eval/auc", patience=3, min_delta=0.01)
    trainer = Trainer(
        step, batches, batches, metrics={"auc": AUC()}, callbacks=[PlateauSchedule("eval/auc", plateaus), stop]
    )
    trainer.fit(stage for _ in range(20) for stage in (Train(epochs=1), Evaluate()))
    assert trainer.steps_done == 8 * 4
    assert "eval/auc has not been better than" in str(trainer.stopped)
    assert stop.bad == 3
    assert step.optimizers["sparse"].param_groups[0]["lr"] < 1e-9
    with pytest.raises(ValueError, match="metric must be STAGE/METRIC, as 'eval/auc', got 'auc'"):
        EarlyStop("auc")


def test_a_seed_fixes_a_run() -> None:
    runs = []
    for seed in (1, 1, 2):
        step = make_step()
        Trainer(step, make_batches(), seed=seed).fit([Train()])
        runs.append(state_of(step))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["tower.2.weight"], runs[2]["tower.2.weight"])


# Resumption


def epochs(trainer: Trainer) -> Iterator[Stage]:
    for number in range(4):
        yield Train(epochs=1, name=f"epoch {number}")
        yield Evaluate()
        if trainer.figures["eval"]["auc"] > 0.7:
            yield Evaluate(name="again")
        yield Save()


class Interrupt(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == self.at:
            raise KeyboardInterrupt


def training(folder: Path | None, data: Any, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    step = make_step()
    saver = None if folder is None else Saver(folder, keep=None)
    more = [] if folder is None else [Checkpoint(steps=5)]
    step.schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.97) for o in step.optimizers.values()]
    options = {"metrics": {"auc": AUC()}, "seed": 3, **options}
    return Trainer(step, data, make_batches(2), saver=saver, callbacks=[*more, *callbacks], **options)


def interrupted(trainer: Trainer, stages: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(stages)
    trainer.saver = None  # as the end of a process does, this lets another save there


def dataset(tmp_path: Path, **options: Any) -> ColumnDataset:
    if not (tmp_path / "rows").exists():
        batches = make_batches(8)
        columns = {name: torch.cat([batch[name] for batch in batches]).numpy() for name in ("id", "label")}  # type: ignore[misc]
        (tmp_path / "rows").mkdir()
        pq.write_table(pa.table(columns), tmp_path / "rows" / "part.parquet", row_group_size=100)
    return ColumnDataset(tmp_path / "rows", ["id", "label"], 60, shuffle=True, **options)


def workers(tmp_path: Path) -> DataLoader[Batch]:
    return DataLoader(dataset(tmp_path), batch_size=None, num_workers=1, multiprocessing_context="fork")


def mixture(tmp_path: Path) -> Mixture:
    return Mixture({"a": dataset(tmp_path), "b": make_batches(3, seed=5)}, {"a": 2, "b": 1}, seed=2)


# JAX, where a test before has started it, warns of any fork; workers that read files never come near it.
@pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "at"),
    [*((kind, at) for kind in ("list", "dataset") for at in (3, 7, 9, 20)), ("loader", 7)],
)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_run_ends_bitwise_as_an_undisturbed_one(tmp_path: Path, kind: str, at: int, prefetch: int) -> None:
    def data() -> Any:
        return make_batches(9) if kind == "list" else {"dataset": dataset, "loader": workers}[kind](tmp_path)

    whole = training(None, data())
    stages = [stage for stage in epochs_of(whole)]
    whole.fit([stage for stage in stages if not isinstance(stage, Save)])
    cut = training(tmp_path / "run", data(), [Interrupt(at)], prefetch=prefetch)
    interrupted(cut, epochs(cut))
    resumed = training(tmp_path / "run", data(), prefetch=prefetch)
    resumed.fit(epochs(resumed), resume="latest")
    assert resumed.steps_done == 36
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures["eval"] == whole.figures["eval"]
    assert resumed.figures["again"] == resumed.figures["eval"]


def epochs_of(trainer: Trainer) -> list[Stage]:
    return [stage for number in range(4) for stage in (Train(epochs=1, name=f"epoch {number}"), Evaluate())]


def test_a_mixture_is_resumed_in_its_middle(tmp_path: Path) -> None:
    whole = training(None, mixture(tmp_path))
    whole.fit([Train(steps=23)])
    cut = training(tmp_path / "run", mixture(tmp_path), [Interrupt(14)])
    interrupted(cut, [Train(steps=23)])
    resumed = training(tmp_path / "run", mixture(tmp_path))
    resumed.fit([Train(steps=23)], resume="latest")
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [None, 2, 6, 8, 13])
def test_test_then_train_is_resumed_in_its_window(tmp_path: Path, at: int | None) -> None:
    opened: list[str] = []

    def open_window(window: Window) -> list[Batch]:
        opened.append(window.name)
        return make_batches(4, seed=int(window.name))

    def run(folder: Path | None, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        trainer = training(folder, None, callbacks, open_window=open_window)
        stages = WindowStages(
            Windows([["a"], ["b"], ["c"], ["d"]]),
            lambda w: [Evaluate(window=w), Train(window=w), *([] if folder is None else [Save()])],
        )
        if callbacks:
            interrupted(trainer, stages)
        else:
            trainer.fit(stages, **options)
        return trainer

    whole = run(None)
    assert opened == [name for name in "0123" for _ in range(2)]
    if at is not None:
        run(tmp_path / "run", [Interrupt(at)])
    opened.clear()
    resumed = run(tmp_path / "run", resume="latest")
    # The checkpoint before: within a window every fifth step, and at a window's end.
    assert "".join(opened) == {None: "00112233", 2: "00112233", 6: "12233", 8: "12233", 13: "33"}[at]
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures == whole.figures


class StopAt(Interrupt):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == self.at:
            trainer.stop("the machine is wanted back")


@pytest.mark.parametrize("own", [False, True])
def test_a_stopped_run_is_saved_and_goes_on_in_its_stage(tmp_path: Path, own: bool) -> None:
    def run(folder: Path | None, *callbacks: Callback, **options: Any) -> Trainer:
        trainer = training(folder, make_batches(9), callbacks)
        trainer.fit([Train(data=dataset(tmp_path) if own else "train", epochs=2), Evaluate()], **options)
        trainer.saver = None
        return trainer

    whole = run(None)
    stopped = run(tmp_path / "run", StopAt(7))
    assert (stopped.steps_done, stopped.figures) == (7, {})
    assert Saver(tmp_path / "run").steps() == [5, 7]
    resumed = run(tmp_path / "run", resume="latest")
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures == whole.figures


def test_a_run_that_was_stopped_early_stays_so(tmp_path: Path) -> None:
    def run(**options: Any) -> Trainer:
        batches, stop = make_batches(2), EarlyStop("eval/auc", patience=1, min_delta=1.0)
        trainer = Trainer(
            make_step(), batches, batches, metrics={"auc": AUC()}, saver=Saver(tmp_path), callbacks=[stop]
        )
        trainer.fit([stage for _ in range(5) for stage in (Train(), Evaluate(), Save())], **options)
        trainer.saver = None
        return trainer

    assert run().steps_done == 4
    again = run(resume="latest")
    assert (again.steps_done, again.stopped is None) == (4, False)


def test_resume_begins_anew_where_there_is_nothing_and_never_over_what_is_there(tmp_path: Path) -> None:
    trainer = training(tmp_path, make_batches(3))
    trainer.fit([Train(), Save()], resume="latest")
    assert trainer.saver is not None
    assert trainer.saver.steps() == [3]
    again = training(tmp_path, make_batches(3))
    with pytest.raises(ValueError, match=r'there are checkpoints of the steps \[3\] already; go on .* resume="latest"'):
        again.fit([Train(), Save()])
    again.fit([Train(), Save()], resume="latest")
    assert again.steps_done == 3
    with pytest.raises(ValueError, match="resume needs a saver"):
        training(None, make_batches(3)).fit([Train()], resume="latest")
    with pytest.raises(ValueError, match="there is no saver to save with"):
        training(None, make_batches(3)).fit([Save()])
