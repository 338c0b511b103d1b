import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    Callback,
    Checkpoint,
    Evaluate,
    JsonLog,
    Profile,
    ProgressBar,
    Save,
    TensorBoard,
    Train,
    Trainer,
)
from recis_hybrid.saver import Saver
from tests.support.small import assert_same, make_batches, make_step, state_of


def run(callbacks: list[Callback], **options: Any) -> Trainer:
    batches = make_batches(5)
    trainer = Trainer(make_step(), batches, batches, metrics={"auc": AUC()}, callbacks=callbacks, log_every=2)
    trainer.fit([Train(), Evaluate()], **options)
    return trainer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_order_of_calls(tmp_path: Path) -> None:
    calls: list[str] = []

    def noting(hook: str) -> Any:
        return lambda self, trainer, *args: calls.append(hook)

    hooks = [name for name in vars(Callback) if name.startswith(("before_", "after_"))]
    noter = type("Noter", (Callback,), {hook: noting(hook) for hook in hooks})()
    trainer = Trainer(make_step(), make_batches(1), saver=Saver(tmp_path), callbacks=[noter])
    trainer.fit([Train(), Save()])
    assert calls == [
        "before_fit", "before_stage", "before_step", "before_backward", "after_backward", "after_step", "after_stage",
        "before_stage", "before_save", "after_save", "after_stage", "after_fit",
    ]  # fmt: skip
    assert set(calls) == set(hooks)


def test_the_log_is_json(tmp_path: Path) -> None:
    trainer = run([JsonLog(tmp_path / "run" / "log.jsonl")])
    records = lines(tmp_path / "run" / "log.jsonl")
    assert [(record["event"], record["step"]) for record in records] == [
        ("train", 2), ("train", 4), ("train", 5), ("eval", 5), ("tables", 5)
    ]  # fmt: skip
    assert records[3]["eval/auc"] == trainer.figures["eval"]["auc"]
    assert math.isfinite(records[0]["loss"])


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    batches = make_batches(1)
    batches[0]["label"] = batches[0]["label"] * 0  # type: ignore[operator]
    log = JsonLog(tmp_path / "log.jsonl")
    trainer = Trainer(make_step(), eval_data=batches, metrics={"auc": AUC()}, callbacks=[log])
    with pytest.warns(RuntimeWarning, match="AUC: undefined and given as NaN: it needs both classes"):
        trainer.fit([Evaluate()])
    assert lines(tmp_path / "log.jsonl")[0]["eval/auc"] is None


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    class Crash(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.steps_done == 7:
                raise KeyboardInterrupt

    def trainer(*more: Callback) -> Trainer:
        callbacks = [JsonLog(tmp_path / "log.jsonl"), Checkpoint(steps=4), *more]
        return Trainer(make_step(), make_batches(10), saver=Saver(tmp_path), callbacks=callbacks, log_every=1)

    crashed = trainer(Crash())
    with pytest.raises(KeyboardInterrupt):
        crashed.fit([Train()])
    crashed.saver = None
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # cut by a crash
    trainer().fit([Train()], resume="latest")
    assert [record["step"] for record in lines(tmp_path / "log.jsonl") if record["event"] == "train"] == [*range(1, 11)]


def test_the_bar_shows_loss_samples_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    run([ProgressBar()])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "5/5" in shown.err
    assert "samples/s" in shown.err
    assert "step 5, eval: auc 1.00000" in shown.err


def test_only_rank_0_shows_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr("recis_hybrid.embedding.engine.group_of", lambda group: None)  # there is no group of ranks
    callbacks = [ProgressBar(), JsonLog(tmp_path / "log"), TensorBoard(tmp_path / "tb"), Profile(tmp_path / "trace")]
    run(callbacks)
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within tensorboard
def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    run([TensorBoard(tmp_path), log := JsonLog(tmp_path / "log.jsonl")])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert log is not None
    tags = set(found.Tags()["scalars"])
    assert {
        "train/loss", "train/samples_per_s", "time/data", "time/lookup", "time/towers", "time/update", "rows/id",
        "train/admitted", "train/evicted", "memory/tables", "memory/process", "eval/auc", "lr/sparse",
    } <= tags  # fmt: skip
    logged = [r["loss"] for r in lines(tmp_path / "log.jsonl") if r["event"] == "train"]
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(logged)
    assert [event.step for event in found.Scalars("train/loss")] == [2, 4, 5]


def test_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    run([Profile(tmp_path / "trace.json", first=2, steps=2)])
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert sum(name.startswith("Optimizer.step#Adam") for name in names) == 2 * 2
    assert all({"ts", "dur", "pid", "tid"} <= event.keys() for event in trace["traceEvents"] if event.get("ph") == "X")


def test_checkpoints_by_time(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=None)
    Trainer(make_step(), make_batches(4), saver=saver, callbacks=[Checkpoint(seconds=1e-9)]).fit([Train()])
    assert saver.steps() == [1, 2, 3, 4]


def small_run(folder: Path, *, resume: bool, delay: float = 0.0) -> Trainer:
    """Five passes over a file, saved every third step."""
    data = ColumnDataset(folder / "rows.csv", ["id", "label"], 32, shuffle=True, prefetch=2)

    class Tell(Callback):
        def after_step(self, trainer: Trainer) -> None:
            time.sleep(delay)
            print(trainer.steps_done, flush=True)

    trainer = Trainer(
        make_step(clip_grad_norm=1.0), data, data, metrics={"auc": AUC()}, seed=1,
        saver=Saver(folder / "run", keep=2, async_save=True), callbacks=[Checkpoint(steps=3), Tell()],
    )  # fmt: skip
    stages = [stage for _ in range(5) for stage in (Train(epochs=1), Evaluate(), Save())]
    trainer.fit(stages, resume="latest" if resume else None)
    return trainer


def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text(
            "id,label\n" + "".join(f"{n * 7 % 50},{n % 2}.0\n" for n in range(330))
        )
    program = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from pathlib import Path\n"
        "from tests.pipelines.test_callbacks import small_run\n"
        f"small_run(Path({str(tmp_path / 'killed')!r}), resume=False, delay=0.01)"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.strip() == "28":  # in the third of five passes
                run.send_signal(signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    whole = small_run(tmp_path / "whole", resume=False)
    capsys.readouterr()
    resumed = small_run(tmp_path / "killed", resume=True)
    steps = [int(line) for line in capsys.readouterr().out.splitlines()]
    assert steps[0] <= 28
    assert steps == list(range(steps[0], 56))
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures == whole.figures
