"""Bundles with JAX towers, scored by JAX without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.publish import PublishError, write_bundle
from recis_hybrid.serving import Bundle

pytestmark = pytest.mark.jax
pytest.importorskip("jax", reason="jax is not installed")
pytest.importorskip("flatbuffers", reason="flatbuffers, which jax.export needs, is not installed")

BATCH = {"user": torch.tensor([1, 2, 3]), "item": torch.tensor([4, 5, 6]), "price": torch.tensor([0.5, 1.5, 2.5])}


class Model:
    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp

        from recis_hybrid.bridge import JaxTower

        random = np.random.default_rng(0)

        def mlp(params: Any, user: Any, item: Any, price: Any) -> Any:
            x = jnp.concatenate([user, item, price[:, None]], axis=1)
            return (jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"].astype(jnp.float32))[:, 0]

        self.engine = EmbeddingEngine({name: EmbeddingConfig(dim=4) for name in ("user", "item")}, seed=1)
        draw = lambda *shape: random.normal(0, 1, shape).astype(np.float32)  # noqa: E731
        narrow = jnp.asarray(draw(8, 1)).astype(jnp.bfloat16)
        self.tower = JaxTower(mlp, {"w1": draw(9, 8), "b1": draw(8), "w2": narrow})
        self.engine(BATCH)  # inserts rows

    def write(self, folder: Path, tower: nn.Module | None = None) -> Path:
        chosen = self.tower if tower is None else tower
        inputs = ["user", "item", "price"]
        path = write_bundle(
            folder, 3, features=None, engine=self.engine, tower=chosen, inputs=inputs, batch=BATCH, logits=True
        )
        return Path(str(path))

    @torch.no_grad()
    def scores(self, batch: dict[str, Tensor]) -> np.ndarray[Any, Any]:
        vectors = self.engine.eval()(batch)
        scores: Tensor = torch.sigmoid(self.tower.eval()(vectors["user"], vectors["item"], batch["price"]))
        return scores.numpy()


def batch_of(rows: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, 9, (2, rows), generator=random)
    return {"user": ids[0], "item": ids[1], "price": torch.rand(rows, generator=random)}


def test_scores_are_those_of_the_tower(tmp_path: Path) -> None:
    model = Model()
    bundle = Bundle(model.write(tmp_path))
    for rows in (1, 2, 5, 8, 33):
        batch = batch_of(rows)
        found = bundle.predict({name: column.numpy() for name, column in batch.items()})["score"]
        np.testing.assert_allclose(found, model.scores(batch), rtol=0, atol=1e-6)
    # A server with JAX and without torch.
    batch = batch_of(5)
    script = (
        "import json, sys\n"
        "sys.modules['torch'] = None\n"
        "from recis_hybrid.serving import Bundle\n"
        "assert 'jax' not in sys.modules\n"
        "print(json.dumps(Bundle(sys.argv[1]).predict(json.loads(sys.argv[2]))['score'].tolist()))\n"
    )
    columns = json.dumps({name: column.tolist() for name, column in batch.items()})
    command = [sys.executable, "-c", script, str(tmp_path), columns]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), model.scores(batch), rtol=0, atol=1e-6)


def test_torch_modules_around_jax_towers_are_refused(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self, tower: nn.Module) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, *inputs: Tensor) -> Tensor:
            output: Tensor = self.tower(*inputs)
            return output

    model = Model()
    with pytest.raises(PublishError, match="the tower Around contains a JaxTower.*Pass the JaxTower itself"):
        model.write(tmp_path, Around(model.tower))
