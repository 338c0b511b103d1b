"""PeriodicEviction: every n steps, at a size, and spread over steps with bitwise continuation after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recis_hybrid.embedding import Capacity, Unused
from recis_hybrid.pipelines import Callback, PeriodicCheckpoint, PeriodicEviction, Run, Train, Trainer
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Saver
from tests.support.small import Model, Records, make_batches, make_step, state_of

BATCHES: list[Batch] = [
    {"id": ids, "label": (ids % 2).float()}
    for ids in (torch.arange(first, first + 90) for first in [*range(0, 780, 60), *[0] * 23])
]
"""New ids in 13 steps, and then only the first ones."""


class Rows(Callback):
    """The number of rows after each step, and what the log says of them."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.logged: list[dict[str, Any]] = []

    def after_step(self, trainer: Run) -> None:
        self.rows.append(len(trainer.engines[0].tables[0]))

    def on_log(self, trainer: Run, record: dict[str, Any]) -> None:
        if record["event"] == "train":
            self.logged.append(record)


def sizes(**arguments: Any) -> tuple[list[int], list[int]]:
    """Return the rows after each of six steps with 20 new ids each, and the rows of each eviction."""
    step, records, rows = make_step(), Records(), Rows()
    batches = make_batches(6)
    for number, batch in enumerate(batches):
        batch["id"] = torch.arange(len(batch["id"])) + 1000 * number  # type: ignore[arg-type]
    n = len(batches[0]["id"])  # type: ignore[arg-type]
    eviction = PeriodicEviction(**{"rule": Capacity(rows=n), **arguments})
    Trainer(step, batches, callbacks=[eviction, rows, records]).fit([Train()])
    return [count // n for count in rows.rows], [int(record["evicted"]) // n for record in records.of("evict")]


def spread(rule: Any = None) -> PeriodicEviction:
    return PeriodicEviction(rule or Unused(steps=3), steps=8, rows_per_step=100, compact=True)


def test_rows_are_evicted_every_n_steps() -> None:
    assert sizes(steps=2) == ([1, 1, 2, 1, 2, 1], [1, 2, 2])
    assert sizes(steps=4, rule={"id": Unused(steps=1)}, compact=True) == ([1, 2, 3, 1, 2, 3], [3])


def test_rows_are_evicted_at_a_size() -> None:
    n = len(make_batches(1)[0]["id"])  # type: ignore[arg-type]
    record = make_step().engines[0].tables[0].layout.record_bytes
    for size in ({"rows": 3 * n}, {"bytes": 3 * n * record}, {"rows": 2 * n, "bytes": 3 * n * record}):
        assert sizes(steps=1, **size) == ([1, 2, 1, 2, 1, 2], [2, 2])
    assert sizes(steps=1, rows=7 * n) == ([1, 2, 3, 4, 5, 6], [])


def test_a_spread_eviction_begins_at_a_size() -> None:
    n = len(make_batches(1)[0]["id"])  # type: ignore[arg-type]
    arguments: dict[str, Any] = {"steps": 1, "rule": Unused(steps=1), "rows_per_step": 100 * n}
    # It begins before the step that follows the one in which the table reached the size.
    assert sizes(rows=3 * n, **arguments) == ([1, 2, 3, 1 + 1, 3, 1 + 1], [])
    assert sizes(rows=7 * n, **arguments) == ([1, 2, 3, 4, 5, 6], [])


def test_each_step_evicts_few_rows() -> None:
    rows, step = Rows(), make_step()
    Trainer(step, BATCHES, callbacks=[spread(), rows], log_every=1).fit([Train()])
    evicted = [record["evicted"] for record in rows.logged]
    assert evicted[:8] == [0] * 8
    # In shares of 100 rows on average, of which most have not been seen for three steps.
    assert all(0 < n < 160 for n in evicted[8:12])
    assert sum(evicted) >= 13 * 60 + 30 - 90
    before = [0, *rows.rows]
    for n, now, erased, record in zip(before, rows.rows, evicted, rows.logged, strict=False):
        assert record["admitted"] == now - n + erased >= 0
    assert isinstance(step.model, Model)
    table = step.model.engine.tables[0]
    assert len(table) == 90
    # While the table is being compacted, there is a free row for each id of a batch.
    assert table.store.id_map.row_bound <= 90 + 90


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("rule", "steps"),
    # The second one ends before the next eviction, which would hide that another number of rows was kept.
    [(Unused(steps=3), None), ({"id": Capacity(rows=200, by="lfu", half_life=2.5)}, 16)],
    ids=["unused", "capacity"],
)
def test_a_restart_within_an_eviction_is_bitwise(tmp_path: Path, first: bool, rule: Any, steps: int | None) -> None:
    whole = make_step()
    Trainer(whole, BATCHES, callbacks=[spread(rule)]).fit([Train(max_steps=steps)])

    def callbacks() -> list[Callback]:
        saves = PeriodicCheckpoint(steps=5)
        return [spread(rule), saves] if first else [saves, spread(rule)]

    saver = Saver(tmp_path)
    Trainer(make_step(), BATCHES, saver=saver, callbacks=callbacks()).fit([Train(max_steps=10)])
    resumed = make_step()
    Trainer(resumed, BATCHES, saver=saver, callbacks=callbacks()).fit([Train(max_steps=steps)], resume=10)
    expected, got = state_of(whole), state_of(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_bad_arguments_are_refused() -> None:
    for arguments, error, message in (
        ({"rule": 3}, TypeError, r"Evict: rule must be a function of rows or have a method unwanted\(rows\)"),
        ({"steps": 0}, ValueError, "PeriodicEviction: steps must be at least 1, got 0"),
        ({"rows": 0}, ValueError, "PeriodicEviction: rows must be at least 1, got 0"),
        ({"rows_per_step": 0}, ValueError, "PeriodicEviction: rows_per_step must be at least 1, got 0"),
        ({"compact": 1}, TypeError, "PeriodicEviction: compact must be True or False, got 1"),
    ):
        with pytest.raises(error, match=message):
            PeriodicEviction(**{"rule": Unused(1), "steps": 1, **arguments})  # type: ignore[arg-type]
    callback = PeriodicEviction({"user": Unused(3)}, steps=1, rows_per_step=1)
    with pytest.raises(Exception, match=r"there are no tables \['user'\]; the tables are \['id'\]"):
        Trainer(make_step(), BATCHES, callbacks=[callback]).fit([Train()])
