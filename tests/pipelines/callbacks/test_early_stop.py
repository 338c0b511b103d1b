from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import (
    EarlyStop,
    Evaluate,
    PlateauSchedule,
    SaveCheckpoint,
    Train,
    Trainer,
)
from recis_hybrid.saver import Saver
from tests.support.small import make_batches, make_step


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
    assert "eval/auc has not improved on" in str(trainer.stopped)
    assert stop.bad == 3
    assert step.optimizers["sparse"].param_groups[0]["lr"] < 1e-9
    with pytest.raises(ValueError, match="metric must be STAGE/METRIC, such as 'eval/auc', got 'auc'"):
        EarlyStop("auc")


def test_an_early_stopped_run_does_not_continue(tmp_path: Path) -> None:
    def run(**options: Any) -> Trainer:
        batches, stop = make_batches(2), EarlyStop("eval/auc", patience=1, min_delta=1.0)
        trainer = Trainer(
            make_step(), batches, batches, metrics={"auc": AUC()}, saver=Saver(tmp_path), callbacks=[stop]
        )
        trainer.fit([stage for _ in range(5) for stage in (Train(), Evaluate(), SaveCheckpoint())], **options)
        trainer.saver = None
        return trainer

    assert run().steps_done == 4
    again = run(resume="latest")
    assert (again.steps_done, again.stopped is None) == (4, False)
