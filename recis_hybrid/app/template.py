"""A configuration to begin with, and a small click log that it runs on."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

CONFIG = """\
# A training that `recis-hybrid train config.yaml` runs. Any value can be given on the command line, too:
#     recis-hybrid train config.yaml train.epochs=5 optimizer.dense_lr=0.002
# `recis-hybrid train config.yaml --check` holds it against a sample of the data first.

run: run                     # checkpoints and log.jsonl; `recis-hybrid report run` makes a page of it. Relative paths
                             # in this file begin at its folder
seed: 0                      # of everything random

data:
  train: clicks/train.csv    # a file, a folder, a pattern or a URL: Parquet, ORC, Arrow, CSV or JSON lines
  evaluate: clicks/eval.csv
  label: clicked             # 0 or 1
  groups: user               # for the metric gauc; int64
  columns:                   # what the types in the files do not say
    price:
      default: 1.0           # stands for a null
  batch_size: 256
  shuffle: true
  threads: 1                 # that read

# The inputs of the model. One with a `dim` has an embedding in a hash table, which grows with the ids that come; one
# without goes to the tower as a number. `ops` make of a column what the table or the tower takes: hash for strings,
# bucketize for numbers; `recis_hybrid.features.registered_ops()` lists all.
features:
  user:
    dim: 8
  item:
    dim: 8
    min_frequency: 2         # an id gets a row when it is met for the second time
  site:
    ops:
      - hash: {kind: farm}   # of a string, 64 bits
    dim: 8
  price_level:
    source: price
    ops:
      - bucketize: {boundaries: [0.5, 1, 2, 4]}
    dim: 8
  log_price:
    source: price
    ops:
      - log: {}
  hour:
    dim: 8

model:
  kind: deepfm               # or mlp
  hidden: [64, 32]
  dropout: 0.1
  batch_norm: false
  compile: false             # torch.compile for the tower

optimizer:
  dense_lr: 0.001            # the tower's; Adam
  sparse: adam               # the tables': adam, adagrad, rowwise_adagrad or sgd
  sparse_lr: 0.01
  clip_grad_norm: 10.0       # null: any

train:
  epochs: 3                  # after each: evaluation and checkpoint
  accumulate: 1              # batches of an update
  precision: float32         # or bfloat16, float16
  device: cpu                # or cuda
  checkpoint_steps: 50       # within a pass; null: at its end only
  checkpoint_whole_every: 1  # of so many one is whole, the others hold what changed in tables
  keep: 2                    # checkpoints that stay
  log_every: 10
  patience: 2                # evaluations without a better first metric until it stops; null: never
  evict_unused: null         # give up rows that were not met in so many steps
  metrics: [auc, gauc, logloss, calibration]
  tensorboard: false         # needs `pip install recis_hybrid[tensorboard]`
"""


def write_starter(folder: Path, *, rows: int = 12_000) -> Path:
    """Write ``config.yaml`` and ``clicks/``, a log of made-up clicks, into a folder.

    Args:
        folder: Made if it is not there.
        rows: Of the log, a sixth of them to evaluate on.

    Returns:
        The configuration.

    Raises:
        FileExistsError: There is a configuration or a log already.
    """
    config = folder / "config.yaml"
    for path in (config, folder / "clicks"):
        if path.exists():
            raise FileExistsError(f"{path} already exists; name another folder, or remove it first")
    (folder / "clicks").mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0)
    tastes = [drawn.gauss(0, 1) for _ in range(400)]
    worths = [drawn.gauss(0, 1) for _ in range(600)]
    sites = [drawn.gauss(0, 0.7) for _ in range(40)]
    for name, count in (("train", rows - rows // 6), ("eval", rows // 6)):
        with open(folder / "clicks" / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user", "item", "site", "price", "hour", "clicked"])
            for _ in range(count):
                user, item, site = (int(size * drawn.random() ** 2) for size in (400, 600, 40))
                price, hour = round(drawn.lognormvariate(0, 1), 3), drawn.randrange(24)
                logit = tastes[user] + worths[item] + sites[site] - 0.6 * math.log(price) + 0.5 * (hour > 17) - 0.7
                clicked = int(drawn.random() < 1 / (1 + math.exp(-logit)))
                writer.writerow([user, item * 0x9E3779B97F4A7C1 % 2**62, f"site-{site}", price, hour, clicked])
    config.write_text(CONFIG)
    return config
