"""Two-tower retrieval with in-batch negatives, whose logits are corrected by the log of each item's frequency.

    python examples/two_tower.py --data FOLDER    # MovieLens-100K: u.data, or Parquet files in train, valid and test
    python examples/two_tower.py                  # a made-up log

The user tower reads the user's id and the last 20 items before the click, the item tower the item's id. The last fifth
of each user's clicks is for testing: the user's vector is the query, and recall@20 is the share of these clicks among
the nearest 20 of all items that are new to the user. The twin is the same model in plain torch (nn.Embedding,
SparseAdam); it starts from the same values and sees the same batches. The last line is JSON.

With torchrun, ranks share the tables, and the negatives of a row are the items of its own rank.

References:
    Yi et al.: Sampling-bias-corrected neural modeling for large corpus item recommendations. RecSys 2019.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv, parquet
from torch import Tensor, nn

import recis_hybrid as rh
from recis_hybrid import distributed
from recis_hybrid.columnio import ShardOptions

DIM, WIDTH = 32, 64
HISTORY = 20
TEMPERATURE = 0.1
LR = 2e-3
K = 20
FEATURES = {"user": "user", "item": "item", "history": "item"}
"""Tables by feature."""
Clicks = tuple[Any, Any]  # numpy arrays of users and of items, numbered from 0, in order of time


def read_movielens(folder: Path) -> Clicks:
    """Return the ratings of MovieLens-100K, each as a click."""
    names = ["user_id", "item_id", "rating", "timestamp"]
    if (folder / "u.data").is_file():
        ratings = csv.read_csv(folder / "u.data", csv.ReadOptions(column_names=names), csv.ParseOptions(delimiter="\t"))
    else:
        parts = [parquet.read_table(folder / part, columns=names) for part in ("train", "valid", "test")]
        ratings = pa.concat_tables(parts)
    ratings = ratings.sort_by([(name, "ascending") for name in ("timestamp", "user_id", "item_id")])
    return ratings["user_id"].to_numpy() - 1, ratings["item_id"].to_numpy() - 1


def make_clicks(users: int, items: int, clicks: int, seed: int) -> Clicks:
    """Sample clicks of users who like some kinds of items, of which a few are popular."""
    rng = np.random.default_rng(seed)
    kinds = 20
    taste = rng.dirichlet(np.full(kinds, 0.2), users)
    user = (users * rng.random(clicks) ** 1.5).astype(np.int64)
    kind = (taste.cumsum(1)[user] < rng.random((clicks, 1))).sum(1).clip(max=kinds - 1)
    return user, (items // kinds * rng.random(clicks) ** 2).astype(np.int64) * kinds + kind


def split(clicks: Clicks) -> tuple[pa.Table, pa.Table, Tensor]:
    """Return training rows, one query for each user, and a tensor ``[users, items]`` of the clicks.

    The tensor holds 1 for clicks in training and 2 for other clicks. A row has the user, the item, the items before it
    (``history``), and ``log_q``, the log of the item's share of the training rows.
    """
    user, item = clicks
    kinds = torch.zeros(user.max() + 1, item.max() + 1, dtype=torch.int8)
    rows, queries = [], []
    for each in range(len(kinds)):
        own = item[user == each]
        cut = len(own) - len(own) // 5
        kinds[each, own[cut:]] = 2
        kinds[each, own[:cut]] = 1
        rows += [{"user": each, "item": own[at], "history": own[max(at - HISTORY, 0) : at]} for at in range(cut)]
        queries.append({"user": each, "history": own[max(cut - HISTORY, 0) : cut]})
    train = pa.Table.from_pylist(rows)
    items = train["item"].to_numpy()
    share = np.bincount(items)[items] / len(items)
    return train.append_column("log_q", pa.array(np.log(share, dtype=np.float32))), pa.Table.from_pylist(queries), kinds


def make_configs() -> dict[str, rh.EmbeddingConfig]:
    options: dict[str, Any] = {"combiner": "mean", "initializer": rh.embedding.Normal(0.0, 0.1), "optional": True}
    return {name: rh.EmbeddingConfig(dim=DIM, table=table, **options) for name, table in FEATURES.items()}


class PlainTables(nn.Module):
    """The engine's tables as nn.Embedding, for ids below the given sizes."""

    def __init__(self, sizes: dict[str, int], seed: int) -> None:
        super().__init__()
        engine = rh.EmbeddingEngine(make_configs(), seed=seed, group=False).eval()
        self.tables = nn.ModuleDict()
        for name, size in sizes.items():
            rows = engine({name: torch.arange(size)})[name]
            self.tables[name] = nn.Embedding.from_pretrained(rows, freeze=False, sparse=True)

    def forward(self, batch: rh.Batch) -> dict[str, Tensor]:
        """Return ``[B, DIM]`` by feature."""
        found = {}
        for name, ids in batch.items():
            table: Any = self.tables[FEATURES[name]]
            if isinstance(ids, rh.RaggedTensor):
                options: dict[str, Any] = {"mode": "mean", "sparse": True, "include_last_offset": True}
                found[name] = nn.functional.embedding_bag(ids.values, table.weight, ids.offsets, **options)
            else:
                found[name] = table(ids)
        return found


class TwoTowers(nn.Module):
    """Two multilayer perceptrons over embeddings, and the loss of a batch.

    Args:
        lookup: Maps a batch to ``[B, DIM]`` by feature.
        seed: Seed of the towers.
    """

    def __init__(self, lookup: nn.Module, seed: int) -> None:
        super().__init__()
        self.lookup = lookup
        torch.manual_seed(seed)
        self.user_tower = nn.Sequential(nn.Linear(2 * DIM, WIDTH), nn.ReLU(), nn.Linear(WIDTH, DIM))
        self.item_tower = nn.Sequential(nn.Linear(DIM, WIDTH), nn.ReLU(), nn.Linear(WIDTH, DIM))

    def users(self, found: dict[str, Tensor]) -> Tensor:
        """Return vectors of users, ``[B, DIM]``."""
        return nn.functional.normalize(self.user_tower(torch.cat([found["user"], found["history"]], dim=1)))

    def items(self, found: dict[str, Tensor]) -> Tensor:
        """Return vectors of items, ``[B, DIM]``."""
        return nn.functional.normalize(self.item_tower(found["item"]))

    def forward(self, batch: Any) -> Tensor:
        """Return the loss: the softmax of each user's item among all items of the batch."""
        found = self.lookup({name: batch[name] for name in FEATURES})
        # A frequent item is a negative often. Subtracting its log frequency makes up for that.
        logits = self.users(found) @ self.items(found).T / TEMPERATURE - batch["log_q"]
        same = batch["item"][:, None] == batch["item"]  # the user's item in another row is not a negative
        logits = logits.masked_fill(same.fill_diagonal_(False), -torch.inf)
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))

    @torch.no_grad()
    def scores(self, queries: pa.Table, items: int) -> Tensor:
        """Return the scores of all items for each query, ``[Q, items]``."""
        self.eval()
        whole = ShardOptions(rank=0, world_size=1)
        (query,) = rh.ColumnDataset.from_arrow(queries, ["user", "history"], queries.num_rows, shard=whole)
        return self.users(self.lookup(query)) @ self.items(self.lookup({"item": torch.arange(items)})).T


def recall(scores: Tensor, kinds: Tensor) -> float:
    """Return recall@K over the items that are new to each user."""
    new = kinds != 1
    metric = rh.metrics.RecallAtK(K, sync=False)
    metric.update(scores[new], (kinds == 2)[new].float(), new.nonzero()[:, 0])
    return metric.compute()


def train_twin(model: TwoTowers, data: rh.ColumnDataset, epochs: int) -> None:
    """Train the model with plain tables in a plain loop."""
    optimizers = [
        torch.optim.SparseAdam(model.lookup.parameters(), lr=LR),
        torch.optim.Adam([*model.user_tower.parameters(), *model.item_tower.parameters()], lr=LR),
    ]
    for _ in range(epochs):
        for batch in data:
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(batch).backward()
            for optimizer in optimizers:
                optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of MovieLens-100K (a made-up log)")
    parser.add_argument("--clicks", type=int, default=60_000, help="clicks of the made-up log (60000)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training rows (10)")
    parser.add_argument("--batch-size", type=int, default=512, help="samples per step (512)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    begin = time.perf_counter()
    log = read_movielens(args.data) if args.data else make_clicks(1000, 1000, args.clicks, args.seed)
    train, queries, kinds = split(log)

    def dataset() -> rh.ColumnDataset:
        columns = [*FEATURES, "log_q"]
        return rh.ColumnDataset.from_arrow(train, columns, args.batch_size, shuffle=True, seed=args.seed)

    engine = rh.EmbeddingEngine(make_configs(), optimizer=rh.optim.Adam, seed=args.seed)
    model = TwoTowers(engine, args.seed)
    dense = torch.optim.Adam(rh.dense_parameters(model), lr=LR)
    step = rh.TorchStep(model, None, {"dense": dense, "sparse": engine.make_optimizer(lr=LR)})
    callbacks = [] if args.quiet else [rh.pipelines.ProgressBar()]
    trainer = rh.Trainer(step, dataset(), callbacks=callbacks, seed=args.seed)
    start = time.perf_counter()
    trainer.fit([rh.Train(epochs=args.epochs)])
    rate = trainer.samples / (time.perf_counter() - start)
    popular = (kinds == 1).sum(0).float().expand(kinds.shape)
    last = {"recall": recall(model.scores(queries, kinds.size(1)), kinds), "popular_recall": recall(popular, kinds)}
    if distributed.world_size() == 1:
        twin = TwoTowers(PlainTables({"user": kinds.size(0), "item": kinds.size(1)}, args.seed), args.seed)
        train_twin(twin, dataset(), args.epochs)
        last["twin_recall"] = recall(twin.scores(queries, kinds.size(1)), kinds)
    if distributed.rank() == 0:
        print(json.dumps({**last, "samples_per_s": rate, "seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
