"""JAX-led training: a tower in plain JAX with optax, and the engine's tables, in the stages of a Trainer.

    python examples/jax_led.py [--run RUN [--resume]]

Under torchrun, ranks share the tables and average the gradients of the tower. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import recis_hybrid as rh
from recis_hybrid.bridge.jax_led import JaxStep, JaxTables

FIELDS = ["user", "item", "price_level"]
FEATURES = [
    *[rh.Feature(name) for name in ("user", "item")],
    rh.Feature("price_level", source="price", ops=[rh.features.Bucketize([0.25, 0.5, 1, 2, 4])]),
]
DIM, HIDDEN = 8, 128


def write_clicks(folder: Path, rows: int, seed: int) -> float:
    """Write ``train`` (90 % of the rows) and ``test`` as Parquet; return the best possible AUC on ``test``."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(-(2**63), 2**63 - 1, (2, 1000))
    liking, quality = rng.normal(0, 1, (2, 1000))
    user, item = (1000 * rng.random((2, rows)) ** 2).astype(int)
    price = rng.lognormal(0, 1, rows).astype(np.float32)
    logit = liking[user] + quality[item] + 1.5 * (user % 4 == item % 4) - 0.5 * np.log(price) - 1.5
    p_click = 1 / (1 + np.exp(-logit))
    label = (rng.random(rows) < p_click).astype(np.float32)
    table, cut = pa.table({"user": users[user], "item": items[item], "price": price, "label": label}), rows * 9 // 10
    pq.write_table(table.slice(0, cut), folder / "train.parquet")
    pq.write_table(table.slice(cut), folder / "test.parquet")
    return rh.metrics.auc(torch.tensor(label[cut:]), torch.tensor(p_click[cut:]))


def tower(params: dict[str, Any], vectors: dict[str, Any]) -> Any:
    """Return the logits ``[B]`` of embeddings ``[B, DIM]``."""
    x = jnp.concatenate([vectors[field] for field in FIELDS], axis=1)
    return (jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])[:, 0]


def make_step(seed: int, steps: int) -> JaxStep:
    configs = {field: rh.EmbeddingConfig(dim=DIM) for field in FIELDS}
    engine = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adam, seed=seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    tables = JaxTables(engine, engine.make_optimizer(lr=2e-3))
    first, second = jax.random.split(jax.random.key(seed))
    glorot = jax.nn.initializers.glorot_normal()
    w1, w2 = glorot(first, (len(FIELDS) * DIM, HIDDEN)), glorot(second, (HIDDEN, 1))
    params = {"w1": w1, "b1": jnp.zeros(HIDDEN), "w2": w2, "b2": jnp.zeros(1)}
    return JaxStep(tower, params, optax.sigmoid_binary_cross_entropy, optimizer, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the log (200000)")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples per step (2048)")
    parser.add_argument("--run", help="folder for checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in --run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        best = write_clicks(Path(folder), args.rows, seed=0)
        options = {"seed": 0, "transforms": rh.FeatureEngine(FEATURES)}
        columns = ["user", "item", "price", "label"]
        # jit compiles once for each batch size.
        train = rh.ColumnDataset(f"{folder}/train.parquet", columns, args.batch_size, drop_remainder=True, **options)
        test = rh.ColumnDataset(f"{folder}/test.parquet", columns, args.batch_size, **options)
        callbacks = [rh.PeriodicCheckpoint(steps=20)] if args.run else []
        callbacks += [] if args.quiet else [rh.pipelines.ProgressBar()]
        saver = rh.Saver(args.run) if args.run else None
        metrics = {"auc": rh.metrics.AUC(), "logloss": rh.metrics.LogLoss()}
        start = time.perf_counter()
        trainer = rh.Trainer(make_step(0, len(train)), train, test, metrics=metrics, saver=saver, callbacks=callbacks)
        figures = trainer.fit([rh.Train(epochs=1), rh.Evaluate()], resume="latest" if args.resume else None)["eval"]
        rate = trainer.samples / (time.perf_counter() - start)
    last = {**figures, "bayes_auc": best, "samples_per_s": rate, "seconds": time.perf_counter() - begin}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
