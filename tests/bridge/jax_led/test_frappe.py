"""Frappe, a public click log: training led by JAX reaches the AUC of training led by torch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recis_hybrid import ColumnDataset, EmbeddingConfig, EmbeddingEngine, optim
from recis_hybrid.embedding import Normal
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import Evaluate, Step, TorchStep, Train, Trainer

pytestmark = [pytest.mark.jax, pytest.mark.slow]
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
from recis_hybrid.bridge.jax_led import JaxStep, JaxTables  # noqa: E402

FIELDS = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
DIM = 10
SIZES = (len(FIELDS) * DIM, 128, 128, 1)
LR = 3e-3
EPOCHS = 4


def engine() -> EmbeddingEngine:
    config = EmbeddingConfig(dim=DIM, initializer=Normal(0, 0.01))
    return EmbeddingEngine(dict.fromkeys(FIELDS, config), optimizer=optim.Adam, seed=0)


def weights() -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return [random.normal(0, (2 / (m + n)) ** 0.5, (m, n)).astype(np.float32) for m, n in pairwise(SIZES)]


def led_by_jax() -> Step:
    def mlp(params: Any, vectors: Any) -> Any:
        x = jnp.concatenate([vectors[field] for field in FIELDS], 1)
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = params[-1]
        return (x @ w + b)[:, 0]

    rows = engine()
    tables = JaxTables(rows, rows.make_optimizer(lr=LR))
    params = [(jnp.asarray(w), jnp.zeros(w.shape[1])) for w in weights()]
    return JaxStep(mlp, params, optax.sigmoid_binary_cross_entropy, optax.adam(LR), tables)


class Model(nn.Module):
    """The same tower in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = engine()
        layers: list[nn.Module] = []
        for w in weights():
            linear = nn.Linear(*w.shape)
            linear.weight.data, linear.bias.data = torch.from_numpy(w.T.copy()), torch.zeros(w.shape[1])
            layers += [linear, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, batch: Any) -> torch.Tensor:
        vectors = self.engine(batch)
        output: torch.Tensor = self.layers(torch.cat([vectors[field] for field in FIELDS], 1))[:, 0]
        return output


def led_by_torch() -> Step:
    model = Model()
    optimizers = {
        "dense": torch.optim.Adam(model.layers.parameters(), LR),
        "sparse": model.engine.make_optimizer(lr=LR),
    }
    return TorchStep(model, nn.functional.binary_cross_entropy_with_logits, optimizers)


def auc_of(step: Step, folder: Path) -> float:
    columns = [*FIELDS, "label"]
    train = ColumnDataset(f"{folder}/train", columns, 1024, shuffle=True, seed=0, drop_remainder=True)
    test = ColumnDataset(f"{folder}/test", columns, 2048)
    trainer = Trainer(step, train, test, metrics={"auc": AUC()}, seed=0)
    return float(trainer.fit([Train(epochs=EPOCHS), Evaluate()])["eval"]["auc"])


def test_frappe_led_by_jax_reaches_the_auc_of_torch(data_dir: Path) -> None:
    ours, theirs = (auc_of(step, data_dir / "frappe" / "x1") for step in (led_by_jax(), led_by_torch()))
    assert theirs > 0.95
    assert abs(ours - theirs) < 0.003
