"""Kernels under many schedules of threads, on the emulated device: results do not depend on who goes first."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding import IdMap, MinFrequency
from recis_hybrid.embedding.table.id_map import IdCounts
from recis_hybrid.ops.gather import Bags, RowGroups
from recis_hybrid.ops.update import Gradients
from tests.support.caches import FLOATS, Cached
from tests.support.devices import EDGE_IDS
from tests.support.hashes import id_with_bucket_hash
from tests.support.schedules import Schedule, on_schedules
from tests.support.table_rules import Sketched
from tests.support.tables import feature, gathered, make_table

DEVICE = "emulated"
Key = tuple[int, int]


def some_ids(generator: torch.Generator, kinds: int, n: int) -> Tensor:
    """Return ``n`` ids of ``kinds`` kinds, some of them edge cases."""
    random_ids = torch.randint(-(2**63), 2**63 - 1, (kinds,), generator=generator)
    pool = torch.cat([random_ids, torch.tensor(EDGE_IDS)])[-max(kinds, 1) :]
    return pool[torch.randint(0, len(pool), (n,), generator=generator)]


def small(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


class Model:
    """A dict beside an IDMap."""

    def __init__(self, capacity: int) -> None:
        self.map = IdMap(torch.device(DEVICE), capacity)
        self.rows: dict[Key, int] = {}

    def insert(self, ids: list[Tensor], members: list[int], admitted: Tensor | None = None) -> None:
        total = sum(part.numel() for part in ids)
        keys = [(member, i) for part, member in zip(ids, members, strict=True) for i in part.tolist()]
        found, fresh = self.map.find_or_insert(
            [part.to(DEVICE) for part in ids], members, None if admitted is None else admitted.to(DEVICE)
        )
        new = int(self.map.counters[ops.id_map.FRESH])
        rows, first = found.tolist(), fresh[:new].tolist()
        self.map.commit()
        may = [True] * total if admitted is None else [bool(flag) for flag in admitted.tolist()]
        entered = {key for key, flag in zip(keys, may, strict=True) if flag} - self.rows.keys()
        assert {keys[at] for at in first} == entered
        assert new == len(entered)
        assert len({rows[at] for at in first}) == new
        assert not {rows[at] for at in first} & set(self.rows.values())
        self.rows.update((keys[at], rows[at]) for at in first)
        # Without admission, an id that is new has a row only if another position of it was admitted before.
        for key, row, flag in zip(keys, rows, may, strict=True):
            assert row == self.rows.get(key, -1) or (not flag and row == -1 and key in entered)

    def erase(self, ids: Tensor, member: int) -> None:
        self.map.erase_slots(self.map.slots_of([ids.to(DEVICE)], [member]))
        for i in ids.tolist():
            self.rows.pop((member, i), None)

    def check(self) -> None:
        assert len(self.map) == len(self.rows)
        entries = self.map.entries()
        columns = (entries.members, entries.ids, entries.rows)
        listed = {(m, i): row for m, i, row in zip(*(column.tolist() for column in columns), strict=True)}
        assert listed == self.rows
        for member in {key[0] for key in self.rows}:
            mine = {i: row for (m, i), row in self.rows.items() if m == member}
            absent = [i for i in (1234567, *EDGE_IDS) if i not in mine]
            ids = torch.tensor([*mine, *absent], dtype=torch.int64, device=DEVICE)
            assert self.map.find([ids], [member]).tolist() == [*mine.values(), *[-1] * len(absent)]


@on_schedules(60)
def test_an_id_map_behaves_like_a_dict(schedule: Schedule) -> None:
    with schedule.running() as generator:
        model = Model(capacity=16)
        for _ in range(4):
            # Few ids, each many times, in a map that becomes as full as it may be.
            ids = [some_ids(generator, small(generator, 1, 40), small(generator, 0, 200)) for _ in range(3)]
            members = [0, 1, 0]
            model.map.reserve(len({(m, i) for m, part in zip(members, ids, strict=True) for i in part.tolist()}))
            total = sum(part.numel() for part in ids)
            some = torch.randint(0, 2, (total,), dtype=torch.uint8, generator=generator)
            model.insert(ids, members, some if small(generator, 0, 1) else None)
            model.check()
            erased = torch.cat([ids[0], ids[2], ids[2]])
            model.erase(erased[torch.randperm(len(erased), generator=generator)[: len(erased) // 3]], 0)
            model.check()
        model.map.rehash(len(model.map))
        model.check()


@on_schedules(20)
def test_a_full_map_refuses_ids_and_ends(schedule: Schedule) -> None:
    with schedule.running() as generator:
        id_map = IdMap(torch.device(DEVICE), capacity=16)
        ids = some_ids(generator, 30, 300)
        rows = id_map.find_or_insert([ids.to(DEVICE)], [0])[0].tolist()
        assert int(id_map.counters[ops.id_map.OVERFLOW]) == (ids.unique().numel() > 16)
        by_id = dict(zip(ids.tolist(), rows, strict=True))
        assert [by_id[i] for i in ids.tolist()] == rows
        assert sorted(row for row in by_id.values() if row >= 0) == list(range(min(16, ids.unique().numel())))


@on_schedules(20)
def test_no_count_of_a_sketch_is_lost(schedule: Schedule) -> None:
    """Many ids of few blocks, so that threads add to the same words; some cells reach their highest value."""
    with schedule.running() as generator:
        rule = MinFrequency(small(generator, 1, 40), sketch_bytes=1 << 16)
        model = Sketched(rule, rule.cell_bits)
        words = torch.zeros(2, 1024, 8, dtype=torch.int64, device=DEVICE)
        for _ in range(3):
            kinds, n = small(generator, 1, 60), small(generator, 0, 300)
            low = torch.randint(0, 1 << 24, (kinds,), generator=generator).tolist()
            pool = torch.tensor([id_with_bucket_hash(at % 2 << 54 | x) for at, x in enumerate(low)])
            ids = pool[torch.randint(0, kinds, (n,), generator=generator)]
            counts = torch.randint(1, 4, (n,), generator=generator) if small(generator, 0, 1) else None
            rows = -(ids % 2)  # some have a row
            admitted = torch.empty(n, dtype=torch.uint8, device=DEVICE)
            ops.id_map.sketch_admit(
                words,
                0,
                54,
                rule.cell_bits,
                [ids.to(DEVICE)],
                [1],
                rows.to(DEVICE),
                rule.count,
                admitted,
                counts=None if counts is None else counts.to(DEVICE),
            )
            times = [1] * n if counts is None else counts.tolist()
            waiting = [
                i for i, row, k in zip(ids.tolist(), rows.tolist(), times, strict=True) if row < 0 for _ in range(k)
            ]
            found = model.admitted(waiting)
            assert admitted.tolist() == [
                row >= 0 or i in found for i, row in zip(ids.tolist(), rows.tolist(), strict=True)
            ]
        assert not words[0].any()
        numbers = range(0, 64, rule.cell_bits)
        cells = [
            [word >> at & (1 << rule.cell_bits) - 1 for word in block for at in numbers] for block in words[1].tolist()
        ]
        row = len(cells[0]) // 4
        expected = {at: count for at, count in model.cells.items() if count}
        assert expected == {
            (block, at // row, at % row): count
            for block, part in enumerate(cells)
            for at, count in enumerate(part)
            if count
        }


@on_schedules(20)
def test_ids_are_counted_exactly(schedule: Schedule) -> None:
    with schedule.running() as generator:
        counts = IdCounts(torch.device(DEVICE), capacity=16)
        total: dict[int, int] = {}
        for _ in range(3):
            ids = some_ids(generator, 12, 700)
            rows = torch.randint(-2, 1, (700,), generator=generator)
            counts.count([ids.to(DEVICE)], [3], rows.to(DEVICE))
            for i in ids[rows < 0].tolist():
                total[i] = total.get(i, 0) + 1
        entries = counts.entries()
        assert dict(zip(entries.ids.tolist(), entries.rows.tolist(), strict=True)) == total
        admitted = torch.empty(700, dtype=torch.uint8, device=DEVICE)
        ops.id_map.admit(counts.slots.header, [ids.to(DEVICE)], [3], rows.to(DEVICE), 100, admitted)
        want = [row >= 0 or total.get(i, 0) >= 100 for i, row in zip(ids.tolist(), rows.tolist(), strict=True)]
        assert admitted.bool().tolist() == want


def by_row(groups: RowGroups) -> dict[int, list[tuple[int, float]]]:
    """Return the sources of each row, and their scales."""
    count = int(groups.count)
    unique, starts, sources = groups.unique[:count].tolist(), groups.offsets.tolist(), groups.sources.tolist()
    scales = [1.0] * len(sources) if groups.scales is None else groups.scales.tolist()
    pairs = list(zip(sources, scales, strict=True))
    return {row: pairs[starts[u] : starts[u + 1]] for u, row in enumerate(unique)}


def bags_of(lengths: list[int], generator: torch.Generator, device: str) -> Bags:
    """Return bags with means, weights and plain ids in turn."""
    offsets, weights, vectors, combiners = [], [], [], []
    for number, length in enumerate(lengths):
        bags = small(generator, 1, 9)
        cuts = torch.randint(0, length + 1, (bags - 1,), generator=generator).sort().values
        ends = torch.cat([torch.zeros(1).long(), cuts, torch.tensor([length])])
        plain = number % 3 == 2
        offsets.append(ends[:0].to(device) if plain else ends.to(device))
        weights.append((torch.rand(length if number % 3 == 1 else 0, generator=generator)).to(device))
        vectors.append(length if plain else bags)
        combiners.append(ops.gather.SUM if plain else number % 3)
    return Bags(lengths, vectors, offsets, weights, combiners, [0] * len(lengths))


@on_schedules(40)
def test_groups_and_sums_are_those_of_the_cpu(schedule: Schedule) -> None:
    with schedule.running() as generator:
        lengths = [small(generator, 0, 400) for _ in range(4)]
        rows = torch.randint(-1, small(generator, 1, 60), (sum(lengths),), generator=generator)
        rows[torch.rand(len(rows), generator=generator) < 0.4] = 0  # one row has several chunks of gradients
        dim = small(generator, 1, 140)
        draws = generator.get_state()
        found = []
        for device in ("cpu", DEVICE):
            generator.set_state(draws)
            bags = bags_of(lengths, generator, device)
            groups = ops.gather.group_rows(rows.to(device), [0] * 4, 60, bags)
            wide = [torch.randn(count, dim + 4, generator=generator).to(device) for count in bags.vectors]
            # Of 16-byte records and of others.
            values = [each[:, :dim] if small(generator, 0, 1) else each[:, :dim].contiguous() for each in wide]
            sums = torch.zeros(len(rows) + 1, dim, device=device)
            ops.update.reduce_rows(Gradients(values, groups), sums)
            order = groups.unique[: int(groups.count)].argsort()
            found.append((by_row(groups), sums[: len(order)][order].cpu()))
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])


@on_schedules(40)
def test_a_training_lookup_is_that_of_the_cpu(schedule: Schedule) -> None:
    with schedule.running() as generator:
        dim, narrow = small(generator, 1, 70), bool(small(generator, 0, 1))
        dtype = torch.bfloat16 if narrow else torch.float32
        tables = [make_table(dim, members=2, device=device, dtype=dtype) for device in ("cpu", "emulated")]
        for _ in range(3):
            lengths = [small(generator, 0, 250) for _ in range(3)]
            ids = [some_ids(generator, small(generator, 1, 80), length) for length in lengths]
            bags = bags_of(lengths, generator, "cpu")
            erased = ids[0][: len(ids[0]) // 3]
            found = []
            for table, device in zip(tables, ("cpu", "emulated"), strict=True):
                request = [
                    feature(
                        part,
                        offsets.tolist(),
                        member=number % 2,
                        combiner=combiner,
                        device=device,
                        weights=weights if weights.numel() else None,
                    )
                    for number, (part, offsets, weights, combiner) in enumerate(
                        zip(ids, bags.offsets, bags.weights, bags.combiners, strict=True)
                    )
                ]
                lookup = table.lookup(request, train=True)
                vectors = [part.cpu() for part in gathered(table, lookup)]
                rows = lookup.rows.tolist()
                # Rows are numbered by who comes first: name them by their first position.
                names = {row: rows.index(row) for row in rows}
                found.append((vectors, {names[row]: sources for row, sources in by_row(lookup.groups).items()}))
                table.erase(0, erased.to(device))
            for ours, theirs in zip(found[0][0], found[1][0], strict=True):
                assert torch.equal(ours, theirs)
            assert found[0][1] == found[1][1]
            assert len(tables[0]) == len(tables[1])


@on_schedules(8)
def test_a_cache_loses_no_record(schedule: Schedule) -> None:
    with schedule.running() as generator:
        model = Cached(DEVICE, rows=80, sets=1)
        for number in range(4):
            rows = torch.randperm(80, generator=generator)[: small(generator, 1, 40)].tolist()
            model.admit(rows, number, number // 2)
            values = torch.rand(len(rows), FLOATS, generator=generator).numpy()
            model.write(rows, values)
            if small(generator, 0, 3) == 0:
                ops.cache.write_back(model.blocks, model.cache)
        assert np.array_equal(model.read(list(range(80))), model.values)
        ops.cache.write_back(model.blocks, model.cache)
        assert np.array_equal(model.host.cpu(), model.values)


@pytest.mark.emulated
def test_a_schedule_repeats_its_interleaving_and_another_seed_does_not() -> None:
    def winners(seed: int) -> list[int]:
        with Schedule(seed, 8, 2, 2, 0).running():
            id_map = IdMap(torch.device(DEVICE))
            _, fresh = id_map.find_or_insert([torch.arange(300, device=DEVICE) % 7], [0])
            return fresh[:7].tolist()

    seeds = random.Random(0).sample(range(1000), 4)
    assert [winners(seed) for seed in seeds] == [winners(seed) for seed in seeds]
    assert len({tuple(winners(seed)) for seed in seeds}) > 1
