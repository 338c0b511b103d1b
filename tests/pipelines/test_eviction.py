"""Eviction within a training stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recis_hybrid.embedding import Capacity, Unused
from recis_hybrid.pipelines import PeriodicEviction, Train, Trainer
from tests.support.small import Records, make_batches, make_step


def sizes(**arguments: Any) -> tuple[list[int], list[int]]:
    """Return the rows after each of six steps with 20 new ids each, and the rows of each eviction."""
    step, records, rows = make_step(), Records(), []
    batches = make_batches(6)
    for number, batch in enumerate(batches):
        batch["id"] = torch.arange(len(batch["id"])) + 1000 * number  # type: ignore[arg-type]
    n = len(batches[0]["id"])  # type: ignore[arg-type]
    eviction = PeriodicEviction(**{"rule": Capacity(rows=n), **arguments})
    after_step = eviction.after_step

    def after(trainer: Any) -> None:
        after_step(trainer)
        rows.append(len(trainer.engines[0].tables[0]) // n)

    eviction.after_step = after  # type: ignore[method-assign]
    Trainer(step, batches, callbacks=[eviction, records]).fit([Train()])
    return rows, [int(record["evicted"]) // n for record in records.of("evict")]


def test_rows_are_evicted_every_n_steps() -> None:
    assert sizes(steps=2) == ([1, 1, 2, 1, 2, 1], [1, 2, 2])
    assert sizes(steps=4, rule={"id": Unused(steps=1)}, compact=True) == ([1, 2, 3, 1, 2, 3], [3])


def test_rows_are_evicted_at_a_size() -> None:
    n = len(make_batches(1)[0]["id"])  # type: ignore[arg-type]
    record = make_step().engines[0].tables[0].layout.record_bytes
    for size in ({"rows": 3 * n}, {"bytes": 3 * n * record}, {"rows": 2 * n, "bytes": 3 * n * record}):
        assert sizes(steps=1, **size) == ([1, 2, 1, 2, 1, 2], [2, 2])
    assert sizes(steps=1, rows=7 * n) == ([1, 2, 3, 4, 5, 6], [])


def test_bad_arguments_are_refused() -> None:
    for arguments, error, message in (
        (
            {"rule": 3, "steps": 1},
            TypeError,
            r"Evict: rule must be a function of rows or have a method unwanted\(rows\)",
        ),
        ({"rule": Unused(1), "steps": 0}, ValueError, "PeriodicEviction: steps must be at least 1, got 0"),
        ({"rule": Unused(1), "steps": 1, "rows": 0}, ValueError, "PeriodicEviction: rows must be at least 1, got 0"),
        ({"rule": Unused(1), "steps": 1, "compact": 1}, TypeError, "compact must be True or False, got 1"),
    ):
        with pytest.raises(error, match=message):
            PeriodicEviction(**arguments)  # type: ignore[arg-type]
