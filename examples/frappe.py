"""Trains DeepFM on Frappe (a public CTR benchmark) through hash tables, with a torch tower, a JAX tower, or both.

    python examples/frappe.py --data FOLDER --tower both [--baseline]

FOLDER holds train/, valid/ and test/ with Parquet files: ten categorical columns, of int64 ids or of strings (which are
hashed while reading), and ``label``. ``--baseline`` then trains the same model with nn.Embedding, and both are printed
side by side. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import deepfm
import torch
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, dense_parameters
from recis_hybrid.features import Feature, FeatureEngine, Hash
from recis_hybrid.metrics import AUC, LogLoss
from recis_hybrid.pipelines import TorchStep, evaluate, fit
from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.saver import Saver

# The published recipe (BARS, DeepFM on Frappe x1), but that its L2 is of all rows at every step, and here of those that
# the batch has.
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
    seconds: float
    epochs: int
    sparse_share: float
    """Lookup, its backward and the update, as a share of the step."""


class StaticTables(nn.Module):
    """nn.Embedding in the place of the engine: ids become row numbers by a sorted list of the training ids."""

    def __init__(self, vocabularies: dict[str, Tensor], dim: int) -> None:
        super().__init__()
        self.vocabularies = vocabularies
        self.tables = nn.ModuleDict({field: nn.Embedding(len(ids) + 1, dim) for field, ids in vocabularies.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=STD)  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Batch → by field [B, dim]; ids that training never met share the last row."""
        outputs = {}
        for field, known in self.vocabularies.items():
            ids = batch[field]
            assert isinstance(ids, Tensor)
            at = torch.searchsorted(known, ids).clamp_(max=len(known) - 1)
            outputs[field] = self.tables[field](torch.where(known[at] == ids, at, len(known)))
        return outputs


def datasets(args: argparse.Namespace) -> dict[str, ColumnDataset]:
    """Opens the three splits; columns of strings are hashed in the reader's thread."""
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


def sparse_share(lookup: nn.Module, optimizer: torch.optim.Optimizer, step: TorchStep, batches: list[Batch]) -> float:
    """Times the sparse half alone (lookup, backward from a fixed gradient, update) beside the whole step."""
    size = len(batches[0]["label"])
    gradients = [torch.randn(size, 1 + FACTORS) for _ in FIELDS]

    def sparse(batch: Batch) -> None:
        optimizer.zero_grad()
        outputs = lookup(batch)
        torch.autograd.backward([outputs[field] for field in FIELDS], gradients)
        optimizer.step()

    def seconds(run: Callable[[Batch], object], batch: Batch) -> float:
        begin = time.perf_counter()
        run(batch)
        return time.perf_counter() - begin

    pairs = [(seconds(sparse, batch), seconds(step, batch)) for batch in batches]
    halves, wholes = zip(*pairs, strict=True)
    return statistics.median(halves) / statistics.median(wholes)


def run(args: argparse.Namespace, *, baseline: bool) -> Figures:
    """Trains until the validation AUC has stopped growing, and tests the best."""
    begin = time.perf_counter()
    torch.manual_seed(args.seed)
    data = datasets(args)
    dim = 1 + FACTORS
    if baseline:
        seen = {field: torch.cat([b[field] for b in data["train"]]).unique() for field in FIELDS}  # type: ignore[misc]
        lookup: nn.Module = StaticTables(seen, dim)
        sparse: torch.optim.Optimizer = torch.optim.Adam(lookup.parameters(), lr=LR)
    else:
        lookup = EmbeddingEngine(
            {field: EmbeddingConfig(dim=dim, initializer=Normal(0.0, STD)) for field in FIELDS},
            optimizer_state=optim.Adam.row_state(),
            seed=args.seed,
        )
        sparse = optim.Adam(lookup.parameters(), lr=LR)
    torch.manual_seed(args.seed)
    towers = deepfm.make_towers(args.tower, len(FIELDS) * dim, DROPOUT, args.seed)
    model = deepfm.DeepFM(lookup, FIELDS, towers, l2=L2)
    inside = {id(parameter) for parameter in lookup.parameters()}
    dense = torch.optim.Adam([p for p in dense_parameters(model) if id(p) not in inside], lr=LR)
    step = TorchStep(model, model.loss, [dense, sparse], clip_grad_norm=CLIP)

    best, bad, samples, training, epochs = 0.0, 0, 0, 0.0, 0
    test: dict[str, float] = {}
    for _ in range(args.epochs):
        figures = fit(step, data["train"], progress=not args.quiet)
        samples, training, epochs = samples + figures.samples, training + figures.seconds, epochs + 1
        valid = evaluate(model, data["valid"], {"auc": AUC()})["auc"]
        print(f"epoch {epochs}: loss {figures.loss:.4f}, validation AUC {valid:.5f}")
        if valid > best:
            best, bad = valid, 0
            test = evaluate(model, data["test"], {"auc": AUC(), "logloss": LogLoss()})
        else:
            bad += 1
            for group in (*dense.param_groups, *sparse.param_groups):
                group["lr"] *= 0.1
            if bad == 2:
                break
    if args.save and not baseline:
        print(f"saved {Saver(args.save).save(epochs, engine=lookup, model=model, dense=dense, sparse=sparse)}")
    batches = [b for b in islice(endless(data["train"]), 31) if len(b["label"]) == args.batch_size]
    share = sparse_share(lookup, sparse, step, batches[1:])
    seconds = time.perf_counter() - begin
    return Figures(test["auc"], test["logloss"], samples / training, seconds, epochs, share)


def endless(data: ColumnDataset) -> Iterator[Batch]:
    """Batches for ever."""
    while True:
        yield from data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/, valid/ and test/")
    parser.add_argument("--tower", choices=deepfm.TOWERS, default="torch", help="where the deep part runs (torch)")
    parser.add_argument("--baseline", action="store_true", help="also train the same model with nn.Embedding")
    parser.add_argument("--epochs", type=int, default=10, help="at most this many (10)")
    parser.add_argument("--batch-size", type=int, default=4096, help="samples a step (4096)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--save", default="", help="folder for a checkpoint of the trained model")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()

    results = {"hash tables": run(args, baseline=False)}
    if args.baseline:
        results["nn.Embedding"] = run(args, baseline=True)
    head = f"DeepFM, tower: {args.tower}"
    print(f"\n{head:<22}{'AUC':>9}{'logloss':>9}{'samples/s':>11}{'sparse share':>14}{'seconds':>9}")
    for name, r in results.items():
        rates = f"{r.samples_per_s:>11,.0f}{r.sparse_share:>14.1%}{r.seconds:>9.0f}"
        print(f"{name:<22}{r.auc:>9.5f}{r.logloss:>9.4f}{rates}")
    last = asdict(results["hash tables"]) | {"tower": args.tower}
    if args.baseline:
        last["baseline"] = asdict(results["nn.Embedding"])
    print(json.dumps(last))


if __name__ == "__main__":
    main()
