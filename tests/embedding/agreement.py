"""Compare several ranks with one process, for every rule, number of ranks and setting; print a table.

    python -m tests.embedding.agreement [--steps 100]

The same global batches are trained on 1, 2 and 4 Gloo ranks (the shares of the four ranks differ, and one has none),
with SGD, Adagrad with an initial accumulator of 0.1, and Adam. The table shows the largest relative difference of a
loss and the largest difference of a weight, absolute and in roundings (tests/support/near.py). Training twice on the
same ranks must yield identical bits.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch

from tests.support.near import OF_ADAM, ROUNDINGS, roundings
from tests.support.rank_processes import Ranks
from tests.support.sharded import Job, merged, train

RULES = {"SGD": (0.05, ROUNDINGS), "Adagrad": (0.05, ROUNDINGS), "Adam": (0.002, OF_ADAM)}
"""Learning rate and tolerance of weights, in roundings, of each rule."""


def differences(got: list[dict[str, Any]], one: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Return the largest relative difference of a loss, and of a weight the largest absolute one and in roundings."""
    losses = max(
        abs(ours - theirs) / abs(theirs) for ours, theirs in zip(got[0]["losses"], one[0]["losses"], strict=True)
    )
    ours, theirs = merged(got), merged(one)
    absolute, rounded = 0.0, 0.0
    for name, columns in theirs.items():
        assert torch.equal(ours[name]["ids"], columns["ids"]), name
        if columns["ids"].numel() == 0:
            continue  # a read-only table
        weights = ours[name]["embedding"], columns["embedding"]
        absolute = max(absolute, float((weights[0] - weights[1]).abs().max()))
        rounded = max(rounded, float(roundings(*weights).max()))
    return losses, absolute, rounded


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="steps of each training (100)")
    args = parser.parse_args()
    ranks, failures = Ranks(), 0
    print("| rule | ranks | dedup | prefetch | loss, relative | weight | in roundings | repeatable |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        for rule, (lr, allowed) in RULES.items():
            job = Job(rule=rule, steps=args.steps, lr=lr)
            one = ranks.run(1, train, job)
            for world, deduplicate, ahead in itertools.product((2, 4), (True, False), (0, 2)):
                options = {"deduplicate": deduplicate, "prefetch_depth": ahead}
                this = Job(**{**vars(job), "uneven": world == 4, "prefetch": ahead, "engine": options})
                got, again = (ranks.run(world, train, this) for _ in range(2))
                losses, absolute, rounded = differences(got, one)
                same = all(
                    torch.equal(ours["tables"][name]["embedding"], theirs["tables"][name]["embedding"])
                    for ours, theirs in zip(got, again, strict=True)
                    for name in ours["tables"]
                )
                failures += int(losses > 1e-5 or rounded > allowed or not same)
                print(
                    f"| {rule} | {world} | {'on' if deduplicate else 'off'} | {ahead} | {losses:.1e} | {absolute:.1e} "
                    f"| {rounded:.1f} | {'yes' if same else 'NO'} |",
                    flush=True,
                )
    finally:
        ranks.close()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
