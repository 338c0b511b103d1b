from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.near import assert_near

pytestmark = pytest.mark.jax


@pytest.fixture
def program(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "examples"))
    return importlib.import_module("jax_tower")


def test_the_towers_are_the_same_function(program: ModuleType) -> None:
    results = []
    inputs = torch.randn(8, 20)
    for choice in program.TOWERS:
        torch.manual_seed(0)
        tower = program.make_tower(choice, 20)
        x = inputs.clone().requires_grad_()
        y = tower(x)
        y.backward(torch.ones(8, 1))
        results.append((y.detach(), x.grad, sum(p.numel() for p in tower.parameters())))
    for other in results[1:]:
        assert_near(other, results[0])


@pytest.mark.quick
def test_it_learns(program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tower", "nnx", "--rows", "20000", "--batch-size", "256", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["jax_tower.py", *arguments])
    program.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.65 < figures["auc"] < figures["bayes_auc"]
    assert figures["compilations"] == 6  # forward, backward and evaluation, of full batches and of the last one
    assert {"logloss", "samples_per_s", "seconds", "tower"} <= set(figures)
