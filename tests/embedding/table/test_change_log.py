from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, HashTable, MinFrequency
from recis_hybrid.embedding.table import change_log
from recis_hybrid.embedding.table.change_log import _FEW, ChangeLog, _DistinctIds, changed_admission
from tests.support.devices import EDGE_IDS, on_devices
from tests.support.tables import feature, make_table


def touched(table: HashTable, step: int) -> tuple[Tensor, Tensor]:
    table.record_lookup()
    return table.store.touched(step)


@on_devices
def test_lookups_and_updates_touch_rows(device: str) -> None:
    table = make_table(members=2, device=device)
    table.lookup([feature(EDGE_IDS, device=device), feature([5, 6], member=1, device=device)], train=True)
    table.step = 3
    lookup = table.lookup([feature([0, -1], device=device), feature([6, 7], member=1, device=device)], train=True)
    table.lookup([feature([1], device=device)], train=False)
    assert lookup.step == 4
    ids, members = touched(table, 3)
    assert sorted(zip(members.tolist(), ids.tolist(), strict=True)) == [(0, -1), (0, 0), (1, 6), (1, 7)]
    assert touched(table, 4)[0].numel() == 0
    assert touched(table, 0)[0].numel() == len(EDGE_IDS) + 3
    # An update also marks rows of an earlier lookup.
    table.step = 9
    table.insert(
        0,
        torch.tensor([1], device=device),
        {
            "embedding": torch.zeros(1, 4, device=device),
            **{
                name: torch.tensor([n], device=device)
                for n, name in enumerate(("seen_step", "frequency", "updated_step"))
            },
        },
    )
    assert [part.tolist() for part in touched(table, 4)] == [[], []]
    rows = table.rows(0, torch.tensor([1], device=device))
    assert rows.tolist()[0] >= 0


@on_devices
def test_changed_rows_by_member_table(device: str) -> None:
    engine = EmbeddingEngine(dict.fromkeys("ab", EmbeddingConfig(dim=2)), optimizer=optim.SGD, device=device)
    ids = torch.arange(6, device=device)
    engine({"a": ids, "b": ids})
    optim.SGD(engine.parameters(), lr=1.0).step()
    (table,) = engine.tables
    since = table.watch()
    assert table.watches(since)
    table.erase(0, torch.tensor([2, 50], device=device))
    table.insert(0, torch.tensor([3, 60], device=device))
    engine({"a": ids[4:5], "b": ids[:0]})
    (a, gone), (b, none) = table.changed_rows(since)
    assert sorted(a["ids"].tolist()) == [3, 4, 60]
    assert gone is not None
    assert gone.tolist() == [2, 50]
    assert b["ids"].numel() == 0
    assert none is not None
    assert none.numel() == 0
    table.clear(1)
    assert table.changed_rows(since)[1][1] is None
    assert not make_table().watches(since)


def test_duplicates_are_removed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    remove = _DistinctIds._remove_duplicates

    def watched(ids: _DistinctIds, number: int) -> None:
        removed.append(int(ids._sizes[number]))
        remove(ids, number)

    monkeypatch.setattr(_DistinctIds, "_remove_duplicates", watched)
    monkeypatch.setattr(change_log, "_MOST_ADDED", 1000)
    ids, generator = torch.randperm(400_000), torch.Generator().manual_seed(1)
    changes, most, size = ChangeLog(0, {}), 0, 0
    for part in ids.split(1000):
        again = ids[torch.randint(0, 400_000, (100,), generator=generator)]
        removed.clear()
        changes.note(0, torch.cat([part, again]), rows=10**9)
        size = max([size, *removed])
        most = max(most, sum(removed))
    assert size < 3 * 440_000 / change_log._PARTS
    assert 0 < most < 3 * 1100 + size
    assert changes.ids(0).equal(ids.sort().values)


def test_logged_ids_are_bounded() -> None:
    changes = ChangeLog(0, {})
    for begin in range(0, 40 * _FEW, _FEW):
        changes.note(0, torch.arange(begin, begin + _FEW) % (3 * _FEW), rows=10 * _FEW)
        logged = changes._ids[0]
        assert logged._added_size + logged._sizes.sum() <= 2 * 2.5 * 3 * _FEW + _FEW
    assert changes.ids(0).tolist() == list(range(3 * _FEW))
    changes.note(0, torch.arange(100 * _FEW), rows=10 * _FEW)
    assert changes.whole == {0}
    changes.note(0, torch.tensor([1]), rows=10)
    assert changes.ids(0).numel() == 0


@pytest.mark.parametrize(
    ("before", "now", "changed", "gone"),
    [
        ({}, {}, {}, []),
        ({}, {1: 1}, {1: 1}, []),
        ({1: 1}, {}, {}, [1]),
        ({1: 1, 5: 2, 9: 3}, {1: 1, 5: 3, 7: 1}, {5: 3, 7: 1}, [9]),
        ({-1: 1, 2**63 - 1: 2}, {-(2**63): 1, 2**63 - 1: 2}, {-(2**63): 1}, [-1]),
    ],
)
def test_changes_of_admission(
    before: dict[int, int], now: dict[int, int], changed: dict[int, int], gone: list[int]
) -> None:
    def columns(counts: dict[int, int]) -> dict[str, torch.Tensor]:
        return {
            "ids": torch.tensor(sorted(counts), dtype=torch.int64),
            "count": torch.tensor([counts[i] for i in sorted(counts)], dtype=torch.int64),
        }

    found, missing = changed_admission(columns(before), columns(now))
    assert dict(zip(found["ids"].tolist(), found["count"].tolist(), strict=True)) == changed
    assert missing.tolist() == gone


def test_a_watch_copies_counts() -> None:
    engine = EmbeddingEngine({"a": EmbeddingConfig(dim=2, admission=MinFrequency(3))})
    (table,) = engine.tables
    engine({"a": torch.tensor([4])})
    since = table.watch()
    engine({"a": torch.tensor([4])})
    assert since.admission[0]["count"].tolist() == [1]
