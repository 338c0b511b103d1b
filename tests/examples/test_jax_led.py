from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import Callback, Evaluate, JsonLog, PeriodicCheckpoint, Train, Trainer
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver

program = pytest.importorskip("examples.jax_led", reason="jax is not installed")

pytestmark = pytest.mark.jax


def make_batches(fields: list[str]) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches: list[Batch] = []
    for _ in range(8):
        ids: Batch = {field: torch.randint(0, 30, (64,), generator=generator) for field in fields}
        batches.append({**ids, "label": (ids["user"] % 2).float()})  # type: ignore[operator]
    return batches


class Interrupt(Callback):
    def after_step(self, trainer: Trainer) -> None:
        if trainer.steps_done == 13:
            raise KeyboardInterrupt


def test_a_jax_led_step_runs_in_the_same_stages_and_resumes_bitwise(tmp_path: Path) -> None:
    batches = make_batches(program.FIELDS)

    def training(*more: Callback) -> tuple[Any, Trainer]:
        step = program.make_step(0, 32)
        callbacks = [JsonLog(tmp_path / f"{len(more)}.jsonl"), *more]
        saver = Saver(tmp_path / "run") if more else None
        return step, Trainer(
            step, batches, batches, metrics={"auc": AUC()}, saver=saver, callbacks=callbacks, log_every=4
        )

    stages = [Train(epochs=4), Evaluate()]
    uninterrupted, trainer = training()
    assert trainer.fit(stages)["eval"]["auc"] > 0.95
    lines = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert lines[-3]["loss"] < 0.6 < lines[0]["loss"]
    assert {"time/lookup", "time/towers", "time/update"} <= lines[0].keys()
    _, interrupted_trainer = training(PeriodicCheckpoint(steps=5), Interrupt())
    with pytest.raises(KeyboardInterrupt):
        interrupted_trainer.fit(stages)
    interrupted_trainer.saver = None
    resumed, resumed_trainer = training(PeriodicCheckpoint(steps=5))
    resumed_trainer.fit(stages, resume="latest")
    assert resumed_trainer.steps_done == 32
    leaves = uninterrupted.state.state_dict()
    assert any("count" in name for name in leaves)  # includes optax's state
    assert all(torch.equal(leaf, resumed.state.state_dict()[name]) for name, leaf in leaves.items())
    for one, other in zip(uninterrupted.engines[0].tables, resumed.engines[0].tables, strict=True):
        for member in range(len(one.members)):
            first, second = one.export(member), other.export(member)
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "20000", "--batch-size", "256", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["jax_led.py", *arguments])
    program.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.65 < figures["auc"] < figures["bayes_auc"]
    assert {"logloss", "samples_per_s", "seconds"} <= set(figures)
