"""Trains DeepFM on Frappe (a public CTR benchmark) through hash tables, with a torch tower, a JAX tower, or both.

    python examples/frappe.py --data FOLDER --tower both [--baseline] [--run RUN]

FOLDER holds train/, valid/ and test/ with Parquet files: ten categorical columns, of int64 ids or of strings (which are
hashed while reading), and ``label``. ``--baseline`` then trains the same model with nn.Embedding, times the steps of
both in turns, and prints them side by side. ``--run`` keeps checkpoints and a log there; started once more with
``--resume``, a run that was interrupted goes on (``recis-hybrid report RUN`` shows the log). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import deepfm
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from recis_hybrid import optim
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, dense_parameters
from recis_hybrid.features import Feature, FeatureEngine, Hash
from recis_hybrid.metrics import AUC, LogLoss
from recis_hybrid.pipelines import (
    Callback,
    EarlyStop,
    Evaluate,
    JsonLog,
    PeriodicCheckpoint,
    PlateauSchedule,
    ProgressBar,
    SaveCheckpoint,
    Stage,
    TorchStep,
    Train,
    Trainer,
)
from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.saver import Saver

# The published recipe (BARS, DeepFM on Frappe x1). Its L2 is of whole tables at every step.
FIELDS = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
FACTORS = 10
DROPOUT = 0.2
LR = 1e-3
L2 = 0.05
STD = 1e-4
CLIP = 10.0


@dataclass(frozen=True)
class Figures:
    """What a run reached."""

    auc: float
    logloss: float
    samples_per_s: float
    """Of its training stages."""
    seconds: float
    epochs: int


@dataclass(frozen=True)
class Trained:
    """A run, and what is needed to time more of its steps."""

    figures: Figures
    step: TorchStep
    lookup: nn.Module
    sparse: torch.optim.Optimizer


class Stopwatch(Callback):
    """Seconds in training stages, and the samples that were trained on before a resumption."""

    def __init__(self) -> None:
        self.seconds, self.already = 0.0, 0

    def before_fit(self, trainer: Trainer) -> None:
        self.already = trainer.samples

    def before_stage(self, trainer: Trainer, stage: Stage) -> None:
        self.begin = time.perf_counter()

    def after_stage(self, trainer: Trainer, stage: Stage) -> None:
        if isinstance(stage, Train):
            self.seconds += time.perf_counter() - self.begin


def whole(field: str) -> str:
    """What a lookup calls all rows of a field's table."""
    return f"{field}, whole"


class GrowingTables(nn.Module):
    """An engine that, in training, looks up a list of ids beside those of the batch, for the L2 of whole tables."""

    def __init__(self, vocabularies: dict[str, Tensor], dim: int, seed: int) -> None:
        super().__init__()
        self.vocabularies = vocabularies
        first_values = Normal(0.0, STD)
        configs = {field: EmbeddingConfig(dim=dim, initializer=first_values) for field in vocabularies}
        configs |= {
            whole(field): EmbeddingConfig(dim=dim, initializer=first_values, table=field, combiner=None)
            for field in vocabularies
        }
        self.engine = EmbeddingEngine(configs, optimizer=optim.Adam, seed=seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Batch → by field [B, dim]; in training also, by ``whole(field)``, [n, dim] of the list."""
        none = torch.empty(0, dtype=torch.int64)
        lists = {whole(field): ids if self.training else none for field, ids in self.vocabularies.items()}
        return self.engine({**batch, **lists})  # type: ignore[no-any-return]


class StaticTables(nn.Module):
    """nn.Embedding in the place of the engine: ids become row numbers by a sorted list of the training ids."""

    def __init__(self, vocabularies: dict[str, Tensor], dim: int) -> None:
        super().__init__()
        self.vocabularies = vocabularies
        self.tables = nn.ModuleDict({field: nn.Embedding(len(ids) + 1, dim) for field, ids in vocabularies.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=STD)  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Batch → by field [B, dim]; ids that training never met share the last row. By ``whole(field)`` all rows."""
        outputs = {}
        for field, known in self.vocabularies.items():
            ids = batch[field]
            assert isinstance(ids, Tensor)
            at = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
            outputs[field] = self.tables[field](torch.where(known[at] == ids, at, len(known)))
            outputs[whole(field)] = self.tables[field].weight  # type: ignore[assignment]
        return outputs


def datasets(args: argparse.Namespace) -> dict[str, ColumnDataset]:
    """Open the three splits; columns of strings are hashed in the reader's thread."""
    first = next(iter(ColumnDataset(f"{args.data}/valid", FIELDS, 1)))
    strings = [field for field in FIELDS if isinstance(first[field], RaggedTensor)]
    features = FeatureEngine([Feature(field, ops=[Hash("farm")]) for field in strings]) if strings else None
    return {
        split: ColumnDataset(
            f"{args.data}/{split}",
            [*FIELDS, "label"],
            args.batch_size,
            shuffle=split == "train",
            seed=args.seed,
            transforms=features,
        )
        for split in ("train", "valid", "test")
    }


def stages(trainer: Trainer, args: argparse.Namespace) -> Iterator[Stage]:
    """Pass until the validation AUC has stopped growing; the best is tested."""
    best = 0.0
    for number in range(args.epochs):
        yield Train(epochs=1, name=f"epoch {number + 1}")
        yield Evaluate(data="valid", name="valid", metrics={"auc": AUC()})
        if trainer.figures["valid"]["auc"] > best:
            best = trainer.figures["valid"]["auc"]
            yield Evaluate(data="test", name="test")
        if trainer.saver is not None:
            yield SaveCheckpoint()


def run(args: argparse.Namespace, data: dict[str, ColumnDataset], *, baseline: bool) -> Trained:
    """Trains a model."""
    begin = time.perf_counter()
    dim = 1 + FACTORS
    torch.manual_seed(args.seed)
    # Passes move a shuffled dataset on; one of its own leaves the order of training as it is.
    ids: list[Batch] = list(datasets(args)["train"])
    seen = {field: torch.cat([batch[field] for batch in ids]).unique() for field in FIELDS}  # type: ignore[misc]
    if baseline:
        lookup: nn.Module = StaticTables(seen, dim)
        sparse: torch.optim.Optimizer = torch.optim.Adam(lookup.parameters(), lr=LR)
    else:
        lookup = GrowingTables(seen, dim, args.seed)
        sparse = optim.Adam(lookup.parameters(), lr=LR)
    torch.manual_seed(args.seed)
    towers = deepfm.make_towers(args.tower, len(FIELDS) * dim, DROPOUT, args.seed)
    model = deepfm.DeepFM(lookup, FIELDS, towers, l2=L2, regularized=[whole(field) for field in FIELDS])
    inside = {id(parameter) for parameter in lookup.parameters()}
    dense = torch.optim.Adam([p for p in dense_parameters(model) if id(p) not in inside], lr=LR)
    step = TorchStep(model, model.loss, {"dense": dense, "sparse": sparse}, clip_grad_norm=CLIP)

    # A tenth of the learning rate after each epoch without a gain, and the end after two.
    plateaus = [ReduceLROnPlateau(o, "max", factor=0.1, patience=0, threshold=0.0, eps=0.0) for o in (dense, sparse)]
    stopwatch = Stopwatch()
    callbacks = [stopwatch, PlateauSchedule("valid/auc", plateaus), EarlyStop("valid/auc", patience=2)]
    saver = None
    if args.run and not baseline:
        saver = Saver(args.run, keep=2)
        callbacks += [PeriodicCheckpoint(seconds=30.0), JsonLog(f"{args.run}/log.jsonl")]
    if not args.quiet:
        callbacks.append(ProgressBar())
    trainer = Trainer(
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
    rate = (trainer.samples - stopwatch.already) / max(stopwatch.seconds, 1e-9)
    epochs = trainer.samples // data["train"].num_rows
    test = figures["test"]
    return Trained(
        Figures(test["auc"], test["logloss"], rate, time.perf_counter() - begin, epochs), step, lookup, sparse
    )


def compare(ours: Trained, theirs: Trained, batches: list[Batch]) -> dict[str, float]:
    """Time steps of both in turns: whole ones, and the sparse half alone (lookup, backward with the L2, update)."""
    gradients = [torch.randn(len(batches[0]["label"]), 1 + FACTORS) for _ in FIELDS]

    def sparse(trained: Trained, batch: Batch) -> None:
        trained.sparse.zero_grad()
        outputs = trained.lookup(batch)
        tables = [outputs[whole(field)] for field in FIELDS]
        of_tables = [L2 * table.detach() for table in tables]
        torch.autograd.backward([*(outputs[field] for field in FIELDS), *tables], [*gradients, *of_tables])
        trained.sparse.step()

    pair = {"ours": ours, "theirs": theirs}
    times: dict[str, list[float]] = defaultdict(list)
    for what, function in (("whole", lambda trained, batch: trained.step(batch)), ("sparse", sparse)):
        for number, batch in enumerate(batches):
            for name in sorted(pair, reverse=number % 2 == 1):  # each is first as often as second
                begin = time.perf_counter()
                function(pair[name], batch)
                if number > 0:
                    times[f"{what}, {name}"].append(time.perf_counter() - begin)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "steps_ratio": middle["whole, theirs"] / middle["whole, ours"],
        "sparse_ratio": middle["sparse, theirs"] / middle["sparse, ours"],
        "sparse_share": middle["sparse, ours"] / middle["whole, ours"],
        "baseline_sparse_share": middle["sparse, theirs"] / middle["whole, theirs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/, valid/ and test/")
    parser.add_argument("--tower", choices=deepfm.TOWERS, default="torch", help="where the deep part runs (torch)")
    parser.add_argument("--baseline", action="store_true", help="also train the same model with nn.Embedding")
    parser.add_argument("--epochs", type=int, default=100, help="at most this many; it stops by itself (100)")
    parser.add_argument("--batch-size", type=int, default=4096, help="samples a step (4096)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--run", default="", help="folder for checkpoints and log.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()

    data = datasets(args)
    trained = {"hash tables": run(args, data, baseline=False)}
    last = asdict(trained["hash tables"].figures) | {"tower": args.tower}
    if args.baseline:
        trained["nn.Embedding"] = run(args, datasets(args), baseline=True)
        batches = [batch for batch in data["train"] if len(batch["label"]) == args.batch_size][:31]
        ratios = compare(trained["hash tables"], trained["nn.Embedding"], batches)
        last |= {**ratios, "baseline": asdict(trained["nn.Embedding"].figures)}
    head = f"DeepFM, tower: {args.tower}"
    print(f"\n{head:<22}{'AUC':>9}{'logloss':>9}{'samples/s':>11}{'epochs':>8}{'seconds':>9}")
    for name, result in trained.items():
        r = result.figures
        print(f"{name:<22}{r.auc:>9.5f}{r.logloss:>9.4f}{r.samples_per_s:>11,.0f}{r.epochs:>8}{r.seconds:>9.0f}")
    if args.baseline:
        print(
            f"in turns: {last['steps_ratio']:.2f} times the samples/s of nn.Embedding; the sparse half "
            f"({last['sparse_share']:.1%} of a step) {last['sparse_ratio']:.1f} times as fast"
        )
    print(json.dumps(last))


if __name__ == "__main__":
    main()
