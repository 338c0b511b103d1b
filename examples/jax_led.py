"""A training that JAX leads: a jitted step with optax, the tables of the engine beside it, in the same stages.

    python examples/jax_led.py [--run RUN [--resume]]

The step is a class with what a pipeline asks of one (recis_hybrid.pipelines.Step); everything else, stages, metrics,
checkpoints, is as for a torch step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctr_log
import demo
import jax
import jax.numpy as jnp
import optax
import torch
from torch import Tensor
from torch.distributed import is_initialized as is_distributed

from recis_hybrid import optim
from recis_hybrid.bridge import GradientAllReduce, JaxState, to_jax, to_torch
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.features import FeatureEngine
from recis_hybrid.metrics import AUC, LogLoss
from recis_hybrid.pipelines import (
    Evaluate,
    JsonLog,
    PeriodicCheckpoint,
    ProgressBar,
    SaveCheckpoint,
    Scored,
    Train,
    Trainer,
)
from recis_hybrid.pipelines.steps.step import NoObserver, Observer
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver

HIDDEN = 128


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
    """[B, …] embeddings → logits [B]."""
    x = jnp.concatenate(embeddings, axis=1)
    return (jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"])[:, 0]


class JaxStep:
    """One jitted call a step: loss, gradients of parameters and embeddings, and optax's update.

    Args:
        engine: The tables.
        sparse: Their optimizer.
        params: Of the tower.
        optimizer: Optax's, of the tower.
    """

    def __init__(
        self,
        engine: EmbeddingEngine,
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

    def synchronise(self) -> None:
        """Take rank 0's parameters, and average gradients over the ranks from now on."""
        if is_distributed():
            params, opt_state = self.state.tree
            self._all_reduce = GradientAllReduce(params)
            self.state.tree = self._all_reduce.broadcast(params), opt_state

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """The engine counts the samples of all ranks itself."""

    def __call__(self, *batches: Batch) -> dict[str, Tensor]:
        (batch,) = batches
        (engine,) = self.engines
        engine.train()
        with self.observer.phase("lookup"):
            values, context = engine.lookup(batch)
        with self.observer.phase("towers"):
            embeddings = [to_jax(value) for value in values.values()]  # in the same memory
            labels = to_jax(batch["label"], copy=True)  # a slice of the reader's buffer, which JAX may find misaligned
            params, opt_state = self.state.tree
            loss, (of_params, of_embeddings) = self._differentiate(params, embeddings, labels)
            by_field = {field: to_torch(gradient) for field, gradient in zip(values, of_embeddings, strict=True)}
        if self._all_reduce is not None:
            with self.observer.phase("exchange"):
                of_params = self._all_reduce(of_params, engine.share)
        with self.observer.phase("update"):
            self.state.tree = self._update(params, opt_state, of_params)
            engine.apply_gradients(context, by_field, self.sparse)  # type: ignore[arg-type]
        return {"loss": to_torch(loss)}

    def predict(self, batch: Batch) -> dict[str, Scored]:
        (engine,) = self.engines
        engine.eval()
        values, _ = engine.lookup(batch)
        params, _ = self.state.tree
        logits = self._tower(params, [to_jax(value) for value in values.values()])
        label = batch["label"]
        assert isinstance(label, Tensor)
        return {"": Scored(to_torch(jax.nn.sigmoid(logits)), label)}

    def parts(self) -> dict[str, object]:
        return {"engine": self.engines[0], "sparse": self.sparse, "jax": self.state}


def make_step(seed: int, steps: int) -> JaxStep:
    """The tables of examples/demo.py under a JAX tower whose learning rate falls along a cosine."""
    engine = demo.make_engine(seed)
    params = init_params(len(demo.FIELDS) * (1 + demo.FACTORS), seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    return JaxStep(engine, optim.Adam(engine.parameters(), lr=2e-3), params, optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the log (200000)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows (1)")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples a step (2048)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--run", default="", help="folder for checkpoints and log.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        best = ctr_log.write_log(Path(folder), args.rows, args.seed)
        columns = [*demo.IDS, "history", "site", *demo.NUMBERS, "label"]
        train, test = (
            ColumnDataset(
                Path(folder) / split,
                columns,
                args.batch_size,
                shuffle=split == "train",
                seed=args.seed,
                drop_remainder=split == "train",
                transforms=FeatureEngine(demo.FEATURES),
            )
            for split in ("train", "test")
        )
        saver = Saver(args.run) if args.run else None
        callbacks = [] if args.quiet else [ProgressBar()]
        if saver is not None:
            callbacks += [PeriodicCheckpoint(steps=20), JsonLog(f"{args.run}/log.jsonl")]
        trainer = Trainer(
            make_step(args.seed, args.epochs * len(train)),
            train,
            test,
            metrics={"auc": AUC(), "logloss": LogLoss()},
            saver=saver,
            callbacks=callbacks,
            log_every=10,
        )
        start = time.perf_counter()
        stages = [Train(epochs=args.epochs), *([SaveCheckpoint()] if saver is not None else []), Evaluate()]
        figures = trainer.fit(stages, resume="latest" if args.resume else None)["eval"]
        rate = trainer.samples / (time.perf_counter() - start)

    print(f"\nAUC {figures['auc']:.4f} of {best['bayes_auc']:.4f} that is possible, {rate:,.0f} samples/s\n")
    print(
        json.dumps(
            {
                "auc": figures["auc"],
                "logloss": figures["logloss"],
                "bayes_auc": best["bayes_auc"],
                "samples_per_s": rate,
                "seconds": time.perf_counter() - begin,
            }
        )
    )


if __name__ == "__main__":
    main()
