"""Optimizers of tables that ranks share."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recis_hybrid import optim
from recis_hybrid.embedding import Constant, EmbeddingConfig, EmbeddingEngine
from tests.optim.test_custom import Momentum
from tests.support import sharded
from tests.support.near import assert_near
from tests.support.rank_processes import Ranks

IDS = [[1, 1, 2], [2, 3, 2]]
"""Ids of each rank."""


def trained(group: dist.ProcessGroup, kind: Any, settings: dict[str, Any], sharding: str) -> dict[int, list[float]]:
    """Return the rows by id after two steps, from ones, whose gradients are the place of an id in its list, from 1."""
    configs = {"id": EmbeddingConfig(dim=8, initializer=Constant(1.0), sharding=sharding)}
    engine = EmbeddingEngine(configs, optimizer=kind, group=group, reduce="sum")
    optimizer = engine.make_optimizer(**settings)
    for _ in range(2):
        ids = torch.tensor(IDS[dist.get_rank(group)])
        gradient = torch.arange(1.0, 4.0).unsqueeze(1).expand(3, 8)
        engine({"id": ids})["id"].backward(gradient.contiguous())
        optimizer.step()
        optimizer.zero_grad()
    columns = sharded.rows_of(engine)["id"]
    return dict(zip(columns["ids"].tolist(), columns["embedding"].tolist(), strict=True))


def run(ranks: Ranks, kind: Any, settings: dict[str, Any], sharding: str) -> dict[int, list[float]]:
    return {key: row for rows in ranks.run(2, trained, kind, settings, sharding) for key, row in rows.items()}


@pytest.mark.parametrize("sharding", ["row", "column", "replicated"])
def test_squares_of_the_ranks_gradients_are_added(ranks: Ranks, sharding: str) -> None:
    found = run(ranks, optim.AdagradSum, {"lr": 0.5, "lr_decay": 1.0, "eps": 0.0}, sharding)
    of_ranks = {1: [3.0], 2: [3.0, 4.0], 3: [2.0]}  # the sum of each rank's gradients
    for key, gradients in of_ranks.items():
        w, total = 1.0, 0.0
        for lr in (0.5, 0.25):
            total += sum(gradient**2 for gradient in gradients)
            w -= lr * sum(gradients) / total**0.5
        assert_near(torch.tensor(found[key]), torch.full((len(found[key]),), w), where=str(key))


def test_a_rule_in_python_updates_shared_rows(ranks: Ranks) -> None:
    found = run(ranks, Momentum, {"lr": 0.5, "momentum": 0.5}, "row")
    for key, gradient in {1: 3.0, 2: 7.0, 3: 2.0}.items():
        assert_near(torch.tensor(found[key]), torch.full((8,), 1 - 0.5 * gradient - 0.5 * 1.5 * gradient))


def refused(group: dist.ProcessGroup, kind: Any, planned: Any) -> str:
    try:
        engine = EmbeddingEngine({"id": EmbeddingConfig(dim=8, sharding="column")}, optimizer=planned, group=group)
        kind(engine.parameters())
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("kind", "planned", "message"),
    [
        (optim.LAMB, optim.LAMB, r"\['exp_avg', 'exp_avg_sq'\] belong to a whole row"),
        (optim.RowwiseAdam, optim.RowwiseAdam, r"\['exp_avg', 'exp_avg_sq'\] belong to a whole row"),
        (optim.LAMB, optim.Adam, "LAMB needs whole rows, but those of the table id are split by column"),
        (Momentum, Momentum, r"\['buffer', 'updates'\] belong to a whole row"),
    ],
)
def test_rows_split_by_column_are_refused(ranks: Ranks, kind: Any, planned: Any, message: str) -> None:
    for text in ranks.run(2, refused, kind, planned):
        assert re.search(message, text), text
