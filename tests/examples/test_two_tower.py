"""Two-tower retrieval beside the same model in plain torch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import recis_hybrid as rh
from examples import two_tower
from tests.support.programs import start_ranks


def test_both_models_start_with_the_same_losses_and_gradients() -> None:
    train, _, kinds = two_tower.split(two_tower.make_clicks(80, 60, 2000, seed=1))
    data = rh.ColumnDataset.from_arrow(train, [*two_tower.FEATURES, "log_q"], 64)
    engine = rh.EmbeddingEngine(two_tower.make_configs(), optimizer=rh.optim.Adam, seed=1)
    sizes = {"user": kinds.size(0), "item": kinds.size(1)}
    models = [two_tower.TwoTowers(engine, 1), two_tower.TwoTowers(two_tower.PlainTables(sizes, 1), 1)]
    assert isinstance(models[0].lookup, rh.EmbeddingEngine)
    for number, batch in enumerate(data):
        ours, plain = (model(batch) for model in models)
        # Sums of some hundred terms of at most 1 / TEMPERATURE, which are rounded differently.
        assert abs(ours.item() - plain.item()) < 1e-4 * plain.item()
        if number == 0:
            for loss in (ours, plain):
                loss.backward()
            weights = [model.user_tower[0].weight.grad for model in models]  # type: ignore[union-attr]
            scale = weights[1].abs().max().item()
            assert scale > 0
            torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4 * scale)


def test_frequent_items_are_corrected_and_not_their_own_negatives() -> None:
    model = two_tower.TwoTowers(two_tower.PlainTables({"user": 4, "item": 4}, 0), 0)
    history = rh.RaggedTensor.from_lists([[0], [1], [2]])
    batch = {"user": torch.arange(3), "item": torch.tensor([0, 1, 0]), "history": history}
    batch["log_q"] = torch.tensor([0.5, 0.25, 0.5]).log()
    found = model.lookup({name: batch[name] for name in two_tower.FEATURES})
    logits = (model.users(found) @ model.items(found).T / two_tower.TEMPERATURE).exp() / torch.tensor([0.5, 0.25, 0.5])
    shares = [logits[0, 0] / logits[0, :2].sum(), logits[1, 1] / logits[1].sum(), logits[2, 2] / logits[2, 1:].sum()]
    expected = -torch.stack(shares).log().mean()
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_recall_is_far_above_that_of_popular_items(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["two_tower.py", "--quiet"])
    two_tower.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["recall"] > 2 * figures["popular_recall"] > 0
    assert abs(figures["recall"] - figures["twin_recall"]) < 0.02


def test_it_runs_on_two_ranks(root: Path, tmp_path: Path) -> None:
    program = Path(shutil.copy(root / "examples" / "two_tower.py", tmp_path))
    arguments = ["--clicks", "4000", "--epochs", "1", "--quiet"]
    first, second = (rank.finish(300) for rank in start_ranks(program, arguments))
    assert first.returncode == 0, first.stderr[-3000:]
    assert second.returncode == 0, second.stderr[-3000:]
    assert {"recall", "popular_recall", "seconds"} <= set(json.loads(first.stdout.splitlines()[-1]))
    assert second.stdout == ""
