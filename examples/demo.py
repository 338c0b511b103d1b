"""End-to-end demo: write a click log, train a model with a torch and a JAX tower, save it, load it.

    python examples/demo.py

The log is sampled from known probabilities, so the best AUC that any model can reach is known and printed with the
model's. The demo takes about a minute on two cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

import recis_hybrid as rh

# Ids by field; a click depends on each of them.
IDS = {"user": 5000, "item": 2000, "advertiser": 300, "app": 200, "city": 120, "hour": 168, "slot": 8, "device": 24}
SITES = [
    f"{word}-{number:03d}.example" for word in ("news", "café", "música", "новости", "旅行") for number in range(80)
]
NUMBERS = ["price", "age_hours", "similarity"]
FACTORS = 8
HIDDEN = 400

# Strings are hashed and numbers bucketized. Ids may be any 64-bit values.
FEATURES = [
    *[rh.Feature(name) for name in [*IDS, "history", *NUMBERS]],
    rh.Feature("site", ops=[rh.features.Hash("farm")]),
    rh.Feature("price_level", source="price", ops=[rh.features.Bucketize([0.5, 1, 2, 4, 8, 16])]),
    rh.Feature("age_level", source="age_hours", ops=[rh.features.Bucketize([1, 3, 6, 12, 24, 48, 96])]),
]
FIELDS = [*IDS, "site", "price_level", "age_level", "history"]


def make_clicks(rows: int, seed: int) -> pa.Table:
    """Sample a click log.

    The logit of ``p_click``, the true click probability, is the sum of an effect of each id, the user's taste for the
    item's kind, the share of that kind in the user's history, an interaction of slot and device, and smooth functions
    of the numbers. A few frequent ids make up most of the rows.
    """
    rng = np.random.default_rng(seed)
    sizes = IDS | {"site": len(SITES)}
    effects = {name: rng.normal(0, 0.45, size) for name, size in sizes.items()}
    taste, pairs = rng.integers(0, 8, IDS["user"]), rng.normal(0, 0.35, (IDS["slot"], IDS["device"]))
    ids = {name: rng.integers(-(2**63), 2**63 - 1, size, endpoint=True) for name, size in IDS.items()}
    ids["device"][:4] = 0, -1, -(2**63), 2**63 - 1  # values that other hash tables reserve

    def draw(name: str, count: int) -> Any:
        return (sizes[name] * rng.random(count) ** 3).astype(np.int64)

    at = {name: draw(name, rows) for name in sizes}
    kind = at["item"] % 8
    lengths = np.minimum(rng.geometric(0.18, rows) - 1, 20)
    liked = rng.random(lengths.sum()) < 0.6
    history = draw("item", lengths.sum())
    history = np.where(liked, history // 8 * 8 + np.repeat(taste[at["user"]], lengths), history)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    alike = np.concatenate([[0], np.cumsum(history % 8 == np.repeat(kind, lengths))])
    price, age = rng.lognormal(0, 1, rows), rng.exponential(36, rows)
    similarity = rng.uniform(-1, 1, rows)

    logit = sum(effects[name][at[name]] for name in sizes) + pairs[at["slot"], at["device"]] - 2.4
    logit += 0.9 * (taste[at["user"]] == kind) + np.diff(alike[offsets]) / np.maximum(lengths, 1)
    logit += 0.9 * np.exp(-age / 24) - 0.45 * np.log(price) + 0.5 * similarity
    p_click = 1 / (1 + np.exp(-logit))
    columns: dict[str, Any] = {name: ids[name][at[name]] for name in IDS}
    columns["history"] = pa.ListArray.from_arrays(offsets.astype(np.int32), ids["item"][history])
    columns["site"] = pa.array(SITES).take(pa.array(at["site"]))
    columns |= {
        name: numbers.astype(np.float32) for name, numbers in zip(NUMBERS, (price, age, similarity), strict=True)
    }
    return pa.table(columns | {"label": (rng.random(rows) < p_click).astype(np.float32), "p_click": p_click})


def write_clicks(folder: Path, rows: int, seed: int) -> dict[str, float]:
    """Write ``train`` (90 % of the rows) and ``test`` as Parquet; return the best possible metrics on ``test``."""
    table = make_clicks(rows, seed)
    test = table.slice(rows * 9 // 10)
    for split, part in (("train", table.slice(0, rows * 9 // 10)), ("test", test)):
        pq.write_table(part, folder / f"{split}.parquet", row_group_size=16_384)
    labels, p_click = (torch.tensor(test[name].to_numpy()) for name in ("label", "p_click"))
    return {"auc": rh.metrics.auc(labels, p_click), "logloss": rh.metrics.logloss(labels, p_click)}


def jax_tower(width: int, seed: int) -> nn.Module:
    """Return a JAX MLP as a module. Its parameters belong to torch, and embeddings are passed in shared memory."""
    import jax
    import jax.numpy as jnp

    def mlp(params: dict[str, Any], *parts: Any) -> Any:
        x = jax.nn.relu(jnp.concatenate(parts, axis=1) @ params["w1"] + params["b1"])
        return (x @ params["w2"] + params["b2"])[:, 0]

    first, second = jax.random.split(jax.random.key(seed))
    glorot = jax.nn.initializers.glorot_normal()
    params = {"w1": glorot(first, (width, HIDDEN)), "b1": jnp.zeros(HIDDEN)}
    return rh.bridge.JaxTower(mlp, params | {"w2": glorot(second, (HIDDEN, 1)), "b2": jnp.zeros(1)})


class TorchTower(nn.Module):
    """The same MLP in torch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, *parts: Tensor) -> Tensor:
        return self.layers(torch.cat(parts, dim=1))[:, 0]


class DeepFM(nn.Module):
    """Logit = bias + first-order weights + factorization machine + mean of the towers.

    The first element of an embedding is its first-order weight, the others are its factors.

    References:
        Guo, Tang, Ye, Li, He: DeepFM: a factorization-machine based neural network for CTR prediction. IJCAI 2017.
    """

    def __init__(self, towers: Sequence[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        small = rh.embedding.Normal(0.0, 0.01)
        configs = {field: rh.EmbeddingConfig(dim=1 + FACTORS, initializer=small) for field in FIELDS}
        configs["history"] = rh.EmbeddingConfig(dim=1 + FACTORS, initializer=small, combiner="mean")
        self.engine = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adam, seed=seed)
        width = len(FIELDS) * (1 + FACTORS) + len(NUMBERS)
        makers = {"torch": lambda: TorchTower(width), "jax": lambda: jax_tower(width, seed)}
        self.towers = nn.ModuleList([makers[name]() for name in towers])
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: rh.Batch) -> Tensor:
        """Return the logits ``[B]``."""
        embeddings = [*self.engine(batch).values()]
        numbers = torch.stack([batch[name] for name in NUMBERS], dim=1)  # type: ignore[arg-type]
        fields = torch.stack(embeddings, dim=1)
        factors = fields[:, :, 1:]
        pairs = 0.5 * (factors.sum(1).square() - factors.square().sum(1)).sum(1)
        deep = torch.stack([tower(*embeddings, numbers) for tower in self.towers]).mean(0)
        return self.bias + fields[:, :, 0].sum(1) + pairs + deep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=("torch", "jax", "both"), default="both", help="the towers (both)")
    parser.add_argument("--rows", type=int, default=300_000, help="rows of the log (300000)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows (1)")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples per step (2048)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    args = parser.parse_args()
    towers = ("torch", "jax") if args.tower == "both" else (args.tower,)
    loss = nn.functional.binary_cross_entropy_with_logits

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        best = write_clicks(folder, args.rows, args.seed)
        columns = [*IDS, "history", "site", *NUMBERS, "label"]
        features = rh.FeatureEngine(FEATURES)
        train = rh.ColumnDataset(
            folder / "train.parquet", columns, args.batch_size, shuffle=True, seed=args.seed, transforms=features
        )
        test = rh.ColumnDataset(folder / "test.parquet", columns, args.batch_size, transforms=features)

        model = DeepFM(towers, args.seed)
        sparse = rh.optim.Adam(model.engine.parameters(), lr=2e-3)
        dense = torch.optim.Adam(rh.dense_parameters(model), lr=1e-3)
        step = rh.TorchStep(model, loss, {"dense": dense, "sparse": sparse})
        saver = rh.Saver(folder / "checkpoints")
        metrics = {"auc": rh.metrics.AUC(), "logloss": rh.metrics.LogLoss()}
        trainer = rh.Trainer(step, train, test, metrics=metrics, saver=saver, callbacks=[rh.pipelines.ProgressBar()])
        start = time.perf_counter()
        trainer.fit([rh.Train(epochs=args.epochs)])
        rate = trainer.samples / (time.perf_counter() - start)
        print(model.engine.describe())
        figures = dict(trainer.fit([rh.Evaluate(), rh.SaveCheckpoint()])["eval"])

        loaded = DeepFM(towers, args.seed + 1)
        saver.load({"engine": loaded.engine, "model": loaded})
        reloaded = rh.pipelines.evaluate(rh.TorchStep(loaded, loss, []), test, metrics)

    seconds = time.perf_counter() - begin
    print(f"\n{'':<28}{'AUC':>9}{'logloss':>9}")
    for title, result in (("model, on test rows", figures), ("saved and loaded", reloaded), ("best possible", best)):
        print(f"{title:<28}{result['auc']:>9.4f}{result['logloss']:>9.4f}")
    print(f"{rate:,.0f} samples/s with tower {args.tower}, {seconds:.0f} s in total\n")
    last = {"auc": figures["auc"], "logloss": figures["logloss"], "bayes_auc": best["auc"]}
    last |= {"reload_exact": reloaded == figures, "samples_per_s": rate, "seconds": seconds, "tower": args.tower}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
