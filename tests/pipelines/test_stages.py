"""Trainings with several stages: warm-up, teacher and student, several sources."""

from __future__ import annotations

import math

import pytest
import torch

from recis_hybrid.metrics import AUC, MSE
from recis_hybrid.pipelines import (
    Evaluate,
    Mixture,
    Train,
    Trainer,
)
from recis_hybrid.ragged import Batch
from tests.support.small import Records, make_batches, make_step


def test_frozen_towers_do_not_change_while_tables_warm_up() -> None:
    step, batches = make_step(), make_batches()
    before = [p.detach().clone() for p in step.model.tower.parameters()]  # type: ignore[union-attr]
    trainer = Trainer(step, batches)
    stages = [Train(max_steps=5, freeze=[step.model.tower])]  # type: ignore[list-item]
    trainer.fit(stages)
    after = list(step.model.tower.parameters())  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert int(step.engines[0].tables[0].export(0)["updated_step"].max()) == 5
    trainer.fit([Train(max_steps=5)])
    assert trainer.steps_done == 10
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_a_student_learns_from_its_teacher() -> None:
    teacher = make_step()
    student = make_step(label="teacher_score")
    batches = make_batches()

    def add_scores(batch: Batch) -> Batch:
        return {**batch, "teacher_score": teacher.predict(batch)[""].scores}

    trainer = Trainer({"teacher": teacher, "student": student}, batches, batches)
    trainer.fit(
        [
            Train(epochs=10, step="teacher"),
            Evaluate(name="teacher", step="teacher", metrics={"auc": AUC()}),
            Evaluate(name="before", step="student", transform=add_scores, metrics={"mse": MSE()}),
            Train(epochs=10, step="student", transform=add_scores),
            Evaluate(name="after", step="student", transform=add_scores, metrics={"mse": MSE()}),
        ]
    )
    assert trainer.figures["teacher"]["auc"] > 0.99
    assert trainer.figures["after"]["mse"] < 0.01 < 0.1 < trainer.figures["before"]["mse"]
    assert {"teacher.model", "teacher.engine", "student.dense", "trainer"} <= set(trainer.parts())


def test_a_mixture_draws_sources_by_proportion() -> None:
    ads, organic = make_batches(3, seed=1), make_batches(5, seed=2)
    mixture = Mixture({"ads": ads, "organic": organic}, {"ads": 1, "organic": 3}, seed=4)
    records = Records()
    Trainer(make_step(), mixture, callbacks=[records]).fit([Train(max_steps=400)])
    ads_count = sum(any(batch is one for one in ads) for batch in records.batches)
    assert abs(ads_count - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)
    for name, share in (("organic", 0.0), ("organic", math.inf)):
        with pytest.raises(ValueError, match=f"the proportion of '{name}' must be a finite number above 0, got"):
            Mixture({"ads": ads, "organic": organic}, {"ads": 1, name: share})
    with pytest.raises(ValueError, match="must have the same names"):
        Mixture({"ads": ads}, {"organic": 1})
