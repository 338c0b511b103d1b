"""Contents of the records of the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recis_hybrid.app.report import write_report
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Placement, Unused
from recis_hybrid.metrics import AUC, GAUC, Calibration, LogLoss, auc
from recis_hybrid.pipelines import (
    Callback,
    Evaluate,
    Evict,
    JsonLog,
    PeriodicCheckpoint,
    ProgressBar,
    Record,
    TensorBoard,
    TorchStep,
    Train,
    Trainer,
)
from recis_hybrid.pipelines.metrics_record import Recorder
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from tests.support.devices import on_accelerators
from tests.support.small import Records, bce, make_batches, make_step


def test_evictions_and_admissions_are_counted() -> None:
    step, records = make_step(), Records()
    first, second = make_batches(2), make_batches(2, seed=1)
    for batch in second:
        batch["id"] = batch["id"] + 100  # type: ignore[operator]
    trainer = Trainer(step, callbacks=[records], log_every=2)
    trainer.fit([Train(data=first), Train(data=second), Evict(Unused(steps=2), compact=True), Train(data=second)])
    rows = [record["rows/id"] for record in records.of("train")]
    assert rows == [20, 40, 20]
    assert [record["admitted"] for record in records.of("train")] == [20, 20, 0]
    assert [record["evicted"] for record in records.of("train")] == [0, 0, 20]
    assert records.of("evict")[0]["evicted"] == 20
    (tables,) = records.of("tables")
    assert tables["tables"]["id"]["rows"] == sum(tables["tables"]["id"]["frequency"]) == 20


def test_a_stage_evicts_tables_by_name() -> None:
    records, first, second = Records(), make_batches(2), make_batches(2, seed=1)
    for batch in second:
        batch["id"] = batch["id"] + 100  # type: ignore[operator]
    trainer = Trainer(make_step(), callbacks=[records])
    trainer.fit([Train(data=first), Train(data=second), Evict({}), Evict({"id": Unused(steps=2)})])
    assert [record["evicted"] for record in records.of("evict")] == [0, 20]
    with pytest.raises(ValueError, match=r"Evict: there are no tables \['item'\]; the tables are \['id'\]"):
        trainer.fit([Evict({"item": Unused(steps=1)})])


def test_a_record_has_all_figures() -> None:
    records = Records()
    trainer = Trainer(
        make_step(clip_grad_norm=1.0), make_batches(5), callbacks=[records], log_every=2, transform=lambda batch: batch
    )
    trainer.fit([Train()])
    lines = records.of("train")
    assert [line["step"] for line in lines] == [2, 4, 5]
    expected = {
        "event",
        "step",
        "name",
        "loss",
        "grad_norm",
        "samples",
        "samples_per_s",
        "seconds",
        "time/data",
        "admitted",
        "evicted",
        "rows/id",
        "lr/dense",
        "lr/sparse",
        "memory/tables",
        "memory/process",
    }
    phases = {"time/features", "time/lookup", "time/towers", "time/update"}
    assert set(lines[0]) == expected | phases
    assert set(lines[2]) == expected  # at the end of the stage, phases are not measured
    assert all(line["samples_per_s"] > 0 for line in lines)


def test_each_group_of_an_optimizer_has_its_learning_rate() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    parts = {
        "dense": torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 0.25}]),
        "tower": torch.optim.SGD([first], lr=0.125),
    }
    record = Recorder().train_record(steps=1, samples=1, engines=[], parts=parts, phases={})
    rates = {name: value for name, value in record.items() if name.startswith("lr/")}
    assert rates == {"lr/dense/0": 0.5, "lr/dense/1": 0.25, "lr/tower": 0.125}


@on_accelerators
def test_the_hit_rate_of_caches_is_that_since_the_last_record(device: str) -> None:
    config = EmbeddingConfig(dim=4, placement=Placement(id_map="cuda", blocks="pinned", cache_bytes=1 << 14))
    engines = [EmbeddingEngine({name: config}, device=device) for name in ("a", "b")]
    recorder, rates = Recorder(), []
    for first in (0, 0, 10, None, 0):
        for engine, name in zip(engines, "ab", strict=True):
            if first is None:
                engine.tables[0].clear()  # its counters restart
            else:
                engine({name: torch.arange(first, first + 40, device=device)})
        record = recorder.train_record(steps=1, samples=40, engines=engines, parts={}, phases={})
        rates.append(record["cache/hit_rate"])
    assert rates == [0, 1, 30 / 40, 0, 0]
    plain = EmbeddingEngine({"a": EmbeddingConfig(dim=4)})
    record = recorder.train_record(steps=1, samples=40, engines=[plain], parts={}, phases={})
    assert not {"cache/hit_rate", "hits", "misses"} & record.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within tensorboard
def test_tables_that_track_ids_are_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step, records = make_step(), Records()
    (engine,) = step.engines
    engine.track(hottest=2)
    batches = [{**batch, "id": torch.tensor(ids)} for batch, ids in zip(make_batches(3, rows=4), IDS, strict=True)]

    class Restart(Callback):
        def after_stage(self, trainer: Any, stage: Any) -> None:
            engine.track(hottest=1)

    callbacks = [records, JsonLog(tmp_path / "log.jsonl"), TensorBoard(tmp_path), Restart()]
    trainer = Trainer(step, batches, callbacks=callbacks, log_every=2)
    trainer.fit([Train(epochs=1), Evict(Unused(steps=1)), Train(epochs=1)])
    trained = [
        {name.removeprefix("table/id/"): value for name, value in record.items() if name.startswith("table/")}
        for record in records.of("train")
    ]
    load = 1 / engine.tables[0].store.id_map.capacity
    assert trained[:2] == [
        {"rows": 3, "ids": 8, "new_rows": 3, "rejected_ids": 0, "evicted_rows": 0, "hit_rate": 5 / 8, "load": 3 * load},
        {"rows": 4, "ids": 4, "new_rows": 1, "rejected_ids": 0, "evicted_rows": 0, "hit_rate": 3 / 4, "load": 4 * load},
    ]
    # The second stage starts with the rows of the last step, 7 and 9, and counts from zero.
    assert [(each["rows"], each["ids"], each["new_rows"]) for each in trained[2:]] == [(4, 4, 2), (4, 8, 0)]
    assert [record["hottest"]["id"] for record in records.of("train")] == [
        [[7, 4, 0], [5, 3, 0]],
        [[7, 7, 0], [5, 3, 0]],
        [[5, 3, 0]],
        [[7, 7, 0]],
    ]
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["hottest"] for line in logged if line["event"] == "train"] == [
        record["hottest"] for record in records.of("train")
    ]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for figure in trained[0]:
        found = [(event.step, event.value) for event in events.Scalars(f"table/id/{figure}")]
        steps = [record["step"] for record in records.of("train")]
        assert found == [(step, pytest.approx(each[figure])) for step, each in zip(steps, trained, strict=True)]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("hottest/id/text_summary")]
    assert texts[0].splitlines()[2:] == ["| 7 | 4 | 0 |", "| 5 | 3 | 0 |"]
    assert write_report(tmp_path, None).exists()


IDS = [[5, 5, 5, 6], [7, 7, 7, 7], [7, 7, 7, 9]]


FIGURES = ("step", "loss", "grad_norm", "auc", "mean_output", "clicks")


def record_figures(step: TorchStep) -> list[dict[str, float]]:
    """Return a list that collects the figures of each later forward pass of a step."""
    figures: list[dict[str, float]] = []
    forward = step._forward

    def recorded(batch: Batch) -> Any:
        total, values = forward(batch)
        figures.append({name: float(value) for name, value in values.items()})
        return total, values

    step._forward = recorded  # type: ignore[method-assign]
    return figures


def test_figures_are_means_over_the_steps_since_the_last_record() -> None:
    step, records = make_step(groups="user"), Records()
    losses = record_figures(step)

    class LogSteps(Callback):
        def after_step(self, trainer: Trainer) -> None:
            step.log("done", trainer.steps_done)  # counts for the next step, because this one has ended

    trainer = Trainer(step, make_batches(7), callbacks=[LogSteps(), records], log_every=3)
    trainer.fit([Train()])
    lines = records.of("train")
    assert [line["step"] for line in lines] == [3, 6, 7]
    values = [each["loss"] for each in losses]
    for line, (a, b) in zip(lines, ((0, 3), (3, 6), (6, 7)), strict=True):
        assert line["loss"] == pytest.approx(sum(values[a:b]) / (b - a), rel=1e-12)
    assert [line["done"] for line in lines] == [1.5, 4.0, 6.0]
    every = Records()
    step = make_step()
    losses = record_figures(step)
    Trainer(step, make_batches(3), callbacks=[every], log_every=1).fit([Train()])
    assert [line["loss"] for line in every.of("train")] == [each["loss"] for each in losses]


def test_means_with_accumulation_and_several_stages() -> None:
    step, records = make_step(), Records()
    losses = record_figures(step)
    Trainer(step, make_batches(6), callbacks=[records], log_every=2, accumulate=2).fit([Train(), Train(max_steps=1)])
    values = [each["loss"] for each in losses]
    updates = [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]
    assert [line["loss"] for line in records.of("train")] == [
        pytest.approx(expected, rel=1e-6) for expected in ((updates[0] + updates[1]) / 2, updates[2], updates[3])
    ]


def step_with_figures(step_of: Any = make_step, **options: Any) -> TorchStep:
    """Return a step that logs additional figures and metrics."""

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        step.log("mean_output", outputs.mean())
        step.log("rows", len(labels))
        return bce(outputs, labels)

    step: TorchStep = step_of(loss, metrics={"auc": AUC(), "clicks": Calibration()}, clip_grad_norm=1.0, **options)
    return step


def test_figures_and_metrics_logged_by_a_step() -> None:
    step, records, batches = step_with_figures(), Records(), make_batches(5)
    scored: list[Any] = []
    outputs: list[float] = []
    forward = step.model.forward

    def recorded(batch: Batch) -> Any:
        found = forward(batch)
        if step.model.training:
            scored.append((found.detach().sigmoid(), batch["label"]))
            outputs.append(float(found.detach().mean()))
        return found

    step.model.forward = recorded
    trainer = Trainer(step, batches, batches, metrics={"auc": AUC()}, callbacks=[records], log_every=2)
    trainer.fit([Train(), Evaluate()])
    for line, (a, b) in zip(records.of("train"), ((0, 2), (2, 4), (4, 5)), strict=True):
        scores, labels = (torch.cat([pair[n] for pair in scored[a:b]]) for n in range(2))
        assert line["auc"] == auc(labels, scores)
        assert line["clicks"] == pytest.approx(float(scores.double().mean() / labels.double().mean()), rel=1e-6)
        assert line["mean_output"] == pytest.approx(sum(outputs[a:b]) / (b - a), rel=1e-6)
        assert line["rows"] == 64.0
    # Figures logged during the evaluation are ignored; this one, logged after it, counts.
    step.log("mean_output", torch.tensor(5.0))
    assert float(step(batches[0])["mean_output"]) == pytest.approx((5.0 + outputs[-1]) / 2, rel=1e-6)


def test_the_bar_and_the_report_show_the_means(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = Records()
    callbacks = [ProgressBar(), JsonLog(tmp_path / "log.jsonl"), records]
    Trainer(step_with_figures(), make_batches(4), callbacks=callbacks, log_every=4).fit([Train()])
    (line,) = records.of("train")
    error = capfd.readouterr().err
    for figure in (f"loss {line['loss']:.4f}", f"auc {line['auc']:.4g}", f"mean_output {line['mean_output']:.4g}"):
        assert figure in error
    page = write_report(tmp_path).read_text()
    for name in ("Loss", "auc", "mean_output"):
        assert f"<h2>{name}</h2>" in page
    assert f"<b>{line['loss']:.4f}</b>" in page


def test_an_overflowing_update_is_excluded_from_the_mean_norm() -> None:
    step, records = make_step(precision="float16", loss_scale=2.0**40, clip_grad_norm=1.0), Records()
    Trainer(step, make_batches(8) * 5, callbacks=[records], log_every=40).fit([Train()])
    (line,) = records.of("train")
    assert step._scaler.get_scale() < 2.0**40  # the first updates overflowed
    assert 0 < line["grad_norm"] < 100


def test_log_rejects_reserved_names_and_wrong_values() -> None:
    step = make_step()
    for name in ("loss", "samples_per_s", "time/data", "loss/click"):
        with pytest.raises(ValueError, match=f"the log uses '{name}' itself"):
            step.log(name, 1.0)
    with pytest.raises(ValueError, match=r"value of 'gate' must be a scalar, got shape \[3\]; take its mean"):
        step.log("gate", torch.zeros(3))
    with pytest.raises(TypeError, match="the value of 'gate' must be a number, got 'high'"):
        step.log("gate", "high")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'auc' must be a number, got an AUC; pass it .*metrics=\{'auc': AUC\(\)\}"):
        step.log("auc", AUC())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"metrics must be a mapping of metrics by name, .*, got an AUC; name it"):
        make_step(metrics=AUC())
    with pytest.raises(TypeError, match=r"the metric 'auc' must be a metric, such as AUC\(\), got the class AUC"):
        make_step(metrics={"auc": AUC})
    with pytest.raises(ValueError, match="the log uses 'loss' itself; give the metric another name"):
        make_step(metrics={"loss": LogLoss()})
    with pytest.raises(ValueError, match="the metric 'gauc' needs groups; set groups= to their column"):
        make_step(metrics={"gauc": GAUC()})
    with pytest.raises(ValueError, match="the metric 'auc' needs labels; set label= to their column"):
        make_step(label=None, metrics={"auc": AUC()})


def test_a_step_must_return_a_loss() -> None:
    class WithoutLoss(TorchStep):
        def __call__(self, *batches: Batch) -> Any:
            return {name: value for name, value in super().__call__(*batches).items() if name != "loss"}

    step = make_step()
    without_loss = WithoutLoss(step.model, bce, step.optimizers)
    with pytest.raises(TypeError, match="a step must return a mapping with a scalar tensor 'loss', got {}"):
        Trainer(without_loss, make_batches(1)).fit([Train()])


class Interrupt(Callback):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == 8:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [2, 5])
def test_a_resumed_run_logs_the_same_records(tmp_path: Path, at: int) -> None:
    def fit(folder: str, *callbacks: Callback, **options: Any) -> list[Record]:
        records = Records()
        trainer = Trainer(
            step_with_figures(),
            make_batches(4),
            saver=Saver(tmp_path / folder, keep=None),
            log_every=4,
            seed=1,
            callbacks=[PeriodicCheckpoint(steps=at), records, *callbacks],
        )
        try:
            trainer.fit([Train(epochs=3)], **options)
        except KeyboardInterrupt:
            pass
        trainer.saver = None
        return [{name: line[name] for name in FIGURES} for line in records.of("train")]

    whole = fit("whole")
    assert [line["step"] for line in whole] == [4, 8, 12]
    first = fit("interrupted", Interrupt())
    resumed = fit("interrupted", resume="latest")
    assert first == whole[: len(first)]
    assert [line["step"] for line in resumed] == {2: [12], 5: [8, 12]}[at]  # resumed from steps 8 and 5
    assert resumed == whole[-len(resumed) :]


def test_a_resumed_run_may_have_different_training_metrics(tmp_path: Path) -> None:
    def fit(metrics: dict[str, Any], steps: int) -> Record:
        records, options = Records(), {"log_every": 3, "saver": Saver(tmp_path)}
        trainer = Trainer(
            make_step(metrics=metrics), make_batches(8), callbacks=[records, PeriodicCheckpoint(steps=2)], **options
        )
        trainer.fit([Train(max_steps=steps)], resume="latest")
        trainer.saver = None
        return records.of("train")[-1]

    assert "auc" not in fit({}, 2)
    assert 0 < fit({"auc": AUC(), "loss_of_log": LogLoss()}, 4)["auc"] <= 1
    assert "auc" not in fit({"mean": Calibration()}, 6)


def test_a_new_training_discards_the_figures_of_the_previous_one() -> None:
    step, records = step_with_figures(), Records()
    trainer = Trainer(step, make_batches(2), callbacks=[records, Interrupt()], log_every=50)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit([Train(epochs=5)])
    losses = record_figures(step)
    trainer.fit([Train(max_steps=2)])
    (line,) = records.of("train")
    assert line["loss"] == pytest.approx((losses[0]["loss"] + losses[1]["loss"]) / 2, rel=1e-12)
