"""Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and end a training, and a resumed run finishes bitwise identical."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recis_hybrid.app import cli
from recis_hybrid.columnio import Windows
from recis_hybrid.pipelines import Callback, Stage, Train, Trainer, WindowStages
from recis_hybrid.pipelines.interruption import Interruption, Terminated
from recis_hybrid.saver import Saver
from tests.pipelines.interrupted_run import STAGES, trainer_of
from tests.support.programs import free_port, in_processes
from tests.support.small import assert_same, make_batches, make_step, state_of

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True, scope="module")
def ctrl_c() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, which a shell turns off for programs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = trainer_of(tmp_path_factory.mktemp("whole"), "nowhere", 0)
    trainer.fit(STAGES)
    assert trainer.steps_done == 15
    return trainer


@pytest.mark.parametrize(
    ("where", "number", "saved_at"),
    [
        ("step3", signal.SIGTERM, 3),  # in the middle of a pass
        ("step5", signal.SIGINT, 5),  # in its last step
        ("step4", signal.SIGUSR1, 4),  # which already has a checkpoint
        ("evaluate", signal.SIGTERM, 5),
        ("save", signal.SIGINT, 4),  # in the background
    ],
)
def test_a_run_resumed_after_a_signal_is_bitwise_identical(
    tmp_path: Path, uninterrupted: Trainer, where: str, number: int, saved_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in HANDLED]
    interrupted = trainer_of(tmp_path, where, number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Terminated) as caught:
        interrupted.fit(STAGES)
    assert [signal.getsignal(each) for each in HANDLED] == before
    if isinstance(caught.value, Terminated):
        assert caught.value.code == 128 + number
    assert interrupted.steps_done == max(interrupted.saver.steps()) == saved_at  # type: ignore[union-attr]
    message = f"ended by {signal.Signals(number).name} after step {saved_at}; the state is saved in {tmp_path}"
    assert message in capsys.readouterr().err
    assert any(message in note for note in caught.value.__notes__)
    interrupted.saver = None  # releases the folder, like the exit of a process
    resumed = trainer_of(tmp_path, "nowhere", 0)
    resumed.fit(STAGES, resume="latest")
    assert_same(state_of(uninterrupted.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures == uninterrupted.figures


def test_signals_before_the_first_step_and_without_a_saver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where, saver, message in (
        ("before_fit", True, "no stage had started, so nothing was saved"),
        ("step2", False, "there is no saver, so nothing was saved"),
    ):
        trainer = trainer_of(tmp_path / where, where, signal.SIGTERM, saver=saver)
        with pytest.raises(Terminated):
            trainer.fit(STAGES)
        assert message in capsys.readouterr().err
        assert not (tmp_path / where).exists() or Saver(tmp_path / where).steps() == []
    # The trainer remains usable, for example in a notebook.
    steps = trainer.steps_done
    trainer.fit([Train(max_steps=1)])
    assert trainer.steps_done == steps + 1


def test_a_stage_before_the_first_step_is_saved(tmp_path: Path) -> None:
    class Prepare(Stage):
        def run(self, trainer: Trainer) -> None:
            calls.append("prepare")
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    calls: list[str] = []
    stages = [Prepare(), Train(max_steps=2)]
    trainer = Trainer(make_step(), make_batches(3), saver=Saver(tmp_path))
    with pytest.raises(Terminated):
        trainer.fit(stages)
    trainer.saver = None
    resumed = Trainer(make_step(), make_batches(3), saver=Saver(tmp_path))
    resumed.fit(stages, resume="latest")
    assert (calls, resumed.steps_done) == (["prepare"], 2)


def test_a_signal_ends_a_wait_for_a_window(tmp_path: Path) -> None:
    class Signal(Callback):
        def after_stage(self, trainer: Trainer, stage: Stage) -> None:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    for name in ("monday", "tuesday"):
        (tmp_path / "days" / name).mkdir(parents=True)
    (tmp_path / "days" / "monday" / "_SUCCESS").touch()
    opened: list[str] = []

    def run(*callbacks: Callback, **options: Any) -> Trainer:
        days = Windows(tmp_path / "days", poll_s=600 if callbacks else 0.01, idle_s=None if callbacks else 0.0)
        trainer = Trainer(
            make_step(),
            saver=Saver(tmp_path / "run"),
            callbacks=callbacks,
            open_window=lambda day: opened.append(day.name) or make_batches(2),  # type: ignore[func-returns-value]
        )
        trainer.fit(WindowStages(days, lambda day: [Train(window=day)]), **options)
        return trainer

    with pytest.raises(Terminated):
        run(Signal())
    (tmp_path / "days" / "tuesday" / "_SUCCESS").touch()
    assert run(resume="latest").steps_done == 4
    assert opened == ["monday", "tuesday"]


def test_stop_ends_a_wait_for_a_window(tmp_path: Path) -> None:
    days = Windows(tmp_path, poll_s=600)
    threading.Timer(0.1, days.stop).start()
    assert list(days) == []


def test_user_handlers_and_other_threads_are_not_affected(tmp_path: Path) -> None:
    def handle(number: int, frame: object) -> None:
        received.append(number)

    received: list[int] = []
    before = signal.signal(signal.SIGTERM, handle)
    try:
        trainer_of(tmp_path, "step3", signal.SIGTERM).fit(STAGES)
        assert (received, signal.getsignal(signal.SIGTERM)) == ([signal.SIGTERM], handle)
    finally:
        signal.signal(signal.SIGTERM, before)
    trainer = Trainer(make_step(), make_batches(3))
    thread = threading.Thread(target=trainer.fit, args=([Train()],))
    thread.start()
    thread.join()
    assert trainer.steps_done == 3


def test_a_signal_after_the_last_check_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_repeated_by_a_launcher_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")

    def receive_twice() -> None:
        with Interruption() as interruption:
            for _ in range(2):  # from the scheduler and from torchrun
                os.kill(os.getpid(), signal.SIGTERM)
            received.append(interruption.requested)

    received: list[signal.Signals | None] = []
    with pytest.raises(Terminated):
        receive_twice()
    assert received == [signal.SIGTERM]


# Tests in separate processes


def environment(root: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads()), **more}


def start(root: Path, folder: Path, more: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.interrupted_run", str(folder), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(root, **(more or {})),
        cwd=root,
    )


def test_a_signal_ends_a_wait_for_a_batch(tmp_path: Path, root: Path, uninterrupted: Trainer) -> None:
    run = start(root, tmp_path, where="reading")
    assert run.stdout is not None
    assert run.stdout.readline() == "waits\n"
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 143, stderr
    # The process was waiting for a batch of the third step.
    assert Saver(tmp_path).steps() == [2]
    resumed = trainer_of(tmp_path, "nowhere", 0)
    resumed.fit(STAGES, resume="latest")
    assert_same(state_of(uninterrupted.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]


SECOND_SIGNAL = """
import os, signal, sys, time
from recis_hybrid.pipelines import Callback, Train, Trainer
from recis_hybrid.saver import Saver
from tests.support.small import make_batches, make_step

class Slow(Saver):
    def save(self, *args, **parts):
        print("saves", flush=True)
        time.sleep(600)

class Signal(Callback):
    def after_step(self, trainer):
        os.kill(os.getpid(), int(sys.argv[1]))

Trainer(make_step(), make_batches(2), saver=Slow(sys.argv[2]), callbacks=[Signal()]).fit([Train()])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_immediately(tmp_path: Path, root: Path, number: int) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", SECOND_SIGNAL, str(int(number)), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        env=environment(root),
        cwd=root,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "saves\n"
    run.send_signal(number)
    run.communicate(timeout=300)
    assert run.returncode == -number  # 130 and 143 in a shell


def test_the_command_saves_and_reports_it(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", str(tmp_path / "first")]) == 0
    config, log = tmp_path / "first" / "config.yaml", tmp_path / "first" / "run" / "log.jsonl"
    arguments = [str(config), "--quiet", "train.epochs=200", "train.patience=null", "train.log_every=5"]
    command = [sys.executable, "-m", "recis_hybrid.app.cli", "train", *arguments, f"run={log.parent}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(root)) as run:
        while run.poll() is None and not (log.exists() and log.read_text()):
            threading.Event().wait(0.01)
        run.send_signal(signal.SIGTERM)
        _, stderr = run.communicate(timeout=300)
    assert run.returncode == 143, stderr
    step = Saver(log.parent).latest()
    assert f"ended by SIGTERM after step {step}; the state is saved in {log.parent}" in stderr


def fit_on_rank(folder: Path, where: str, rank: int = 0) -> int:
    trainer = trainer_of(folder, where, signal.SIGTERM, rank=rank)
    with pytest.raises(Terminated) if where != "nowhere" else nullcontext():
        trainer.fit(STAGES, resume="latest")
    assert trainer.saver is not None
    trainer.saver.wait()
    trainer.saver = None  # releases the folder
    return trainer.steps_done


def on_rank(rank: int, port: int, folder: Path) -> None:
    """Check that both ranks save at the same step if one gets a signal, and continue bitwise identically."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    assert fit_on_rank(folder / "whole", "nowhere") == 12  # rank 0 has 5 batches, rank 1 has 7, and an update takes 2
    for where, expected_steps in (("step2", {2, 3, 4}), ("evaluate", {4})):
        saved_step = fit_on_rank(folder / where, where, rank=1)
        assert saved_step in expected_steps
        steps = [0, 0]
        dist.all_gather_object(steps, saved_step)
        assert steps == [saved_step] * 2
        assert Saver(folder / where).latest() == saved_step
        fit_on_rank(folder / where, "nowhere")
    fit_on_rank(folder / "before", "before_fit")
    assert Saver(folder / "before").steps() == []
    dist.destroy_process_group()


def test_ranks_save_together(tmp_path: Path) -> None:
    port = free_port()
    in_processes(on_rank, (port, tmp_path), 2)
    files = [
        {path.relative_to(each).as_posix(): path.read_bytes() for path in each.rglob("*.safetensors")}
        for each in (tmp_path / name / "step_000012" for name in ("whole", "step2", "evaluate"))
    ]
    assert files[0]
    assert files[0] == files[1] == files[2]
