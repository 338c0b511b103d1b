"""JAX-led training: a jitted step with optax and the engine's tables, in the same stages as a torch step.

    python examples/jax_led.py [--run RUN [--resume]]

The step is a class with the methods of ``recis_hybrid.pipelines.Step``. Stages, metrics and checkpoints work as for a
torch step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import recis_hybrid as rh
from recis_hybrid.bridge import GradientAllReduce, JaxState, to_jax, to_torch
from recis_hybrid.pipelines import NoObserver, Observer, Predictions

FIELDS = ["user", "item", "site", "price_level"]
FEATURES = [
    *[rh.Feature(name) for name in ("user", "item")],
    rh.Feature("site", ops=[rh.features.Hash("farm")]),
    rh.Feature("price_level", source="price", ops=[rh.features.Bucketize([0.25, 0.5, 1, 2, 4])]),
]
DIM = 8
HIDDEN = 128


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


def init_params(width: int, seed: int) -> dict[str, Any]:
    first, second = jax.random.split(jax.random.key(seed))
    glorot = jax.nn.initializers.glorot_normal()
    return {
        "w1": glorot(first, (width, HIDDEN)),
        "b1": jnp.zeros(HIDDEN),
        "w2": glorot(second, (HIDDEN, 1)),
        "b2": jnp.zeros(1),
    }


def tower(params: dict[str, Any], embeddings: list[Any]) -> Any:
    """Return the logits ``[B]`` of embeddings ``[B, DIM]``."""
    x = jnp.concatenate(embeddings, axis=1)
    return (jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])[:, 0]


class JaxStep:
    """A training step: a jitted call for the loss and its gradients, another for optax's update, and the table update.

    Args:
        engine: The tables.
        sparse: The optimizer of the tables.
        params: The parameters of the tower.
        optimizer: The tower's optimizer.
    """

    def __init__(
        self,
        engine: rh.EmbeddingEngine,
        sparse: torch.optim.Optimizer,
        params: Any,
        optimizer: optax.GradientTransformation,
    ) -> None:
        self.engines = [engine]
        self.observer: Observer = NoObserver()
        self.sparse = sparse
        self.state = JaxState((params, optimizer.init(params)))

        def loss_of(params: Any, embeddings: list[Any], labels: Any) -> Any:
            return optax.sigmoid_binary_cross_entropy(tower(params, embeddings), labels).mean()

        @jax.jit
        def differentiate(params: Any, embeddings: list[Any], labels: Any) -> Any:
            return jax.value_and_grad(loss_of, argnums=(0, 1))(params, embeddings, labels)

        @jax.jit
        def update(params: Any, opt_state: Any, gradients: Any) -> Any:
            changes, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, changes), opt_state

        self._differentiate, self._update = differentiate, update
        self._tower = jax.jit(tower)
        self._all_reduce: GradientAllReduce | None = None

    def synchronize(self) -> None:
        """Take rank 0's parameters, and average gradients over the ranks from now on."""
        if torch.distributed.is_initialized():
            params, opt_state = self.state.tree
            self._all_reduce = GradientAllReduce(params)
            self.state.tree = self._all_reduce.broadcast(params), opt_state

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """Do nothing, because the engine counts the samples of all ranks itself."""

    def __call__(self, *batches: rh.Batch) -> dict[str, Tensor]:
        (batch,) = batches
        (engine,) = self.engines
        engine.train()
        with self.observer.phase("lookup"):
            values, context = engine.lookup(batch)
        with self.observer.phase("towers"):
            embeddings = [to_jax(value) for value in values.values()]  # shares memory
            labels = to_jax(batch["label"], copy=True)  # may be a misaligned slice of the reader's buffer
            params, opt_state = self.state.tree
            loss, (param_grads, embedding_grads) = self._differentiate(params, embeddings, labels)
            by_field = {field: to_torch(gradient) for field, gradient in zip(values, embedding_grads, strict=True)}
        if self._all_reduce is not None:
            with self.observer.phase("exchange"):
                param_grads = self._all_reduce(param_grads, engine.share)
        with self.observer.phase("update"):
            self.state.tree = self._update(params, opt_state, param_grads)
            engine.apply_gradients(context, by_field, self.sparse)  # type: ignore[arg-type]
        return {"loss": to_torch(loss)}

    def predict(self, batch: rh.Batch) -> dict[str, Predictions]:
        (engine,) = self.engines
        engine.eval()
        values, _ = engine.lookup(batch)
        params, _ = self.state.tree
        logits = self._tower(params, [to_jax(value) for value in values.values()])
        label = batch["label"]
        assert isinstance(label, Tensor)
        return {"": Predictions(to_torch(jax.nn.sigmoid(logits)), label)}

    def parts(self) -> dict[str, object]:
        return {"engine": self.engines[0], "sparse": self.sparse, "jax": self.state}


def make_step(seed: int, steps: int) -> JaxStep:
    """Return a step with one table per field and a cosine learning rate schedule."""
    configs = {field: rh.EmbeddingConfig(dim=DIM) for field in FIELDS}
    engine = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adam, seed=seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    sparse = rh.optim.Adam(engine.parameters(), lr=2e-3)
    return JaxStep(engine, sparse, init_params(len(FIELDS) * DIM, seed), optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the log (200000)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows (1)")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples per step (2048)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--run", default="", help="folder for checkpoints and log.jsonl")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in --run")
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
                drop_remainder=split == "train",  # jit compiles once for each batch size
                transforms=rh.FeatureEngine(FEATURES),
            )
            for split in ("train", "test")
        )
        saver = rh.Saver(args.run) if args.run else None
        callbacks = [] if args.quiet else [rh.pipelines.ProgressBar()]
        if saver is not None:
            callbacks += [rh.PeriodicCheckpoint(steps=20), rh.pipelines.JsonLog(f"{args.run}/log.jsonl")]
        step = make_step(args.seed, args.epochs * len(train))
        metrics = {"auc": rh.metrics.AUC(), "logloss": rh.metrics.LogLoss()}
        trainer = rh.Trainer(step, train, test, metrics=metrics, saver=saver, callbacks=callbacks, log_every=10)
        start = time.perf_counter()
        stages = [rh.Train(epochs=args.epochs), *([rh.SaveCheckpoint()] if saver is not None else []), rh.Evaluate()]
        figures = trainer.fit(stages, resume="latest" if args.resume else None)["eval"]
        rate = trainer.samples / (time.perf_counter() - start)

    print(f"\nAUC {figures['auc']:.4f}, best possible {best:.4f}, {rate:,.0f} samples/s\n")
    last = {"auc": figures["auc"], "logloss": figures["logloss"], "bayes_auc": best, "samples_per_s": rate}
    print(json.dumps(last | {"seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
