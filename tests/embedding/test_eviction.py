"""Eviction rules against models in Python; on one process, over ranks, and after a restart."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import (
    Capacity,
    Constant,
    EmbeddingConfig,
    EmbeddingEngine,
    Rows,
    SmallNorm,
    Unused,
    UnusedFor,
)
from recis_hybrid.embedding.eviction import SharedRows, StepTimes, _nth_lowest
from recis_hybrid.saver import Saver
from tests.support.devices import EDGE_IDS, accelerators, on_devices
from tests.support.rank_processes import Ranks


def trained(steps: int, device: str = "cpu", **more: Any) -> EmbeddingEngine:
    """Return an engine of three tables, two of them in one logical table, whose rows differ in age and frequency."""
    configs = {name: EmbeddingConfig(dim=dim) for name, dim in (("a", 2), ("b", 2), ("c", 4))}
    engine = EmbeddingEngine(configs, optimizer=optim.Adagrad, device=device, **more)
    optimizer, generator = engine.make_optimizer(lr=0.1), torch.Generator().manual_seed(3)
    pool = torch.cat([torch.tensor(EDGE_IDS), torch.randint(-(2**63), 2**63 - 1, (30,), generator=generator)])
    for _ in range(steps):
        batch = {name: pool[(torch.rand(20, generator=generator) ** 2 * len(pool)).long()] for name in configs}
        sum(value.sum() for value in engine({k: v.to(device) for k, v in batch.items()}).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    return engine


def metadata(engine: EmbeddingEngine) -> dict[str, dict[int, tuple[int, int]]]:
    """Return for each table and id the step of the last lookup, and the frequency."""
    found = {}
    for table in engine.tables:
        for number, member in enumerate(table.members):
            rows = table.export(number)
            columns = (rows["seen_step"].tolist(), rows["frequency"].tolist())
            found[member.name] = dict(zip(rows["ids"].tolist(), zip(*columns, strict=True), strict=True))
    return found


@pytest.mark.parametrize(
    ("rule", "device"),
    [
        (Capacity(rows=7), "cpu"),
        (Capacity(rows=0), "cpu"),
        (Capacity(rows=10, by="lfu"), "cpu"),
        (Capacity(rows=10, by="lfu", half_life=1.5), "cpu"),
        (Capacity(rows=1000), "cpu"),
        *(pytest.param(Capacity(rows=10, by="lfu"), *each.values, marks=each.marks) for each in accelerators),
    ],
)
def test_the_most_used_rows_of_each_table_remain(device: str, rule: Capacity) -> None:
    engine = trained(5, device)
    before, step = metadata(engine), engine.tables[0].step

    def score(seen: int, frequency: int) -> float:
        if rule.by == "lru":
            return seen
        return (frequency + 1) * (1.0 if rule.half_life is None else 0.5 ** ((step - seen) / rule.half_life))

    assert rule.rows is not None
    expected, ties = {}, 0
    for name, rows in before.items():
        ranked = sorted(rows, key=lambda i: (round(score(*rows[i]), 9), i), reverse=True)
        expected[name] = sorted(ranked[: rule.rows])
        ties += len({round(score(*rows[i]), 9) for i in ranked[rule.rows - 1 : rule.rows + 1]}) == 1
    evicted = engine.evict(rule)
    assert {name: sorted(rows) for name, rows in metadata(engine).items()} == expected
    assert evicted == sum(map(len, before.values())) - sum(map(len, expected.values()))
    assert ties or rule.rows in (0, 1000) or rule.half_life is not None


@on_devices
@pytest.mark.parametrize("half_life", [3.0, 2.5, 1e6])
def test_equal_scores_of_different_frequencies_tie(device: str, half_life: float) -> None:
    # (frequency + 1) * 2 ** (seen_step / half_life) is 2 ** 12 * odd * 2 ** (100 / half_life) for all pairs of an odd.
    for odd in (7, 1_234_567):
        doublings = range(0, 13, 2)  # so that 2.5 yields whole steps
        frequency = [(odd << 12 - k) - 1 for k in doublings]
        seen = [100 + int(k * half_life) for k in doublings]
        more, newer = [*frequency, frequency[0] + 1, frequency[-1]], [*seen, seen[0], seen[-1] + 1]
        rows = Rows(
            "t",
            ids=torch.tensor([40, 10, 70, 20, 60, 30, 50, 80, 90], device=device),
            updated_step=torch.zeros(9, dtype=torch.int64, device=device),
            seen_step=torch.tensor(newer, device=device),
            frequency=torch.tensor(more, device=device),
            step=max(newer),
        )
        for kept in (2, 4, 8):
            unwanted = Capacity(rows=kept, by="lfu", half_life=half_life).unwanted(rows)
            left = set(rows.ids[~unwanted].tolist())
            assert len(left) == kept
            # The two higher scores remain first, and then the greatest ids.
            assert left - {80, 90} == set(range(10, 80, 10)[7 - max(kept - 2, 0) :])


def test_a_capacity_in_bytes_counts_whole_records() -> None:
    engine = trained(3)
    record = engine.tables[0].layout.record_bytes
    engine.evict({"a": Capacity(bytes=5 * record + record - 1), "b": Capacity(rows=3)})
    left = metadata(engine)
    assert (len(left["a"]), len(left["b"])) == (5, 3)
    assert len(left["c"]) > 5


def test_the_nth_lowest_number_is_found() -> None:
    random.seed(1)
    for numbers in ([5], [0, 0, 0], [*EDGE_IDS, *EDGE_IDS[:3]], [random.randrange(-(2**63), 2**63) for _ in range(50)]):
        ordered = sorted(numbers)
        for n in {1, len(numbers), *range(1, len(numbers), 9)}:
            number, ties = _nth_lowest(torch.tensor(numbers), n, SharedRows())
            assert number == ordered[n - 1]
            assert ties == n - sum(other < number for other in numbers)


class Clock:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "time", lambda: self.now)


def test_rows_are_evicted_after_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, rule = Clock(monkeypatch), {"x": UnusedFor(100.0)}
    engine = EmbeddingEngine({name: EmbeddingConfig(dim=2) for name in ("x", "y")})
    optimizer = optim.SGD(engine.parameters(), lr=0.1)

    def look_up(*ids: int) -> None:
        engine({name: torch.tensor(ids) for name in ("x", "y")})
        optimizer.step()

    look_up(1, 2)
    assert engine.evict(rule) == 0  # at 1000: what came before counts as of now
    clock.now = 1060.0
    look_up(2, 3)
    assert engine.evict(rule) == 0
    clock.now = 1100.0
    look_up(3)
    Saver(tmp_path).save(3, {"engine": engine})
    engine = EmbeddingEngine({name: EmbeddingConfig(dim=2) for name in ("x", "y")})
    Saver(tmp_path).load({"engine": engine})
    optimizer = optim.SGD(engine.parameters(), lr=0.1)
    assert engine.evict(rule) == 1
    assert metadata(engine)["x"].keys() == {2, 3}
    clock.now = 1159.0
    assert engine.evict(rule) == 0
    clock.now = 1160.0
    assert engine.evict(rule) == 1
    clock.now = 900.0  # a clock that is set back evicts nothing
    look_up(4)
    assert engine.evict(rule) == 0
    clock.now = 1e6
    assert engine.evict(rule) == 2
    assert metadata(engine)["y"].keys() == {1, 2, 3, 4}


def test_the_record_of_times_is_bounded() -> None:
    times = StepTimes()
    for step in range(9000):
        times.step_before(step, float(step), 1e9)
    assert len(times.samples) <= 4097
    assert times.samples[-1] == (8999, 8999.0)
    # Samples remain true: the step that is found was done by then, and recent ones are exact.
    assert times.step_before(9000, 9000.0, 100.0) == 8900
    assert times.step_before(9000, 9000.0, 0.5) == 8999


def test_a_rule_may_ask_for_several_ages() -> None:
    times = StepTimes()
    for step in range(300):
        now = 10.0 * step
        assert times.step_before(step, now, 20.0) == max(step - 2, -1)
        assert times.step_before(step, now, 700.0) == max(step - 70, -1)
    assert len(times.samples) <= 71  # older ones are not needed


@on_devices
def test_rows_with_small_norms_are_evicted(device: str) -> None:
    engine = EmbeddingEngine({"x": EmbeddingConfig(dim=3, initializer=Constant(0.0))}, device=device)
    table = engine.tables[0]
    rows = torch.tensor([[3.0, 0, 4], [0.6, 0, 0.8], [1e-4, 1e-4, 0], [0, 0, 0]])
    table.insert(0, torch.tensor([5, 6, 7, 8]), {"embedding": rows})
    norms: dict[int, float] = {}

    def read(found: Rows) -> Tensor:
        norms.update(zip(found.ids.tolist(), found.norms().tolist(), strict=True))
        return found.norms() > 4

    assert engine.evict(read) == 1
    assert norms == {5: 5.0, 6: pytest.approx(1.0), 7: pytest.approx(math.sqrt(2e-8), rel=1e-5), 8: 0.0}
    assert engine.evict(SmallNorm(1e-3)) == 2
    assert table.ids(0).tolist() == [6]


def test_a_function_sees_each_table_alone() -> None:
    engine = trained(4)
    before, calls = metadata(engine), {}

    def odd_ones(rows: Rows) -> Tensor:
        columns = (rows.seen_step.tolist(), rows.frequency.tolist())
        calls[rows.table] = dict(zip(rows.ids.tolist(), zip(*columns, strict=True), strict=True))
        assert (rows.step, rows.row_bytes) == (4, engine.tables[rows.table == "c"].layout.record_bytes)
        return (rows.ids % 2 != 0) & (rows.table != "b")

    engine.evict(odd_ones)
    assert calls == before
    left = {name: sorted(i for i in rows if i % 2 == 0 or name == "b") for name, rows in before.items()}
    assert {name: sorted(rows) for name, rows in metadata(engine).items()} == left


def on_ranks(group: dist.ProcessGroup, sharding: Any, rules: list[Any]) -> list[dict[str, list[int]]]:
    """Return the ids that are left on any rank after each rule."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    configs = {name: EmbeddingConfig(dim=8, sharding=sharding) for name in ("a", "b")}
    engine = EmbeddingEngine(configs, optimizer=optim.Adagrad, group=group)
    optimizer, generator, found = engine.make_optimizer(lr=0.1), torch.Generator().manual_seed(1), []
    for step in range(6):
        batch = {name: (torch.rand(24, generator=generator) ** 2 * 40).long() - 20 for name in configs}
        values = engine({name: ids.chunk(world)[rank] for name, ids in batch.items()})
        sum(value.square().sum() * (step + 1) for value in values.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    for rule in rules:
        engine.evict(rule)
        own = {m.name: t.ids(k).tolist() for t in engine.tables for k, m in enumerate(t.members)}
        rows: list[dict[str, list[int]]] = [{} for _ in range(world)]
        dist.all_gather_object(rows, own, group=group)
        if sharding in ("replicated", "column"):
            assert all(each == own for each in rows)
        found.append({name: sorted({i for each in rows for i in each[name]}) for name in configs})
    return found


def test_ranks_select_the_same_rows_as_one_process(ranks: Ranks) -> None:
    rules = [
        Capacity(rows=20),
        {"a": Capacity(rows=17, by="lfu", half_life=2.0), "b": UnusedFor(1e6)},
        SmallNorm(0.02),
        Unused(steps=1),
        Capacity(rows=5, by="lfu"),
    ]
    expected = ranks.run(1, on_ranks, "row", rules)
    sizes = [len(each["a"]) + len(each["b"]) for each in expected[0]]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(rules)
    for sharding in ("row", "table", "replicated", "column"):
        assert ranks.run(2, on_ranks, sharding, rules) == expected * 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Capacity(), ValueError, "Capacity: pass either rows or bytes, got rows=None, bytes=None"),
        (lambda: Capacity(rows=-1), ValueError, "Capacity: rows must be at least 0, got -1"),
        (lambda: Capacity(rows=5, by="fifo"), ValueError, "Capacity: by must be one of 'lru', 'lfu', got 'fifo'"),  # type: ignore[arg-type]
        (lambda: Capacity(rows=5, half_life=3), ValueError, "half_life is for by='lfu' .* got by='lru', half_life=3"),
        (lambda: UnusedFor(0), ValueError, "UnusedFor: seconds must be above 0, got 0"),
        (lambda: SmallNorm(math.nan), ValueError, "SmallNorm: norm must be above 0, got nan"),
    ],
)
def test_bad_rules_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@on_devices
@pytest.mark.parametrize("by", ["lru", "lfu"])
def test_a_capacity_in_parts_erases_the_rows_ranked_lowest_at_its_beginning(device: str, by: Any) -> None:
    """New rows, rows that were seen again, and a growing table in between do not change which ones."""
    rule = Capacity(rows=12, by=by)
    whole, engine = trained(6, device), trained(6, device)
    before = metadata(whole)
    assert before == metadata(engine)
    whole.evict(rule)
    gone = {name: rows.keys() - metadata(whole)[name].keys() for name, rows in before.items()}
    assert all(len(ids) > 5 for ids in gone.values())
    sweep, optimizer = engine.evict(rule, rows_per_call=16), engine.make_optimizer(lr=0.1)
    evicted = next(sweep)
    # Of the rows to erase, one that the first call has not erased.
    seen_again = {name: next(i for i in metadata(engine)[name] if i in ids) for name, ids in gone.items()}
    new = range(10**6, 10**6 + 700)
    batch = {name: torch.tensor([i, *new], device=device) for name, i in seen_again.items()}
    sum(value.sum() for value in engine(batch).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    evicted += sum(sweep)
    assert sweep.done == sweep.calls > 3
    after = metadata(engine)
    for name, ids in gone.items():
        assert after[name].keys() == (before[name].keys() - ids) | {seen_again[name]} | set(new)
    assert evicted == sum(map(len, gone.values())) - 3
