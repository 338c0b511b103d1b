"""Runs that are killed by SIGKILL and resumed finish bitwise identical to uninterrupted ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.app import cli
from recis_hybrid.columnio import ColumnDataset, ReadOptions
from recis_hybrid.embedding import Unused, dense_parameters
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    Callback,
    Evaluate,
    Evict,
    LrSchedule,
    PeriodicCheckpoint,
    PlateauSchedule,
    SaveCheckpoint,
    Stage,
    TorchStep,
    Train,
    Trainer,
)
from recis_hybrid.saver import Saver
from tests.support.small import Model, assert_same, bce, state_of


class WithL2(Model):
    """Adds an L2 penalty of all rows, including those that are not in the batch."""

    def forward(self, batch: Any) -> Any:
        self.penalty = 0.01 * self.engine({"id": torch.arange(50)})["id"].square().sum()
        return super().forward(batch)


def small_run(folder: Path, *, resume: bool, delay: float = 0.0) -> Trainer:
    """Train on a file, with a background save every third step."""
    data = ColumnDataset(folder / "rows.csv", ["id", "label"], 16, shuffle=True, read=ReadOptions(prefetch=2))

    class PrintStep(Callback):
        def after_step(self, trainer: Trainer) -> None:
            time.sleep(delay)
            print(trainer.steps_done, flush=True)

    torch.manual_seed(0)
    model = WithL2()
    dense = torch.optim.Adam(dense_parameters(model), lr=0.05, weight_decay=0.01)
    sparse = optim.AdamW(model.engine.parameters(), lr=0.05, weight_decay=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(dense, "max", patience=0, threshold=0.5)
    step = TorchStep(
        model,
        lambda outputs, labels: bce(outputs, labels) + model.penalty,
        {"dense": dense, "sparse": sparse},
        clip_grad_norm=1.0,
        precision="float16",
        loss_scale=1024.0,
        schedules=[
            torch.optim.lr_scheduler.CosineAnnealingLR(dense, 40),
            LrSchedule(sparse, lambda n: 0.05 / (1 + n / 20)),
        ],
    )
    trainer = Trainer(
        step,
        data,
        data,
        metrics={"auc": AUC()},
        seed=1,
        accumulate=2,
        saver=Saver(folder / "run", keep=2, async_save=True),
        callbacks=[PeriodicCheckpoint(steps=3), PlateauSchedule("eval/auc", [plateau]), PrintStep()],
    )
    stages: list[Stage] = [Train(max_steps=8, freeze=[model.tower])]
    for _ in range(5):
        stages += [Train(epochs=1), Evaluate(), Evict(Unused(steps=5)), SaveCheckpoint()]
    trainer.fit(stages, resume="latest" if resume else None)
    return trainer


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 28])  # in the warm-up, and in the second pass
def test_a_resumed_run_is_bitwise_identical_to_an_uninterrupted_one(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text(
            "id,label\n" + "".join(f"{n * 7 % 50},{n % 2}.0\n" for n in range(330))
        )
    program = (
        "from pathlib import Path\n"
        "from tests.pipelines.test_killed import small_run\n"
        f"small_run(Path({str(tmp_path / 'killed')!r}), resume=False, delay=0.01)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment(root)
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.strip() == str(at):
                run.send_signal(signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    whole = small_run(tmp_path / "whole", resume=False)
    capsys.readouterr()
    resumed = small_run(tmp_path / "killed", resume=True)
    steps = [int(line) for line in capsys.readouterr().out.splitlines()]
    assert steps[0] <= at
    assert steps == list(range(steps[0], whole.steps_done + 1))
    assert_same(state_of(whole.steps[""]), state_of(resumed.steps[""]))  # type: ignore[arg-type]
    assert resumed.figures == whole.figures
    for one, other in zip(whole.steps[""].optimizers.values(), resumed.steps[""].optimizers.values(), strict=True):  # type: ignore[attr-defined]
        assert [group["lr"] for group in one.param_groups] == [group["lr"] for group in other.param_groups]


@pytest.mark.slow
def test_a_killed_command_is_resumed_bitwise(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, log = tmp_path / "first" / "config.yaml", tmp_path / "killed" / "log.jsonl"
    assert cli.main(["init", str(config.parent)]) == 0
    settings = ["--quiet", "train.epochs=4", "train.checkpoint_steps=7", "train.patience=null", "model.dropout=0.2"]
    command = [
        sys.executable,
        "-m",
        "recis_hybrid.app.cli",
        "train",
        str(config),
        *settings,
        f"run={tmp_path / 'killed'}",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment(root)) as run:
        while run.poll() is None and not (log.exists() and '"step": 60' in log.read_text()):
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    last = []
    for name, more in (("whole", []), ("killed", ["--resume"])):
        assert cli.main(["train", str(config), *settings, *more, f"run={tmp_path / name}"]) == 0
        last.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert last[0]["steps"] == 160
    assert last[1] == last[0]
    assert cli.main(["diff", *(str(tmp_path / name / "step_000160") for name in ("whole", "killed"))]) == 0
