"""Makes a click log in Parquet of which the best possible AUC is known.

    python examples/ctr_log.py OUT --rows 300000 --seed 0

writes OUT/train, OUT/valid and OUT/test (80, 10 and 10 % of the rows), each of several files and row groups:

    user_id, item_id, advertiser_id, app_id, city_id, hour_id, slot_id, device_id
                      int64          ids spread over all 64 bits, drawn by Zipf's law; among the devices are
                                     0, -1, and the least and the greatest int64
    history           list<int64>    ids of items that the user clicked before, none to 20
    site              string         where the advertisement was shown, UTF-8
    price, age_hours, similarity
                      float          numbers of which the click depends smoothly, not linearly
    label             float          1 for a click, else 0
    p_click           double         the true probability that the label was drawn by: never an input of a model

The logit of ``p_click`` is a sum of one effect an id, of two interactions (the user's taste with the item; the slot
with the device), of how much of the history is of the item's kind, and of the numbers' effects. No model can be
expected to order the rows better than ``p_click`` does: its AUC on the test rows is what a model's AUC is to be read
against.

The same rows and seed give the same log. All effects come from the seed alone, so logs of other lengths share them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_ROWS = 1_000
ROW_GROUP = 16_384
# Of ten blocks of rows the first eight are for training. A split lies in this many files.
SPLITS = {"train": (0.8, 4), "valid": (0.1, 2), "test": (0.1, 2)}
KINDS = 8  # kinds of items; the item of rank r is of kind r % KINDS
HISTORY = 20
SITE_WORDS = (
    "news",
    "football",
    "cooking",
    "café",
    "games",
    "weather",
    "maps",
    "música",
    "jobs",
    "новости",
    "travel",
    "旅行",
)


@dataclass(frozen=True)
class Field:
    """How many ids a field has, the exponent of Zipf's law they follow, and the spread of their effects."""

    ids: int
    exponent: float
    spread: float


FIELDS = {
    "user_id": Field(5_000, 1.1, 0.4),
    "item_id": Field(2_000, 1.2, 0.65),
    "advertiser_id": Field(300, 1.2, 0.55),
    "app_id": Field(200, 1.2, 0.5),
    "city_id": Field(120, 1.1, 0.4),
    "hour_id": Field(168, 0.3, 0.3),
    "slot_id": Field(8, 0.5, 0.6),
    "device_id": Field(24, 0.7, 0.3),
}
SITES = Field(400, 1.2, 0.55)


def shares(field: Field) -> Floats:
    """Return the probability of every rank, from 0, the commonest, by Zipf's law: float64 [field.ids]."""
    weights: Floats = np.arange(1, field.ids + 1, dtype=np.float64) ** -field.exponent
    weights /= weights.sum()
    return weights


def zipf(field: Field, size: int, rng: np.random.Generator) -> Ints:
    """Draws ranks: int64 [size]."""
    bounds = np.cumsum(shares(field))
    ranks: Ints = np.searchsorted(bounds[:-1], rng.random(size) * bounds[-1], side="right").astype(np.int64)
    return ranks


def ids_of(name: str, seed: int) -> Ints:
    """Return the ids of a field by rank, no two alike and spread over all of int64: int64 [field.ids].

    The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) maps
    64-bit words one to one, so distinct words give distinct ids, in one field and over all of them.
    """
    field = FIELDS[name]
    number = list(FIELDS).index(name)
    word = np.arange(field.ids, dtype=np.uint64) + np.uint64((number << 32) + ((seed % 2**24) << 40) + 1)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ids = (word ^ (word >> np.uint64(31))).view(np.int64)
    if name == "device_id":
        # No id is reserved, so the ones that other tables take for "empty" are among the commonest.
        ids[:4] = [0, -1, np.iinfo(np.int64).min, np.iinfo(np.int64).max]
    return ids


def site_names() -> list[str]:
    """Return the names of the sites by rank."""
    return [f"{SITE_WORDS[rank % len(SITE_WORDS)]}-{rank:04d}.example" for rank in range(SITES.ids)]


@dataclass(frozen=True)
class World:
    """What decides about clicks, a function of the seed: effects by rank, tastes of users, the slots' pairs."""

    effects: Mapping[str, Floats]
    taste: Ints  # [users], the kind of items that a user likes
    pairs: Floats  # [slots, devices]

    @classmethod
    def of(cls, seed: int) -> World:
        rng = np.random.default_rng([seed, 0])
        effects = {name: drawn_effects(field, rng) for name, field in (FIELDS | {"site": SITES}).items()}
        taste = rng.integers(0, KINDS, FIELDS["user_id"].ids)
        return cls(effects, taste, rng.normal(0, 0.35, (FIELDS["slot_id"].ids, FIELDS["device_id"].ids)))


def drawn_effects(field: Field, rng: np.random.Generator) -> Floats:
    """Draws an effect for every rank: over the rows their mean is 0 and their deviation ``field.spread``.

    A few ids have most of the rows, so without this the rate of clicks and the best AUC would hang on the seed.
    """
    share = shares(field)
    effects = rng.normal(0, 1, field.ids)
    effects -= share @ effects
    return effects * (field.spread / np.sqrt(share @ effects**2))


def histories(taste: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Draws what users clicked before, three times in five of the kind that they like.

    Args:
        taste: The users' kinds, int64 [B].
        rng: The generator.

    Returns:
        Ranks of items, int64 [N], and where each row's begin and end, int64 [B+1].
    """
    lengths = np.minimum(rng.geometric(0.18, len(taste)) - 1, HISTORY)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    kind = np.where(rng.random(total) < 0.6, np.repeat(taste, lengths), rng.integers(0, KINDS, total))
    items = FIELDS["item_id"]
    within = zipf(Field(items.ids // KINDS, items.exponent, 0), total, rng)
    return within * KINDS + kind, offsets


def logits(
    world: World, ranks: Mapping[str, Ints], history: Ints, offsets: Ints, numbers: Mapping[str, NDArray[np.float32]]
) -> Floats:
    """Return the logit of the click's true probability: float64 [B]."""
    kind = ranks["item_id"] % KINDS
    lengths = np.diff(offsets)
    alike = np.repeat(kind, lengths) == history % KINDS
    count = np.concatenate([[0], np.cumsum(alike)])
    share = (count[offsets[1:]] - count[offsets[:-1]]) / np.maximum(lengths, 1)
    total = sum((world.effects[name][rank] for name, rank in ranks.items()), np.zeros(len(kind)))
    total += 0.9 * (world.taste[ranks["user_id"]] == kind) + 1.0 * share
    total += world.pairs[ranks["slot_id"], ranks["device_id"]]
    total += -0.45 * np.log(numbers["price"]) + 0.9 * np.exp(-numbers["age_hours"] / 24) + 0.5 * numbers["similarity"]
    return total - 2.4


def make_rows(rows: int, seed: int) -> pa.Table:
    """Make a log of so many rows, in the order of time; the columns are those named at the top of this file."""
    world = World.of(seed)
    rng = np.random.default_rng([seed, 1, rows])
    ranks = {name: zipf(field, rows, rng) for name, field in (FIELDS | {"site": SITES}).items()}
    history, offsets = histories(world.taste[ranks["user_id"]], rng)
    numbers = {
        "price": np.exp(rng.normal(0, 1, rows)).astype(np.float32),
        "age_hours": rng.exponential(36, rows).astype(np.float32),
        "similarity": rng.uniform(-1, 1, rows).astype(np.float32),
    }
    p_click = 1 / (1 + np.exp(-logits(world, ranks, history, offsets, numbers)))
    items = ids_of("item_id", seed)
    columns: dict[str, pa.Array] = {name: pa.array(ids_of(name, seed)[ranks[name]]) for name in FIELDS}
    columns["history"] = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(items[history]))
    columns["site"] = pa.array(site_names()).take(pa.array(ranks["site"]))
    columns |= {name: pa.array(values) for name, values in numbers.items()}
    columns["label"] = pa.array((rng.random(rows) < p_click).astype(np.float32))
    columns["p_click"] = pa.array(p_click)
    return pa.table(columns)


def auc(labels: NDArray[np.floating], scores: Floats) -> float:
    """Return the area under the ROC curve: the chance that a click scores above no click, a tie counting half."""
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]
    clicks = labels > 0.5
    positive = int(clicks.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        raise ValueError(f"auc: needs clicks and no clicks, got {positive} and {negative}")
    return float((ranks[clicks].sum() - positive * (positive + 1) / 2) / (positive * negative))


def logloss(labels: NDArray[np.floating], p_click: Floats) -> float:
    """Return the mean of -log of the probability given to what happened."""
    return float(-np.log(np.where(labels > 0.5, p_click, 1 - p_click)).mean())


def write_log(out: Path, rows: int = 300_000, seed: int = 0) -> dict[str, float]:
    """Write a log below ``out`` and return the best figures that a model can reach on its test rows.

    Args:
        out: The folder, made if it is not there; files of an earlier log in it are replaced.
        rows: How many rows, in all three splits together; at least 1,000.
        seed: Any integer of at least 0.

    Returns:
        ``rows``, ``label_rate`` (of all rows), ``bayes_auc`` and ``bayes_logloss`` (of the test rows).

    Raises:
        ValueError: If rows or seed are out of range.
    """
    if rows < MIN_ROWS:
        raise ValueError(f"write_log: rows must be at least {MIN_ROWS}, so that every split has clicks; got {rows}")
    if seed < 0:
        raise ValueError(f"write_log: seed must be at least 0, got {seed}")
    table = make_rows(rows, seed)
    begin = 0
    for split, (share, files) in SPLITS.items():
        size = rows - begin if split == "test" else int(rows * share)
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        edges = np.linspace(begin, begin + size, files + 1).astype(int)
        for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            pq.write_table(
                table.slice(low, high - low), folder / f"part-{number:05d}.parquet", row_group_size=ROW_GROUP
            )
        begin += size
    test = table.slice(begin - size)
    labels, p_click = test["label"].to_numpy(), test["p_click"].to_numpy()
    return {
        "rows": rows,
        "label_rate": float(table["label"].to_numpy().mean()),
        "bayes_auc": auc(labels, p_click),
        "bayes_logloss": logloss(labels, p_click),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Makes a click log in Parquet of which the best possible AUC is known."
    )
    parser.add_argument("out", type=Path, help="the folder to write train/, valid/ and test/ into")
    parser.add_argument("--rows", type=int, default=300_000, help="rows of all splits together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another log (%(default)s)")
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        figures = write_log(arguments.out, arguments.rows, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    print(
        f"{arguments.rows} rows in {arguments.out}: the best AUC that a model can reach is {figures['bayes_auc']:.4f}"
    )
    print(json.dumps(figures | {"samples_per_s": round(arguments.rows / seconds), "seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main()
