"""The whole path once: makes a click log, trains a model with a torch and a JAX tower, saves it and loads it again.

    python examples/demo.py

The log has planted structure, so the best AUC that any model can reach is known and is printed beside what this one
reached. Takes under two minutes on two cores; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import ctr_log
import deepfm
import torch

from recis_hybrid import optim
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal, dense_parameters
from recis_hybrid.features import Bucketize, Feature, FeatureEngine, Hash
from recis_hybrid.metrics import AUC, LogLoss
from recis_hybrid.pipelines import Evaluate, ProgressBar, SaveCheckpoint, TorchStep, Train, Trainer, evaluate
from recis_hybrid.saver import Saver

IDS = ["user_id", "item_id", "advertiser_id", "app_id", "city_id", "hour_id", "slot_id", "device_id"]
NUMBERS = ["price", "age_hours", "similarity"]
FACTORS = 8

# Strings are hashed and numbers put into buckets; ids need nothing, whatever their 64 bits are.
FEATURES = [
    *[Feature(name) for name in [*IDS, "history", *NUMBERS]],
    Feature("site", ops=[Hash("farm")]),
    Feature("price_level", source="price", ops=[Bucketize([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])]),
    Feature("age_level", source="age_hours", ops=[Bucketize([1.0, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0])]),
]
FIELDS = [*IDS, "site", "price_level", "age_level", "history"]


def make_engine(seed: int) -> EmbeddingEngine:
    """One table a field; the history of clicked items has vectors of its own, averaged."""
    first_values = Normal(0.0, 0.01)
    configs = {field: EmbeddingConfig(dim=1 + FACTORS, initializer=first_values) for field in FIELDS}
    configs["history"] = EmbeddingConfig(dim=1 + FACTORS, initializer=first_values, combiner="mean")
    return EmbeddingEngine(configs, optimizer=optim.Adam, seed=seed)


def make_model(tower: str, seed: int) -> deepfm.DeepFM:
    """DeepFM over the engine's fields and the plain numbers."""
    torch.manual_seed(seed)
    towers = deepfm.make_towers(tower, len(FIELDS) * (1 + FACTORS) + len(NUMBERS), dropout=0.1, seed=seed)
    return deepfm.DeepFM(make_engine(seed), FIELDS, towers, dense=NUMBERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=deepfm.TOWERS, default="both", help="where the deep part runs (both)")
    parser.add_argument("--rows", type=int, default=300_000, help="rows of the log (300000)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows (1)")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples a step (2048)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    args = parser.parse_args()

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        best = ctr_log.write_log(log, args.rows, args.seed)
        columns = [*IDS, "history", "site", *NUMBERS, "label"]
        train, test = (
            ColumnDataset(
                log / split,
                columns,
                args.batch_size,
                shuffle=split == "train",
                seed=args.seed,
                transforms=FeatureEngine(FEATURES),
            )
            for split in ("train", "test")
        )

        model = make_model(args.tower, args.seed)
        engine = model.lookup
        assert isinstance(engine, EmbeddingEngine)
        sparse = optim.Adam(engine.parameters(), lr=2e-3)
        dense = torch.optim.Adam(dense_parameters(model), lr=1e-3)
        step = TorchStep(model, model.loss, {"dense": dense, "sparse": sparse})
        saver, metrics = Saver(Path(folder) / "checkpoints"), {"auc": AUC(), "logloss": LogLoss()}
        trainer = Trainer(step, train, test, metrics=metrics, saver=saver, callbacks=[ProgressBar()])
        start = time.perf_counter()
        trainer.fit([Train(epochs=args.epochs)])
        rate = trainer.samples / (time.perf_counter() - start)
        print(engine.describe())
        figures = dict(trainer.fit([Evaluate(), SaveCheckpoint()])["eval"])

        again = make_model(args.tower, args.seed + 1)
        saver.load({"engine": again.lookup, "model": again})
        reloaded = evaluate(TorchStep(again, again.loss, []), test, metrics)

    seconds = time.perf_counter() - begin
    print(f"\n{'':<28}{'AUC':>9}{'logloss':>9}")
    print(f"{'this model, test rows':<28}{figures['auc']:>9.4f}{figures['logloss']:>9.4f}")
    print(f"{'saved and loaded again':<28}{reloaded['auc']:>9.4f}{reloaded['logloss']:>9.4f}")
    print(f"{'best possible':<28}{best['bayes_auc']:>9.4f}{best['bayes_logloss']:>9.4f}")
    print(f"{rate:,.0f} samples/s with tower {args.tower}, {seconds:.0f} s in all\n")
    print(
        json.dumps(
            {
                "auc": figures["auc"],
                "logloss": figures["logloss"],
                "bayes_auc": best["bayes_auc"],
                "reload_exact": reloaded == figures,
                "samples_per_s": rate,
                "seconds": seconds,
                "tower": args.tower,
            }
        )
    )


if __name__ == "__main__":
    main()
