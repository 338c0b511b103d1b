"""Train DeepFM on Frappe (a public CTR benchmark) with hash tables, and with a torch tower, a JAX tower, or both.

    python examples/frappe.py --data FOLDER --tower both [--baseline] [--run RUN]
    python examples/frappe.py --data FOLDER --model lr

FOLDER contains train/, valid/ and test/ with Parquet files: ten categorical columns of int64 ids or of strings (which
are hashed while reading), and ``label``. ``--baseline`` then trains the same model with nn.Embedding, times alternating
steps of both, and compares them. ``--run`` is the folder for checkpoints and a log; with ``--resume`` an interrupted
run continues (``recis-hybrid report RUN`` plots the log). The last line is JSON.

References:
    Guo, Tang, Ye, Li, He: DeepFM: a factorization-machine based neural network for CTR prediction. IJCAI 2017.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import recis_hybrid as rh
from recis_hybrid.metrics import AUC, LogLoss
from recis_hybrid.pipelines import (
    Callback,
    EarlyStop,
    JsonLog,
    PeriodicCheckpoint,
    PlateauSchedule,
    ProgressBar,
    SaveCheckpoint,
    Stage,
)

# The published recipe (BARS, DeepFM on Frappe x1). Its L2 penalty covers whole tables in every step, as weight decay
# with exact=True does. That of the logistic regression was chosen here.
FIELDS = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
FACTORS = 10
HIDDEN = (400, 400, 400)
DROPOUT = 0.2
LR = 1e-3
L2 = {"deepfm": 0.05, "lr": 1e-5}
STD = 1e-4
CLIP = 10.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchTower(nn.Module):
    """Three blocks of linear, batch norm, ReLU and dropout, and a linear output layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in pairwise((width, *HIDDEN)):
            linear = nn.Linear(inner, outer)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.BatchNorm1d(outer), nn.ReLU(), nn.Dropout(DROPOUT)]
        self.layers = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def jax_tower(width: int, seed: int) -> nn.Module:
    """Return the same tower in Flax nnx. Its parameters and running statistics belong to torch."""
    import jax
    from flax import nnx

    rngs = nnx.Rngs(seed)
    glorot = nnx.initializers.glorot_normal()
    layers: list[object] = []
    for inner, outer in pairwise((width, *HIDDEN)):
        linear = nnx.Linear(inner, outer, kernel_init=glorot, rngs=rngs)
        layers += [linear, nnx.BatchNorm(outer, momentum=0.9, rngs=rngs), jax.nn.relu, nnx.Dropout(DROPOUT, rngs=rngs)]
    return rh.bridge.from_nnx(nnx.Sequential(*layers, nnx.Linear(HIDDEN[-1], 1, kernel_init=glorot, rngs=rngs)))


def make_towers(choice: str, width: int, seed: int) -> nn.ModuleList:
    """Return the selected towers; with "both", the model averages two."""
    towers = nn.ModuleList()
    if choice in ("torch", "both"):
        towers.append(TorchTower(width))
    if choice in ("jax", "both"):
        towers.append(jax_tower(width, seed))
    return towers


class DeepFM(nn.Module):
    """Logit = bias + first-order weights + factorization machine + mean of the towers.

    The first element of an embedding is its first-order weight, the others are its factors.

    Args:
        lookup: Maps a batch to ``[B, 1 + FACTORS]`` by field.
        towers: Modules from ``[B, W]`` to ``[B, 1]``.
    """

    def __init__(self, lookup: nn.Module, towers: nn.ModuleList) -> None:
        super().__init__()
        self.lookup = lookup
        self.towers = towers
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: rh.Batch) -> Tensor:
        """Return the logits ``[B]``."""
        embeddings = self.lookup(batch)
        parts = [embeddings[field] for field in FIELDS]
        both = torch.stack(parts, dim=1)
        first_order, factors = both[:, :, 0].sum(1), both[:, :, 1:]
        pairs = 0.5 * (factors.sum(1).square() - factors.square().sum(1)).sum(1)
        x = torch.cat(parts, dim=1)
        deep = torch.stack([tower(x)[:, 0] for tower in self.towers]).mean(0)
        return self.bias + first_order + pairs + deep


class LogisticRegression(nn.Module):
    """Logit = bias + first-order weights.

    Args:
        lookup: Maps a batch to ``[B, 1]`` by field.
    """

    def __init__(self, lookup: nn.Module) -> None:
        super().__init__()
        self.lookup = lookup
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: rh.Batch) -> Tensor:
        """Return the logits ``[B]``."""
        embeddings = self.lookup(batch)
        return self.bias + torch.cat([embeddings[field] for field in FIELDS], dim=1).sum(1)


@dataclass(frozen=True)
class Figures:
    """Results of a run."""

    auc: float
    logloss: float
    samples_per_s: float
    """Throughput of the training stages."""
    seconds: float
    epochs: int


@dataclass(frozen=True)
class Trained:
    """A finished run, with the objects that are needed to time further steps."""

    figures: Figures
    step: rh.TorchStep
    lookup: nn.Module
    sparse: torch.optim.Optimizer


class Stopwatch(Callback):
    """Measures the seconds of training stages, and records the number of samples before the run was resumed."""

    def __init__(self) -> None:
        self.seconds, self.resumed_samples = 0.0, 0

    def before_fit(self, trainer: rh.Trainer) -> None:
        self.resumed_samples = trainer.samples

    def before_stage(self, trainer: rh.Trainer, stage: Stage) -> None:
        self.begin = time.perf_counter()

    def after_stage(self, trainer: rh.Trainer, stage: Stage) -> None:
        if isinstance(stage, rh.Train):
            self.seconds += time.perf_counter() - self.begin


class StaticTables(nn.Module):
    """Tables of nn.Embedding: ids are mapped to row indices by binary search in the sorted training ids."""

    def __init__(self, vocabularies: dict[str, Tensor], dim: int) -> None:
        super().__init__()
        self.vocabularies = vocabularies
        self.tables = nn.ModuleDict({field: nn.Embedding(len(ids) + 1, dim) for field, ids in vocabularies.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=STD)  # type: ignore[arg-type]

    def forward(self, batch: rh.Batch) -> dict[str, Tensor]:
        """Return ``[B, dim]`` by field; unknown ids share the last row."""
        outputs = {}
        for field, known in self.vocabularies.items():
            ids = batch[field]
            assert isinstance(ids, Tensor)
            at = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
            outputs[field] = self.tables[field](torch.where(known[at] == ids, at, len(known)))
        return outputs


def datasets(args: argparse.Namespace) -> dict[str, rh.ColumnDataset]:
    """Return the three splits. String columns are hashed in the reader's thread."""
    first = next(iter(rh.ColumnDataset(f"{args.data}/valid", FIELDS, 1)))
    strings = [field for field in FIELDS if isinstance(first[field], rh.RaggedTensor)]
    features = (
        rh.FeatureEngine([rh.Feature(field, ops=[rh.features.Hash("farm")]) for field in strings]) if strings else None
    )
    return {
        split: rh.ColumnDataset(
            f"{args.data}/{split}",
            [*FIELDS, "label"],
            args.batch_size,
            shuffle=split == "train",
            seed=args.seed,
            transforms=features,
        )
        for split in ("train", "valid", "test")
    }


def stages(trainer: rh.Trainer, args: argparse.Namespace) -> Iterator[Stage]:
    """Yield epochs, each followed by validation, and by a test if the validation AUC is the best so far."""
    best = 0.0
    for number in range(args.epochs):
        yield rh.Train(epochs=1, name=f"epoch {number + 1}")
        yield rh.Evaluate(data="valid", name="valid", metrics={"auc": AUC()})
        if trainer.figures["valid"]["auc"] > best:
            best = trainer.figures["valid"]["auc"]
            yield rh.Evaluate(data="test", name="test")
        if trainer.saver is not None:
            yield SaveCheckpoint()


def run(args: argparse.Namespace, data: dict[str, rh.ColumnDataset], *, baseline: bool) -> Trained:
    """Train a model, with nn.Embedding instead of the engine if ``baseline``."""
    begin = time.perf_counter()
    dim = 1 if args.model == "lr" else 1 + FACTORS
    torch.manual_seed(args.seed)
    if baseline:
        # Reading a shuffled dataset advances its order, so read the ids from a separate dataset.
        batches: list[rh.Batch] = list(datasets(args)["train"])
        known = {field: torch.cat([b[field] for b in batches]).unique() for field in FIELDS}  # type: ignore[misc]
        lookup: nn.Module = StaticTables(known, dim)
        sparse: torch.optim.Optimizer = torch.optim.Adam(lookup.parameters(), lr=LR, weight_decay=L2[args.model])
    else:
        config = rh.EmbeddingConfig(dim=dim, initializer=rh.embedding.Normal(0.0, STD), dtype=DTYPES[args.dtype])
        engine = rh.EmbeddingEngine(dict.fromkeys(FIELDS, config), optimizer=rh.optim.AdamL2, seed=args.seed)
        lookup, sparse = engine, engine.make_optimizer(lr=LR, weight_decay=L2[args.model], exact=True)
    torch.manual_seed(args.seed)
    model: nn.Module = LogisticRegression(lookup)
    if args.model == "deepfm":
        model = DeepFM(lookup, make_towers(args.tower, len(FIELDS) * dim, args.seed))
    in_lookup = {id(parameter) for parameter in lookup.parameters()}
    dense = torch.optim.Adam([p for p in rh.dense_parameters(model) if id(p) not in in_lookup], lr=LR)
    loss = nn.functional.binary_cross_entropy_with_logits
    step = rh.TorchStep(model, loss, {"dense": dense, "sparse": sparse}, clip_grad_norm=CLIP)

    # Divide the learning rate by ten after each epoch without an improvement, and stop after two.
    plateaus = [ReduceLROnPlateau(o, "max", factor=0.1, patience=0, threshold=0.0, eps=0.0) for o in (dense, sparse)]
    stopwatch = Stopwatch()
    callbacks = [stopwatch, PlateauSchedule("valid/auc", plateaus), EarlyStop("valid/auc", patience=2)]
    saver = None
    if args.run and not baseline:
        saver = rh.Saver(args.run, keep=2)
        callbacks += [PeriodicCheckpoint(seconds=30.0), JsonLog(f"{args.run}/log.jsonl")]
    if not args.quiet:
        callbacks.append(ProgressBar())
    trainer = rh.Trainer(
        step,
        data["train"],
        sources=data,
        metrics={"auc": AUC(), "logloss": LogLoss()},
        saver=saver,
        callbacks=callbacks,
        log_every=10,
        seed=args.seed,
    )
    figures = trainer.fit(stages(trainer, args), resume="latest" if args.resume and saver is not None else None)
    rate = (trainer.samples - stopwatch.resumed_samples) / max(stopwatch.seconds, 1e-9)
    epochs = trainer.samples // data["train"].num_rows
    test = figures["test"]
    return Trained(
        Figures(test["auc"], test["logloss"], rate, time.perf_counter() - begin, epochs), step, lookup, sparse
    )


def compare(ours: Trained, theirs: Trained, batches: list[rh.Batch]) -> dict[str, float]:
    """Time alternating steps: whole steps, and the sparse half alone (lookup, backward, update with weight decay)."""
    gradients = [torch.randn(len(batches[0]["label"]), 1 + FACTORS) for _ in FIELDS]

    def sparse(trained: Trained, batch: rh.Batch) -> None:
        trained.sparse.zero_grad()
        outputs = trained.lookup(batch)
        torch.autograd.backward([outputs[field] for field in FIELDS], gradients)
        trained.sparse.step()

    pair = {"ours": ours, "theirs": theirs}
    times: dict[str, list[float]] = defaultdict(list)
    for part, function in (("whole", lambda trained, batch: trained.step(batch)), ("sparse", sparse)):
        for number, batch in enumerate(batches):
            for name in sorted(pair, reverse=number % 2 == 1):  # alternate which runs first
                begin = time.perf_counter()
                function(pair[name], batch)
                if number > 0:
                    times[f"{part}, {name}"].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "steps_ratio": median["whole, theirs"] / median["whole, ours"],
        "sparse_ratio": median["sparse, theirs"] / median["sparse, ours"],
        "sparse_share": median["sparse, ours"] / median["whole, ours"],
        "baseline_sparse_share": median["sparse, theirs"] / median["whole, theirs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/, valid/ and test/")
    parser.add_argument("--model", choices=L2, default="deepfm", help="DeepFM or logistic regression (deepfm)")
    parser.add_argument("--tower", choices=("torch", "jax", "both"), default="torch", help="the towers (torch)")
    parser.add_argument("--baseline", action="store_true", help="also train the same model with nn.Embedding")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the embeddings (float32)")
    parser.add_argument("--epochs", type=int, default=100, help="maximum number of epochs, with early stopping (100)")
    parser.add_argument("--batch-size", type=int, default=4096, help="samples per step (4096)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--run", default="", help="folder for checkpoints and log.jsonl")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in --run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.baseline and args.model == "lr":
        parser.error("--baseline compares DeepFM with nn.Embedding; omit --model lr")

    data = datasets(args)
    trained = {"hash tables": run(args, data, baseline=False)}
    last = asdict(trained["hash tables"].figures) | {"tower": args.tower}
    if args.baseline:
        trained["nn.Embedding"] = run(args, datasets(args), baseline=True)
        batches = [batch for batch in data["train"] if len(batch["label"]) == args.batch_size][:31]
        ratios = compare(trained["hash tables"], trained["nn.Embedding"], batches)
        last |= {**ratios, "baseline": asdict(trained["nn.Embedding"].figures)}
    head = "LR" if args.model == "lr" else f"DeepFM, tower: {args.tower}"
    print(f"\n{head:<22}{'AUC':>9}{'logloss':>9}{'samples/s':>11}{'epochs':>8}{'seconds':>9}")
    for name, result in trained.items():
        r = result.figures
        print(f"{name:<22}{r.auc:>9.5f}{r.logloss:>9.4f}{r.samples_per_s:>11,.0f}{r.epochs:>8}{r.seconds:>9.0f}")
    if args.baseline:
        print(
            f"alternating steps: {last['steps_ratio']:.2f} times the samples/s of nn.Embedding; sparse half "
            f"({last['sparse_share']:.1%} of a step): {last['sparse_ratio']:.1f} times as fast"
        )
    print(json.dumps(last))


if __name__ == "__main__":
    main()
