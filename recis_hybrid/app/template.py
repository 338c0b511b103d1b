"""Starter configuration of ``recis-hybrid init``, with a small click log to run it on."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

CONFIG = """\
# Configuration for `recis-hybrid train config.yaml`. Any value can be overridden on the command line:
#     recis-hybrid train config.yaml train.epochs=5 optimizer.dense_lr=0.002
# `recis-hybrid train config.yaml --check` checks it against a sample of the data.

run: run                     # folder for checkpoints and log.jsonl; `recis-hybrid report run` plots the log. Paths in
                             # this file are relative to its folder
seed: 0                      # of all random numbers

data:
  train: clicks/train.csv    # a file, a folder, a pattern or a URL: Parquet, ORC, Arrow, CSV or JSON lines
  evaluate: clicks/eval.csv
  label: clicked             # 0 or 1
  groups: user               # for the metric gauc; int64
  columns:                   # options that column types do not determine
    price:
      default: 1.0           # replaces nulls
  batch_size: 256
  shuffle: true
  threads: 1                 # reader threads

# Inputs of the model. A feature with a `dim` has an embedding in a hash table, which grows with new ids. A feature
# without a `dim` is passed to the tower as a number. `ops` convert a column to ids or numbers, such as hash for strings
# and bucketize for numbers; `recis_hybrid.features.registered_ops()` lists all.
features:
  user:
    dim: 8
  item:
    dim: 8
    min_frequency: 2         # an id gets a row at its second occurrence
  site:
    ops:
      - hash: {kind: farm}   # string to 64-bit id
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
  dense_lr: 0.001            # of the tower (Adam)
  sparse: adam               # of the tables: adam, adagrad, sgd, ftrl, …
  sparse_lr: 0.01
  clip_grad_norm: 10.0       # null: no clipping

train:
  epochs: 3                  # each followed by an evaluation and a checkpoint
  accumulate: 1              # batches per update
  precision: float32         # or bfloat16, float16
  device: cpu                # or cuda
  checkpoint_steps: 50       # steps between checkpoints within an epoch; null: only at its end
  checkpoint_whole_every: 1  # every n-th is full, the others hold only changed table rows
  keep: 2                    # number of checkpoints to keep
  log_every: 10
  patience: 2                # evaluations without an improvement of the first metric before it stops; null: never
  evict_unused: null         # evict rows that were not seen for this number of steps
  metrics: [auc, gauc, logloss, calibration]
  tensorboard: false         # needs `pip install recis_hybrid[tensorboard]`
  mlflow: null               # name of an experiment; needs `pip install recis_hybrid[mlflow]`
  wandb: null                # name of a project; needs `pip install recis_hybrid[wandb]`
"""


def write_starter(folder: Path, *, rows: int = 12_000) -> Path:
    """Write ``config.yaml`` and ``clicks/``, a synthetic click log, to a folder.

    Args:
        folder: Created if it does not exist.
        rows: Rows of the log, a sixth of them for evaluation.

    Returns:
        Path of the configuration.

    Raises:
        FileExistsError: A configuration or a log already exists.
    """
    config = folder / "config.yaml"
    for path in (config, folder / "clicks"):
        if path.exists():
            raise FileExistsError(f"{path} already exists; name another folder, or remove it first")
    (folder / "clicks").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    user_bias = [rng.gauss(0, 1) for _ in range(400)]
    item_bias = [rng.gauss(0, 1) for _ in range(600)]
    site_bias = [rng.gauss(0, 0.7) for _ in range(40)]
    for name, count in (("train", rows - rows // 6), ("eval", rows // 6)):
        with open(folder / "clicks" / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user", "item", "site", "price", "hour", "clicked"])
            for _ in range(count):
                user, item, site = (int(size * rng.random() ** 2) for size in (400, 600, 40))
                price, hour = round(rng.lognormvariate(0, 1), 3), rng.randrange(24)
                bias = user_bias[user] + item_bias[item] + site_bias[site]
                logit = bias - 0.6 * math.log(price) + 0.5 * (hour > 17) - 0.7
                clicked = int(rng.random() < 1 / (1 + math.exp(-logit)))
                writer.writerow([user, item * 0x9E3779B97F4A7C1 % 2**62, f"site-{site}", price, hour, clicked])
    config.write_text(CONFIG)
    return config
