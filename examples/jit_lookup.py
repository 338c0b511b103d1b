"""Everything in one jit: lookups, a tower, both updates, over several batches; torch only at the start and the save.

    python examples/jit_lookup.py [--rows ROWS] [--save FOLDER]

A call of the jitted function scans over ``--steps-per-call`` batches. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import recis_hybrid as rh
from recis_hybrid.bridge import ffi

FIELDS = ["user", "item", "history"]
DIM, HIDDEN, HISTORY = 8, 64, 5
Columns = dict[str, np.ndarray[Any, Any]]


def make_clicks(rows: int, seed: int) -> tuple[Columns, float]:
    """Return columns of 64-bit ids as pairs of words, and labels; and the best possible AUC."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(-(2**63), 2**63 - 1, (2, 1000))
    liking, quality = rng.normal(0, 1, (2, 1000))
    user, item = (1000 * rng.random((2, rows)) ** 2).astype(int)
    history = (1000 * rng.random((rows, HISTORY)) ** 2).astype(int)
    logit = liking[user] + quality[item] + quality[history].mean(1) - 0.5
    p_click = 1 / (1 + np.exp(-logit))
    label = (rng.random(rows) < p_click).astype(np.float32)
    columns = {"user": words(users[user]), "item": words(items[item]), "history": words(items[history]), "label": label}
    return columns, rh.metrics.auc(torch.from_numpy(label), torch.from_numpy(p_click))


def words(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return int64 ids as pairs of uint32 words, because JAX would cut them to 32 bits while x64 is off."""
    return np.ascontiguousarray(ids).view(np.uint32).reshape(*ids.shape, 2)


def groups_of(columns: Columns, batch_size: int, batches: int) -> Iterator[Columns]:
    """Yield columns ``[batches, batch_size, …]``; the remainder is dropped."""
    rows = batch_size * batches
    for first in range(0, len(columns["label"]) // rows * rows, rows):
        yield {
            name: column[first : first + rows].reshape(batches, batch_size, *column.shape[1:])
            for name, column in columns.items()
        }


def logits_of(params: Any, vectors: Any) -> Any:
    hidden = jax.nn.relu(jnp.concatenate([vectors[field] for field in FIELDS], 1) @ params["w1"] + params["b1"])
    return (hidden @ params["w2"] + params["b2"])[:, 0]


def make_functions(tables: ffi.JitTables, tx: optax.GradientTransformation) -> tuple[Any, Any]:
    """Return the jitted functions of training and scoring."""

    def loss_of(params: Any, token: Any, batch: Any) -> Any:
        vectors, _, token = ffi.lookup(tables, {field: batch[field] for field in FIELDS}, None, token)
        return optax.sigmoid_binary_cross_entropy(logits_of(params, vectors), batch["label"]).mean()

    def step(carry: Any, batch: Any) -> Any:
        params, state, token = carry
        # The gradient of the token is the token of the tables' update.
        loss, (gradients, token) = jax.value_and_grad(loss_of, argnums=(0, 1))(params, token, batch)
        changes, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, changes), state, token), loss

    def score(params: Any, token: Any, batch: Any) -> Any:
        ids = {field: batch[field] for field in FIELDS}
        vectors, _, token = ffi.lookup(tables, ids, None, token, train=False)
        return jax.nn.sigmoid(logits_of(params, vectors)), token

    return jax.jit(partial(jax.lax.scan, step)), jax.jit(score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the log (200000)")
    parser.add_argument("--batch-size", type=int, default=1024, help="samples per step (1024)")
    parser.add_argument("--steps-per-call", type=int, default=8, help="batches per call of the jitted function (8)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training rows (2)")
    parser.add_argument("--save", help="folder for a checkpoint of the tables")
    args = parser.parse_args()
    begin = time.perf_counter()
    columns, best = make_clicks(args.rows, seed=0)
    cut = args.rows * 9 // 10
    train_rows, test_rows = (
        {name: column[part] for name, column in columns.items()} for part in (slice(cut), slice(cut, None))
    )

    configs = {
        "user": rh.EmbeddingConfig(dim=DIM),
        "item": rh.EmbeddingConfig(dim=DIM, table="items"),
        "history": rh.EmbeddingConfig(dim=DIM, table="items", combiner="mean"),
    }
    engine = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adam)
    tables = ffi.JitTables(engine, engine.make_optimizer(lr=5e-3))
    first, second = jax.random.split(jax.random.key(0))
    glorot, wide = jax.nn.initializers.glorot_normal(), len(FIELDS) * DIM
    w1, w2 = glorot(first, (wide, HIDDEN)), glorot(second, (HIDDEN, 1))
    params = {"w1": w1, "b1": jnp.zeros(HIDDEN), "w2": w2, "b2": jnp.zeros(1)}
    tx = optax.adam(2e-3)
    train, score = make_functions(tables, tx)

    state, steps = tx.init(params), 0
    room = args.batch_size * args.steps_per_call * (2 + HISTORY)
    for _ in range(args.epochs):
        for group in groups_of(train_rows, args.batch_size, args.steps_per_call):
            token = tables.begin(room)
            (params, state, token), losses = train((params, state, token), group)
            tables.end(token)
            steps += len(losses)
    tables.wait()
    seconds = time.perf_counter() - begin

    scores, token = score(params, tables.begin(0), test_rows)
    tables.end(token)
    label, scores = torch.from_numpy(test_rows["label"].copy()), torch.from_numpy(np.array(scores))
    if args.save:
        rh.Saver(args.save).save(steps, {"engine": engine, "sparse": tables.optimizer})
    figures = {
        "auc": round(rh.metrics.auc(label, scores), 4),
        "best_auc": round(best, 4),
        "loss": round(float(losses[-1]), 4),
        "steps": steps,
        "rows_in_tables": sum(len(table) for table in engine.tables),
        "samples_per_s": round(steps * args.batch_size / seconds),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
