"""Online learning: new ids keep coming, and admission and eviction keep the table at one size.

    python examples/online.py [--plot online.png] [--quick]

A stream of clicks is read in windows. Each window first tests the model, then trains it, as in production, where
tomorrow's clicks are unknown today. In every window new items appear and old ones disappear, and two samples of five
are of an item that never occurs again. Two models see the same stream: ``all`` gives every id a row for ever;
``bounded`` admits an item at its third occurrence, as counted by a sketch of fixed memory, and evicts the items used
least, with a frequency that fades. The plot shows rows, memory and test AUC by window. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import recis_hybrid as rh
from recis_hybrid.embedding import Capacity, MinFrequency
from recis_hybrid.pipelines import PeriodicEviction

USERS = 3000
LIFETIME = 6
"""Windows for which an item is shown."""
ONCE = 0.4
"""Share of the samples whose item never occurs again."""


class Stream:
    """Windows of clicks, with the probabilities that they were drawn from."""

    def __init__(self, windows: int, samples: int, new_items: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._windows, self._samples, self._new = windows, samples, new_items
        self._taste = self._rng.normal(0, 1, (USERS, 2))

    def __iter__(self) -> Iterator[tuple[rh.Batch, float]]:
        rng = self._rng
        ids, traits = np.empty(0, np.int64), np.empty((0, 3))
        for _ in range(self._windows):
            ids = np.concatenate([ids, rng.integers(-(2**63), 2**63 - 1, self._new)])
            traits = np.concatenate([traits, rng.normal(0, 1, (self._new, 3))])
            ids, traits = ids[-LIFETIME * self._new :], traits[-LIFETIME * self._new :]
            user = rng.integers(0, USERS, self._samples)
            item = (len(ids) * rng.random(self._samples) ** 2).astype(np.int64)
            once = rng.random(self._samples) < ONCE
            logit = 1.2 * traits[item, 0] + (self._taste[user] * traits[item, 1:]).sum(1)
            logit = np.where(once, 0.3 * self._taste[user, 0], logit) - 0.5
            chance = 1 / (1 + np.exp(-logit))
            seen = np.where(once, rng.integers(-(2**63), 2**63 - 1, self._samples), ids[item])
            label = torch.from_numpy((rng.random(self._samples) < chance).astype(np.float32))
            batch = {"user": torch.from_numpy(user), "item": torch.from_numpy(seen), "label": label}
            yield batch, rh.metrics.auc(label, torch.from_numpy(chance))


class Model(nn.Module):
    """Product and sum of the vectors of user and item, and a small MLP over both."""

    def __init__(self, *, bounded: bool, half_life: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        small = rh.embedding.Normal(0.0, 0.05)
        # An item without a row reads zeros, in tests as in training, so that the model learns what to expect of it.
        rule = MinFrequency(3, sketch_bytes=1 << 22, half_life=half_life) if bounded else None
        configs = {
            "user": rh.EmbeddingConfig(dim=32, initializer=small),
            "item": rh.EmbeddingConfig(dim=32, initializer=small, admission=rule, unknown="zeros"),
        }
        self.engine = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adagrad, seed=seed)
        self.layers = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, batch: rh.Batch) -> Tensor:
        """Return the logits ``[B]``."""
        vectors = self.engine(batch)
        user, item = vectors["user"], vectors["item"]
        return self.layers(torch.cat([user, item, user * item], dim=1))[:, 0] + (user * item).sum(1) + item[:, 0]


class Learner:
    """A model that is tested on each window and then trained on it."""

    def __init__(self, args: argparse.Namespace, *, bounded: bool) -> None:
        steps = math.ceil(args.samples / args.batch_size)
        self.model = Model(bounded=bounded, half_life=4 * steps, seed=args.seed)
        optimizers = {
            "dense": torch.optim.Adam(rh.dense_parameters(self.model), lr=2e-3),
            "sparse": self.model.engine.make_optimizer(lr=0.1),
        }
        loss = nn.functional.binary_cross_entropy_with_logits
        keep = Capacity(rows=args.capacity, by="lfu", half_life=steps / 4)
        self._callbacks = [PeriodicEviction({"item": keep}, steps=steps)] if bounded else []
        self._trainer = rh.Trainer(
            rh.TorchStep(self.model, loss, optimizers), callbacks=self._callbacks, metrics={"auc": rh.metrics.AUC()}
        )
        self.history: dict[str, list[float]] = {"rows": [], "mib": [], "auc": []}

    def window(self, batches: list[rh.Batch]) -> None:
        """Test, train, and note the size of the tables."""
        figures = self._trainer.fit([rh.Evaluate(data=batches), rh.Train(data=batches)])
        engine = self.model.engine
        self.history["auc"].append(figures["eval"]["auc"])
        self.history["rows"].append(sum(len(table) for table in engine.tables))
        self.history["mib"].append(engine.memory()["total"] / 2**20)


def plot(path: str, histories: dict[str, dict[str, list[float]]], best: list[float]) -> None:
    """Draw rows, memory and AUC by window."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    titles = {"rows": "rows in the tables", "mib": "memory of the tables (MiB)", "auc": "AUC on the next window"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for case, history in histories.items():
            axis.plot(range(1, len(best) + 1), history[name], marker=".", label=case)
        if name == "auc":
            axis.plot(range(1, len(best) + 1), best, color="gray", linestyle=":", label="best possible")
        else:
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="window")
        axis.grid(alpha=0.3)
    axes[-1].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=30, help="windows of the stream (30)")
    parser.add_argument("--samples", type=int, default=24_000, help="samples of a window (24000)")
    parser.add_argument("--new-items", type=int, default=300, help="new items in each window (300)")
    parser.add_argument("--capacity", type=int, default=3000, help="items that remain after an eviction (3000)")
    parser.add_argument("--batch-size", type=int, default=500, help="samples per step (500)")
    parser.add_argument("--plot", metavar="FILE", help="draw rows, memory and AUC by window (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="a few small windows, to try the program")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    args = parser.parse_args()
    if args.quick:
        args.windows, args.samples, args.new_items, args.capacity = 8, 4000, 50, 500

    begin = time.perf_counter()
    learners = {"all": Learner(args, bounded=False), "bounded": Learner(args, bounded=True)}
    best = []
    print(
        f"{'window':>6}" + "".join(f"{name + ': rows':>16}{'MiB':>8}{'AUC':>8}" for name in learners) + f"{'best':>8}"
    )
    for number, (window, highest) in enumerate(Stream(args.windows, args.samples, args.new_items, args.seed)):
        parts = {name: column.split(args.batch_size) for name, column in window.items()}  # type: ignore[union-attr]
        batches: list[Any] = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
        best.append(highest)
        line = f"{number + 1:>6}"
        for learner in learners.values():
            learner.window(batches)
            rows, mib, auc = (values[-1] for values in learner.history.values())
            line += f"{rows:>16,}{mib:>8.1f}{auc:>8.4f}"
        print(f"{line}{highest:>8.4f}", flush=True)
    histories = {name: learner.history for name, learner in learners.items()}
    if args.plot:
        plot(args.plot, histories, best)
    half = args.windows // 2
    figures: dict[str, Any] = {}
    for name, history in histories.items():
        figures[name] = {
            "auc": sum(history["auc"][half:]) / (args.windows - half),
            "rows": [history["rows"][half - 1], history["rows"][-1]],
            "mib": [history["mib"][half - 1], history["mib"][-1]],
        }
    figures["best_auc"] = sum(best[half:]) / (args.windows - half)
    seconds = time.perf_counter() - begin
    figures["samples_per_s"] = 2 * args.windows * args.samples / seconds
    print(json.dumps({**figures, "seconds": seconds}))


if __name__ == "__main__":
    main()
