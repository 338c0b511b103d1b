import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from recis_hybrid import optim
from recis_hybrid.embedding import Anchor, EmbeddingConfig, EmbeddingEngine, dense_parameters
from recis_hybrid.metrics import AUC, LogLoss
from recis_hybrid.pipelines import TorchStep, evaluate, fit
from recis_hybrid.ragged import Batch


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4)}, optimizer_state=optim.Adam.row_state())
        self.head = nn.Linear(4, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.head(self.engine(batch)["id"])[:, 0]  # type: ignore[no-any-return]


def make() -> tuple[Model, TorchStep, list[Batch]]:
    torch.manual_seed(0)
    model = Model()
    optimizers = [
        torch.optim.Adam(dense_parameters(model), lr=0.05),
        optim.Adam(model.engine.parameters(), lr=0.05),
    ]
    step = TorchStep(model, nn.functional.binary_cross_entropy_with_logits, optimizers)
    batches: list[Batch] = []
    for _ in range(8):
        ids = torch.randint(0, 20, (64,))
        batches.append({"id": ids, "label": (ids % 2).float()})
    return model, step, batches


def test_fit_learns_and_evaluate_sees_it() -> None:
    model, step, batches = make()
    figures = fit(step, batches, epochs=10, progress=False)
    assert (figures.steps, figures.samples) == (80, 80 * 64)
    assert figures.samples_per_s == pytest.approx(figures.samples / figures.seconds)
    reached = evaluate(model, batches, {"auc": AUC(), "logloss": LogLoss()})
    assert reached["auc"] > 0.99
    assert reached["logloss"] < 0.2


def test_a_step_is_zero_grad_forward_backward_step() -> None:
    model, step, batches = make()
    twin, _, _ = make()
    twin.load_state_dict(model.state_dict())
    optimizers = [
        torch.optim.Adam(dense_parameters(twin), lr=0.05),
        optim.Adam(twin.engine.parameters(), lr=0.05),
    ]
    for batch in batches:
        got = step(batch)["loss"]
        for optimizer in optimizers:
            optimizer.zero_grad()
        label = batch["label"]
        assert isinstance(label, torch.Tensor)
        loss = nn.functional.binary_cross_entropy_with_logits(twin(batch), label)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(got, loss.detach())


def test_clipping_bounds_the_gradients_of_towers_and_tables_together() -> None:
    model, _, batches = make()
    dense = torch.optim.SGD(dense_parameters(model), lr=1.0)
    before = [parameter.detach().clone() for parameter in dense_parameters(model)]
    step = TorchStep(model, lambda logits, labels: 1e3 * logits.sum(), [dense], clip_grad_norm=0.5)
    step(batches[0])
    moved = [(b - p.detach()).square().sum() for b, p in zip(before, dense_parameters(model), strict=True)]
    rows = [p.grad.square().sum() for p in model.parameters() if isinstance(p, Anchor) and p.grad is not None]
    assert rows
    assert float(sum(moved) + sum(rows)) ** 0.5 == pytest.approx(0.5, rel=1e-3)


def test_evaluate_restores_the_mode_and_inserts_nothing() -> None:
    model, _, batches = make()
    model.train()
    evaluate(model, batches, {"auc": AUC()})
    assert model.training
    assert len(model.engine.tables[0]) == 0
    model.eval()
    evaluate(model, batches, {"auc": AUC()})
    assert not model.training


def test_the_log_has_a_line_a_refresh(tmp_path: Path) -> None:
    _, step, batches = make()
    fit(step, batches, progress=False, log=tmp_path / "log.jsonl", refresh_s=0.0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == list(range(1, 9))
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_run_shorter_than_a_refresh_is_logged_once(tmp_path: Path) -> None:
    _, step, batches = make()
    figures = fit(step, batches, progress=False, log=tmp_path / "log.jsonl", refresh_s=1e9)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == asdict(figures)


def test_the_bar_shows_loss_and_samples(capsys: pytest.CaptureFixture[str]) -> None:
    _, step, batches = make()
    fit(step, batches, epochs=2)
    shown = capsys.readouterr().err
    assert "16/16" in shown
    assert "samples/s" in shown


def test_bad_runs_are_refused() -> None:
    _, step, batches = make()
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        fit(step, batches, epochs=0)
    with pytest.raises(ValueError, match="the data gave no batch"):
        fit(step, [], progress=False)
    with pytest.raises(KeyError, match="label column 'label' must be a dense column of the batch, which has"):
        fit(step, [{"id": torch.tensor([1])}], progress=False)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        fit(lambda batch: {"loss": torch.tensor(math.nan)}, batches[:1], progress=False)
