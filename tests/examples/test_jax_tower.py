from __future__ import annotations

import json
import sys

import pytest
import torch

from examples import jax_tower
from tests.support.near import assert_near

pytestmark = pytest.mark.jax


def test_all_towers_compute_the_same_function() -> None:
    results = []
    inputs = torch.randn(8, 20)
    for choice in jax_tower.TOWERS:
        torch.manual_seed(0)
        tower = jax_tower.make_tower(choice, 20)
        x = inputs.clone().requires_grad_()
        y = tower(x)
        y.backward(torch.ones(8, 1))
        results.append((y.detach(), x.grad, sum(p.numel() for p in tower.parameters())))
    for other in results[1:]:
        assert_near(other, results[0])


@pytest.mark.quick
def test_the_model_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tower", "nnx", "--rows", "20000", "--batch-size", "256", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["jax_tower.py", *arguments])
    jax_tower.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.65 < figures["auc"] < figures["bayes_auc"]
    assert figures["compilations"] == 6  # forward, backward and evaluation, for full batches and the last batch
    assert {"logloss", "samples_per_s", "seconds", "tower"} <= set(figures)
