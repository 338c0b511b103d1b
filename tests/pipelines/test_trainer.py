from __future__ import annotations

import pytest
import torch

from recis_hybrid.metrics import AUC, GAUC, LogLoss
from recis_hybrid.pipelines import (
    Evaluate,
    Objective,
    Stage,
    Train,
    Trainer,
)
from tests.support.small import Records, assert_same, bce, make_batches, make_step, state_of


def test_a_trainer_learns_and_evaluates() -> None:
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
        ([Train(max_steps=6)], [0, 1, 2, 3, 0, 1]),
        ([Train(max_steps=6, epochs=1)], [0, 1, 2, 3]),
        ([Train(max_steps=3), Train(epochs=1)], [0, 1, 2, 3]),  # continues the unfinished pass
        ([Train(max_steps=4), Train(epochs=1)], [0, 1, 2, 3] * 2),  # the first pass has ended
        ([Train(max_steps=3), Train(max_steps=3)], [0, 1, 2, 3, 0, 1]),
    ],
)
@pytest.mark.parametrize("prefetch", [0, 1, 3, 9])
def test_the_bounds_of_a_stage(stages: list[Stage], read: list[int], prefetch: int) -> None:
    batches, records = make_batches(4), Records()
    Trainer(make_step(), batches, callbacks=[records], prefetch=prefetch).fit(stages)
    assert [next(n for n, b in enumerate(batches) if b is batch) for batch in records.batches] == read


def test_accumulation_ends_with_the_pass() -> None:
    batches, records = make_batches(5), Records()
    trainer = Trainer(make_step(), batches, callbacks=[records], accumulate=2, log_every=1)
    trainer.fit([Train(epochs=2)])
    assert trainer.steps_done == 6  # 2 + 2 + 1, twice
    assert len(records.batches) == 10
    assert [record["samples"] for record in records.of("train")] == [128, 256, 320, 448, 576, 640]


def test_a_seed_makes_runs_reproducible() -> None:
    runs = []
    for seed in (1, 1, 2):
        step = make_step()
        Trainer(step, make_batches(), seed=seed).fit([Train()])
        runs.append(state_of(step))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["tower.2.weight"], runs[2]["tower.2.weight"])


def test_each_objective_has_its_own_figures() -> None:
    objectives = {"click": Objective(loss=bce, groups="user"), "buy": Objective(loss=bce, label="other")}
    batches = make_batches()
    trainer = Trainer(make_step(objectives, ("click", "buy")), batches, batches, metrics={"loss": LogLoss()})
    trainer.fit([Train(epochs=10), Evaluate(), Evaluate(metrics={"click": {"gauc": GAUC()}}, name="by_user")])
    assert set(trainer.figures["eval"]) == {"click.loss", "buy.loss"}
    assert trainer.figures["eval"]["click.loss"] != trainer.figures["eval"]["buy.loss"]
    assert max(trainer.figures["eval"].values()) < 0.3
    assert set(trainer.figures["by_user"]) == {"click.gauc"}
    with pytest.raises(ValueError, match=r"there are metrics of \['sell'\], but the objectives are"):
        trainer.fit([Evaluate(metrics={"sell": {"auc": AUC()}})])
    with pytest.raises(ValueError, match=r"the metric 'gauc' needs groups; set TorchStep\(groups=\)"):
        trainer.fit([Evaluate(metrics={"gauc": GAUC()})])


def test_tables_shared_by_two_steps_are_saved_once() -> None:
    first, second = make_step(), make_step()
    second.model.engine = first.model.engine  # type: ignore[union-attr]
    parts = Trainer({"first": first, "second": second}).parts()
    assert ("first.engine" in parts, "second.engine" in parts) == (True, False)
