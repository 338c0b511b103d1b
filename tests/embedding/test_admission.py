"""Admission: exact and approximate counts and their ageing, chance, and functions of the user."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import optim
from recis_hybrid.embedding import (
    AdmitIf,
    EmbeddingConfig,
    EmbeddingEngine,
    MinFrequency,
    NewIds,
    Probability,
    plan,
)
from recis_hybrid.embedding.admission.sketch import LEAST_BYTES
from recis_hybrid.saver import Saver
from tests.support.devices import EDGE_IDS, on_devices
from tests.support.rank_processes import Ranks

SKETCH = MinFrequency(3, half_life=4, sketch_bytes=LEAST_BYTES)


def engine_of(admission: Any, device: str = "cpu", **more: Any) -> EmbeddingEngine:
    return EmbeddingEngine(
        {name: EmbeddingConfig(dim=2, admission=admission) for name in ("a", "b")}, device=device, **more
    )


def stream(seed: int, steps: int, n: int = 60, kinds: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.cat([torch.tensor(EDGE_IDS), torch.randint(-(2**63), 2**63 - 1, (kinds,), generator=generator)])

    def ids() -> Tensor:
        return pool[(torch.rand(n, generator=generator) ** 2 * len(pool)).long()]

    return [{"a": ids(), "b": ids()} for _ in range(steps)]


def rows_of(engine: EmbeddingEngine) -> dict[str, list[int]]:
    return {m.name: t.ids(k).tolist() for t in engine.tables for k, m in enumerate(t.members)}


def train(engine: EmbeddingEngine, batches: list[dict[str, Tensor]]) -> list[dict[str, list[int]]]:
    optimizer, found = optim.SGD(engine.parameters(), lr=0.1), []
    for batch in batches:
        sum(value.sum() for value in engine({k: v.to(engine.device) for k, v in batch.items()}).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        found.append(rows_of(engine))
    return found


@on_devices
@pytest.mark.parametrize("half_life", [None, 1, 3])
def test_exact_counts_age(device: str, half_life: int | None) -> None:
    batches = stream(1, 7)
    found = train(engine_of(MinFrequency(5, half_life=half_life), device), batches)
    counts: dict[str, Counter[int]] = {"a": Counter(), "b": Counter()}
    admitted: dict[str, set[int]] = {"a": set(), "b": set()}
    for step, (batch, rows) in enumerate(zip(batches, found, strict=True)):
        for name, ids in batch.items():
            if half_life is not None and step and step % half_life == 0:
                counts[name] = Counter({i: n // 2 for i, n in counts[name].items()})
            counts[name].update(i for i in ids.tolist() if i not in admitted[name])
            admitted[name] |= {i for i, n in counts[name].items() if n >= 5}
        assert rows == {name: sorted(ids) for name, ids in admitted.items()}


@on_devices
def test_exact_counts_shrink_as_they_age(device: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, admission=MinFrequency(2, half_life=1))}, device=device)
    optimizer = optim.SGD(engine.parameters(), lr=0.1)
    empty = engine.memory()["admission"]
    engine({"id": torch.arange(6000, device=device)})
    full = engine.memory()["admission"]
    optimizer.step()
    engine({"id": torch.tensor([1, 3, 3, 5], device=device)})
    assert engine.memory()["admission"] <= empty < full // 4
    gate = engine.tables[0].store.gate
    assert gate is not None
    assert gate.state_dict(0)["ids"].tolist() == [1, 5]
    assert engine.tables[0].ids(0).tolist() == [3]


@on_devices
def test_no_id_waits_longer_for_a_sketch_than_for_exact_counts(device: str) -> None:
    # Far more ids than cells, so that most counts are too high.
    batches = [{"a": torch.randint(0, 3000, (2000,)) << 44, "b": torch.arange(5)} for _ in range(4)]
    sketched, exact = (
        train(engine_of(rule, device), batches) for rule in (SKETCH, MinFrequency(SKETCH.count, half_life=4))
    )
    for ours, theirs in zip(sketched, exact, strict=True):
        assert set(ours["a"]) >= set(theirs["a"])
        assert ours["b"] == theirs["b"]


@pytest.mark.parametrize("size", [LEAST_BYTES, 1 << 22])
def test_the_rate_of_false_positives_is_the_stated_one(size: int) -> None:
    # As many tables as it takes for 40,000 ids to be asked for, each table with ids of its own.
    rule, tables = MinFrequency(2, sketch_bytes=size), (1 << 22) // size
    counted, asked = 2_000_000 // tables, 40_000 // tables
    names = [str(number) for number in range(tables)]
    engine = EmbeddingEngine({name: EmbeddingConfig(dim=4, admission=rule) for name in names})
    (table,) = engine.tables

    def look_up(first: int, end: int) -> None:
        for part in torch.arange(first, end).split((1 << 17) // tables):
            engine({name: part + number * (1 << 40) for number, name in enumerate(names)})

    look_up(0, counted)
    before = len(table)
    look_up(counted, counted + asked)
    # Of the last ids, each also counts those that come with it: half of them on average when it is counted.
    expected = rule.false_positives(counted + asked)
    assert 0.015 < expected < 0.03
    deviation = (expected / (asked * tables)) ** 0.5
    assert abs((len(table) - before) / (asked * tables) - expected) < 5 * deviation
    # The rate over all ids is the integral over the number of ids before.
    mean = sum(rule.false_positives(n) for n in range(0, counted, counted // 20)) / 20
    assert 0.7 * mean < before / (counted * tables) < 1.3 * mean


def test_rates_without_a_sketch_or_ids_are_zero() -> None:
    assert MinFrequency(5).false_positives(10**9) == 0
    assert MinFrequency(1, sketch_bytes=LEAST_BYTES).false_positives(10**9) == 0
    assert MinFrequency(2, sketch_bytes=LEAST_BYTES).false_positives(0) == 0


@pytest.mark.parametrize("admission", [SKETCH, MinFrequency(3, half_life=4), Probability(0.5)])
def test_a_resumed_run_admits_the_same_ids(tmp_path: Path, admission: Any) -> None:
    batches = stream(2, 9)
    whole = train(engine_of(admission), batches)
    engine = engine_of(admission)
    train(engine, batches[:5])
    saver = Saver(tmp_path)
    saver.save(5, {"engine": engine})
    resumed = engine_of(admission, coalesce=False)
    saver.load({"engine": resumed})
    assert train(resumed, batches[5:]) == whole[5:]


def test_changes_of_a_sketch_are_saved_alone(tmp_path: Path) -> None:
    engine, saver = engine_of(SKETCH), Saver(tmp_path)
    for step, batch in enumerate(stream(3, 6, n=12)):
        train(engine, [batch])
        saver.save(step + 1, {"engine": engine}, delta=True)
    loaded = engine_of(SKETCH)
    saver.load({"engine": loaded})
    for ours, theirs in zip(loaded.tables[0].admission_states(), engine.tables[0].admission_states(), strict=True):
        assert {name: values.tolist() for name, values in ours.items()} == {
            name: values.tolist() for name, values in theirs.items()
        }
    assert ours["ids"].numel() > 0


@pytest.mark.parametrize(("before", "after"), [(1, 4), (64, 256), (256, 64), (1, 128), (128, 1), (2, 2)])
def test_a_sketch_of_another_size_loses_no_count(tmp_path: Path, before: int, after: int) -> None:
    first, later = stream(4, 2, kinds=3000, n=3000), stream(5, 2)
    small = engine_of(MinFrequency(200, sketch_bytes=before * LEAST_BYTES))
    train(small, [*first, *later])
    saver = Saver(tmp_path)
    saver.save(1, {"engine": small})
    other = engine_of(MinFrequency(200, sketch_bytes=after * LEAST_BYTES))
    saver.load({"engine": other})
    exact: dict[str, Counter[int]] = {name: Counter() for name in ("a", "b")}
    for batch in [*first, *later]:
        for name, ids in batch.items():
            exact[name].update(ids.tolist())
    for name, counts in exact.items():
        for i, count in list(counts.items())[:40]:
            if count < 200:
                other({k: torch.full((200 - count if k == name else 0,), i) for k in ("a", "b")})
                assert i in rows_of(other)[name]


def test_the_state_of_another_rule_is_dropped_with_a_warning(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    engine = engine_of(MinFrequency(3))
    train(engine, stream(6, 1))
    saver.save(1, {"engine": engine})
    other = engine_of(SKETCH)
    with pytest.warns(UserWarning, match=r"table 'a.admission' has the state of another admission rule"):
        saver.load({"engine": other})
    assert rows_of(other) == rows_of(engine)
    assert [state["ids"].numel() for state in other.tables[0].admission_states()] == [0, 0]


def test_ids_are_admitted_by_chance() -> None:
    ids = torch.cat([torch.arange(-10_000, 10_000), torch.tensor(EDGE_IDS)]).unique()

    def admitted(rule: Probability) -> set[int]:
        engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, admission=rule)})
        for part in ids.flip(0).split(3000):
            engine({"id": part})
        first = set(rows_of(engine)["id"])
        engine({"id": ids})
        assert set(rows_of(engine)["id"]) == first  # an id keeps its decision
        return first

    some, other, more = admitted(Probability(0.3)), admitted(Probability(0.3, seed=1)), admitted(Probability(0.6))
    n = ids.numel()
    for found, p in ((some, 0.3), (other, 0.3), (more, 0.6), (some & other, 0.09)):
        assert abs(len(found) / n - p) < 5 * (p / n) ** 0.5
    assert some < more
    assert admitted(Probability(1)) == set(ids.tolist())


@on_devices
def test_a_function_gets_distinct_new_ids_of_each_table(device: str) -> None:
    calls: list[tuple[str, list[int], list[int], int]] = []

    def even(new: NewIds) -> Tensor:
        calls.append((new.table, new.ids.tolist(), new.counts.tolist(), new.step))
        return new.ids % 2 == 0

    engine = engine_of(AdmitIf(even), device)
    found = train(
        engine,
        [
            {"a": torch.tensor([4, 3, 4]), "b": torch.tensor([3])},
            {"a": torch.tensor([4, 6, 3]), "b": torch.tensor([8])},
        ],
    )
    assert calls == [("a", [3, 4], [1, 2], 0), ("b", [3], [1], 0), ("a", [3, 6], [1, 1], 1), ("b", [8], [1], 1)]
    assert found == [{"a": [4], "b": []}, {"a": [4, 6], "b": [8]}]
    assert engine.tables[0].admission_states() == []


def test_a_function_must_return_a_decision_for_each_id() -> None:
    engine = engine_of(AdmitIf(lambda new: new.ids[:1] > 0))
    with pytest.raises(
        TypeError, match=r"a bool tensor \[2\] for the 2 new ids of the table 'a', .* got torch.bool \[1\]"
    ):
        engine({"a": torch.tensor([1, 2]), "b": torch.tensor([1])})
    assert len(engine.tables[0]) == 0


def test_an_evicted_id_starts_as_at_first() -> None:
    for rule in (SKETCH, MinFrequency(3, half_life=4)):
        engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, admission=rule)})
        first = engine.eval()({"id": torch.tensor([7])})["id"].tolist()
        optimizer = optim.SGD(engine.train().parameters(), lr=0.1)
        for _ in range(4):
            engine({"id": torch.tensor([7])})["id"].sum().backward()
            optimizer.step()
        assert engine.eval()({"id": torch.tensor([7])})["id"].tolist() != first
        for _ in range(12):  # its count in the sketch fades
            optimizer.step()
            engine.train()({"id": torch.tensor([8])})
        assert engine.evict(lambda rows: rows.ids == 7) == 1
        engine({"id": torch.tensor([7, 7])})
        assert 7 not in rows_of(engine)["id"]
        assert engine({"id": torch.tensor([7])})["id"].tolist() == first


def on_ranks(group: dist.ProcessGroup, admission: Any, sharding: Any, coalesce: bool) -> list[dict[str, list[int]]]:
    """Return the ids with a row on any rank after each step."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    configs = {name: EmbeddingConfig(dim=8, admission=admission, sharding=sharding) for name in ("a", "b")}
    engine = EmbeddingEngine(configs, group=group, coalesce=coalesce)
    optimizer, found = optim.SGD(engine.parameters(), lr=0.1), []
    for batch in stream(7, 6):
        engine({name: ids.chunk(world)[rank] for name, ids in batch.items()})
        optimizer.step()
        rows: list[dict[str, list[int]]] = [{} for _ in range(world)]
        dist.all_gather_object(rows, rows_of(engine), group=group)
        found.append({name: sorted({i for each in rows for i in each[name]}) for name in ("a", "b")})
    return found


@pytest.mark.parametrize("admission", [SKETCH, MinFrequency(3, half_life=2), Probability(0.4)])
def test_admission_depends_neither_on_ranks_nor_on_coalescing(ranks: Ranks, admission: Any) -> None:
    expected = ranks.run(1, on_ranks, admission, "row", True)
    assert len(expected[0][-1]["a"]) > 5
    for sharding, coalesce in (("row", True), ("table", False), ("replicated", True), ("column", True)):
        assert ranks.run(2, on_ranks, admission, sharding, coalesce) == expected * 2


def test_no_id_waits_longer_if_ranks_share_blocks_of_a_sketch(ranks: Ranks) -> None:
    """Three ranks own shares of the 1,024 blocks that are no whole numbers."""
    exact = ranks.run(1, on_ranks, MinFrequency(SKETCH.count, half_life=SKETCH.half_life), "row", True)[0]
    for sketched in ranks.run(3, on_ranks, SKETCH, "row", True):
        for ours, theirs in zip(sketched, exact, strict=True):
            assert all(set(ours[name]) >= set(theirs[name]) for name in theirs)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("admission", [SKETCH, MinFrequency(3), Probability(0.4)])
def test_the_memory_of_admission_is_estimated(admission: Any, ranks: int) -> None:
    configs = {name: EmbeddingConfig(dim=2, admission=admission) for name in ("a", "b")}
    estimates = plan(configs, rows={"a": 10, "b": 10}, samples=4, ranks=ranks)
    if ranks == 1:
        engine = EmbeddingEngine(configs)
        engine({name: torch.arange(4) for name in configs})
        assert estimates[0].memory["admission"] == engine.memory()["admission"]
    elif admission is SKETCH:
        assert sum(each.memory["admission"] for each in estimates) == 2 * LEAST_BYTES


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MinFrequency(3, half_life=0), ValueError, "MinFrequency: half_life must be at least 1, got 0"),
        (lambda: MinFrequency(3, sketch_bytes=1000), ValueError, "sketch_bytes must be at least 65536, got 1000"),
        (lambda: MinFrequency(3, sketch_bytes=5 << 20), ValueError, "sketch_bytes must be a power of two"),
        (
            lambda: MinFrequency(1 << 16, sketch_bytes=1 << 24),
            ValueError,
            "a sketch counts up to 65535, got count=65536",
        ),
        (lambda: Probability(0), ValueError, "p must be above 0 and at most 1, got 0"),
        (lambda: Probability("1"), TypeError, "Probability: p must be a number, got '1'"),  # type: ignore[arg-type]
        (lambda: AdmitIf(3), TypeError, "AdmitIf: function must be a function of NewIds, got 3"),  # type: ignore[arg-type]
    ],
)
def test_bad_rules_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
