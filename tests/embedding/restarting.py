"""Training on several ranks that saves every few steps and resumes from the latest checkpoint.

    torchrun --nproc-per-node 2 --max-restarts 1 -m tests.embedding.restarting FOLDER STEPS [--die-after 7]

``--die-after`` makes the last rank kill itself after that step, but only once. Each rank writes its rows and the tower
to FOLDER/end.<rank>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.saver import Saver
from tests.support import sharded

SAMPLES, SAVE_EVERY, DIM = 24, 3, 18


def train(
    group: dist.ProcessGroup,
    folder: str,
    steps: int,
    save_group: dist.ProcessGroup | None = None,
    die_after: int | None = None,
    sharding: str = "row",
) -> dict[str, Any]:
    """Train up to a step, starting from the latest checkpoint if there is one."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    engine = EmbeddingEngine(
        sharded.configs(sharding, DIM), optimizer=sharded.OPTIMIZERS["Adagrad"], seed=3, group=group
    )
    width = sum(config.width for config in engine.configs.values()) + engine.configs["each"].dim
    model = sharded.Model(engine, width)
    sparse = optim.Adagrad(engine.parameters(), lr=0.1)
    dense = torch.optim.SGD(model.tower.parameters(), lr=0.1, momentum=0.9)
    saver = Saver(folder, group=save_group)
    parts = {"engine": engine, "tower": model.tower, "sparse": sparse, "dense": dense}
    first_step = 0 if saver.latest() is None else saver.load(parts)
    cuts = sharded.shares(SAMPLES, ranks, False)
    for step in range(first_step, steps):
        batch = sharded.part_of(sharded.global_batch(step, SAMPLES), cuts[rank], cuts[rank + 1])
        sparse.zero_grad()
        dense.zero_grad()
        (model(batch) - batch["label"]).square().mean().backward()
        for parameter in model.tower.parameters():
            assert parameter.grad is not None
            gradient = parameter.grad * (cuts[rank + 1] - cuts[rank]) / SAMPLES
            dist.all_reduce(gradient, group=group)
            parameter.grad = gradient
        sparse.step()
        dense.step()
        if step + 1 == die_after and rank == ranks - 1:
            marker = Path(folder, "died")
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % SAVE_EVERY == 0:
            saver.save(step + 1, parts)
    return {
        "losses": [],
        "tables": sharded.rows_of(engine),
        "predictions": sharded.predictions(model, rank, ranks),
        "tower": model.tower.weight.detach(),
        "first_step": first_step,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--die-after", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    found = train(group, args.folder, args.steps, die_after=args.die_after)
    listed = {
        **found,
        "predictions": found["predictions"].tolist(),
        "tower": found["tower"].tolist(),
        "tables": {
            name: {column: values.tolist() for column, values in columns.items()}
            for name, columns in found["tables"].items()
        },
    }
    Path(args.folder, f"end.{dist.get_rank()}.json").write_text(json.dumps(listed))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
