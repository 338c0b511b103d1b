"""One model whose tower is written in torch, Flax nnx or Equinox. The rest of the program does not change.

    python examples/jax_tower.py --tower equinox

All three towers start from the same weights, so their results agree up to rounding. Embeddings are passed to the JAX
towers without a copy. The towers' parameters belong to torch, and a torch optimizer trains them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

import recis_hybrid as rh

FIELDS = ["user", "item", "site", "price_level"]
FEATURES = [
    *[rh.Feature(name) for name in ("user", "item", "price")],
    rh.Feature("site", ops=[rh.features.Hash("farm")]),
    rh.Feature("price_level", source="price", ops=[rh.features.Bucketize([0.5, 1, 2, 4])]),
]
DIM = 8
HIDDEN = (128, 64)
TOWERS = ("torch", "nnx", "equinox")
Weights = Sequence[tuple[Tensor, Tensor]]  # (inner, outer) and (outer,) of each layer


def write_clicks(folder: Path, rows: int, seed: int) -> float:
    """Write ``train`` (90 % of the rows) and ``test`` as Parquet; return the best possible AUC on ``test``.

    A click depends on the user, the item, whether the user likes the item's kind, and the price.
    """
    rng = np.random.default_rng(seed)
    users, items = rng.integers(-(2**63), 2**63 - 1, (2, 1000))
    liking, quality = rng.normal(0, 1, (2, 1000))
    user, item = (1000 * rng.random((2, rows)) ** 2).astype(int)
    price = rng.lognormal(0, 1, rows)
    logit = liking[user] + quality[item] + 1.5 * (user % 4 == item % 4) - 0.5 * np.log(price) - 1.5
    p_click = 1 / (1 + np.exp(-logit))
    label = (rng.random(rows) < p_click).astype(np.float32)
    sites = pa.array([f"site-{number}.example" for number in range(7)]).take(pa.array(item % 7))
    log = {"user": users[user], "item": items[item], "site": sites, "price": price.astype(np.float32), "label": label}
    table, cut = pa.table(log), rows * 9 // 10
    pq.write_table(table.slice(0, cut), folder / "train.parquet")
    pq.write_table(table.slice(cut), folder / "test.parquet")
    return rh.metrics.auc(torch.tensor(label[cut:]), torch.tensor(p_click[cut:]))


def draw_weights(width: int) -> Weights:
    """Draw initial weights with torch's generator."""
    sizes = (width, *HIDDEN, 1)
    return [(nn.init.xavier_normal_(torch.empty(inner, outer)), torch.zeros(outer)) for inner, outer in pairwise(sizes)]


def torch_tower(weights: Weights) -> nn.Module:
    layers: list[nn.Module] = []
    for w, b in weights:
        linear = nn.Linear(*w.shape)
        with torch.no_grad():
            linear.weight.copy_(w.t())
            linear.bias.copy_(b)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def nnx_tower(weights: Weights) -> nn.Module:
    import jax
    from flax import nnx

    class Mlp(nnx.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(*w.shape, rngs=rngs) for w, _ in weights])
            for layer, (w, b) in zip(self.layers, weights, strict=True):
                layer.kernel[...], layer.bias[...] = rh.bridge.to_jax(w), rh.bridge.to_jax(b)

        def __call__(self, x: Any) -> Any:
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    return rh.bridge.from_nnx(Mlp())


def equinox_tower(weights: Weights) -> nn.Module:
    import equinox
    import jax

    class Mlp(equinox.Module):  # type: ignore[misc]
        layers: list[Any]

        def __init__(self) -> None:
            self.layers = [
                equinox.tree_at(
                    lambda linear: (linear.weight, linear.bias),
                    equinox.nn.Linear(*w.shape, key=jax.random.key(0)),
                    (rh.bridge.to_jax(w).T, rh.bridge.to_jax(b)),
                )
                for w, b in weights
            ]

        def __call__(self, x: Any) -> Any:  # one sample; from_equinox vmaps it over the batch
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    return rh.bridge.from_equinox(Mlp())


def make_tower(choice: str, width: int) -> nn.Module:
    """Return a tower from ``[B, width]`` to ``[B, 1]``."""
    makers = {"torch": torch_tower, "nnx": nnx_tower, "equinox": equinox_tower}
    return makers[choice](draw_weights(width))


class Model(nn.Module):
    """A tower over embeddings and the logarithm of the price."""

    def __init__(self, tower: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        configs = {field: rh.EmbeddingConfig(dim=DIM) for field in FIELDS}
        self.engine = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adam, seed=seed)
        self.tower = make_tower(tower, len(FIELDS) * DIM + 1)

    def forward(self, batch: rh.Batch) -> Tensor:
        """Return the logits ``[B]``."""
        log_price = batch["price"].log()[:, None]  # type: ignore[union-attr]
        logits: Tensor = self.tower(torch.cat([*self.engine(batch).values(), log_price], dim=1))
        return logits[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="nnx", help="framework of the tower (nnx)")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the log (200000)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows (1)")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples per step (2048)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        best = write_clicks(Path(folder), args.rows, args.seed)
        train, test = (
            rh.ColumnDataset(
                f"{folder}/{split}.parquet",
                ["user", "item", "site", "price", "label"],
                args.batch_size,
                shuffle=split == "train",
                seed=args.seed,
                transforms=rh.FeatureEngine(FEATURES),
            )
            for split in ("train", "test")
        )
        model = Model(args.tower, args.seed)
        sparse = rh.optim.Adam(model.engine.parameters(), lr=2e-3)
        dense = torch.optim.Adam(rh.dense_parameters(model), lr=1e-3)
        step = rh.TorchStep(model, nn.functional.binary_cross_entropy_with_logits, {"dense": dense, "sparse": sparse})
        metrics = {"auc": rh.metrics.AUC(), "logloss": rh.metrics.LogLoss()}
        callbacks = [] if args.quiet else [rh.pipelines.ProgressBar()]
        trainer = rh.Trainer(step, train, test, metrics=metrics, callbacks=callbacks)
        start = time.perf_counter()
        trainer.fit([rh.Train(epochs=args.epochs)])
        rate = trainer.samples / (time.perf_counter() - start)
        figures = trainer.fit([rh.Evaluate()])["eval"]

    compiled = getattr(model.tower, "compilations", 0)
    print(f"\ntower in {args.tower}: AUC {figures['auc']:.4f}, best possible {best:.4f}")
    print(f"{rate:,.0f} samples/s, {compiled} programs compiled\n")
    last = {"auc": figures["auc"], "logloss": figures["logloss"], "bayes_auc": best, "samples_per_s": rate}
    last |= {"seconds": time.perf_counter() - begin, "tower": args.tower, "compilations": compiled}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
