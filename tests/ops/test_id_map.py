from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid import ops
from recis_hybrid.embedding import IdMap
from recis_hybrid.embedding.table.id_map import IdCounts
from tests.support.devices import EDGE_IDS, late_streams, on_accelerators, on_devices

any_id = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-8, 8), st.sampled_from(EDGE_IDS))


def insert(id_map: IdMap, ids: torch.Tensor, member: int = 0) -> torch.Tensor:
    id_map.reserve(ids.numel())
    rows, _ = id_map.find_or_insert([ids], [member])
    id_map.commit()
    return rows


@on_devices
def test_every_64_bit_id_gets_its_own_row(device: str) -> None:
    id_map = IdMap(torch.device(device))
    ids = torch.tensor(EDGE_IDS, device=device)
    rows = insert(id_map, ids)
    assert sorted(rows.tolist()) == list(range(len(EDGE_IDS)))
    assert torch.equal(id_map.find([ids], [0]), rows)


@on_devices
def test_unknown_ids_have_row_minus_one(device: str) -> None:
    id_map = IdMap(torch.device(device))
    insert(id_map, torch.arange(100, device=device))
    assert id_map.find([torch.arange(100, 200, device=device)], [0]).tolist() == [-1] * 100


@on_devices
def test_member_tables_are_separate(device: str) -> None:
    id_map = IdMap(torch.device(device))
    ids = torch.tensor(EDGE_IDS, device=device)
    id_map.reserve(3 * len(EDGE_IDS))
    rows, _ = id_map.find_or_insert([ids, ids, ids], [0, 1, 65_535])
    id_map.commit()
    assert rows.unique().numel() == 3 * len(EDGE_IDS)
    assert id_map.find([ids], [2]).tolist() == [-1] * len(EDGE_IDS)
    entries = id_map.entries()
    last = entries.members == 65_535
    assert dict(zip(entries.ids[last].tolist(), entries.rows[last].tolist(), strict=True)) == dict(
        zip(EDGE_IDS, rows[-len(EDGE_IDS) :].tolist(), strict=True)
    )


@on_devices
def test_fresh_holds_a_position_of_each_new_row(device: str) -> None:
    id_map = IdMap(torch.device(device))
    insert(id_map, torch.tensor([5, 6], device=device))
    ids = torch.tensor([7, 5, 7, 8, 6, 8], device=device)
    rows, fresh = id_map.find_or_insert([ids], [0])
    new = fresh[:2]
    assert rows[new].tolist() == [2, 3]
    assert set(ids[new].tolist()) == {7, 8}
    assert id_map.counters.tolist() == [2, 2, 0, 2, 2, 0]
    id_map.commit()
    assert id_map.counters.tolist() == [0, 4, 0, 4, 4, 0]


@on_devices
def test_growing_keeps_every_row(device: str) -> None:
    id_map = IdMap(torch.device(device), capacity=16)
    ids = torch.randperm(50_000, device=device) * 0x9E3779B97F4A7C1 - 2**60
    rows = torch.cat([insert(id_map, part) for part in ids.split(997)])
    assert id_map.capacity >= 50_000 / 0.75
    assert len(id_map) == id_map.row_bound == 50_000
    assert torch.equal(id_map.find([ids], [0]), rows)


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), any_id), max_size=30), max_size=8))
def test_behaves_like_a_dict(batches: list[list[tuple[int, int]]]) -> None:
    id_map = IdMap(torch.device("cpu"), capacity=16)
    model: dict[tuple[int, int], int] = {}
    for batch in batches:
        by_member = [[i for m, i in batch if m == member] for member in range(3)]
        ids = [torch.tensor(part, dtype=torch.int64) for part in by_member]
        id_map.reserve(len(batch))
        rows, _ = id_map.find_or_insert(ids, [0, 1, 2])
        id_map.commit()
        keys = [(member, i) for member in range(3) for i in by_member[member]]
        for key, row in zip(keys, rows.tolist(), strict=True):
            assert model.setdefault(key, row) == row
        assert len(set(model.values())) == len(model) == len(id_map)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_inserting_the_same_ids_agree(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids = torch.randint(0, 20_000, (400_000,))
        id_map = IdMap(torch.device("cpu"))
        rows = insert(id_map, ids)
        assert len(id_map) == ids.unique().numel()
        assert torch.equal(id_map.find([ids], [0]), rows)
    finally:
        torch.set_num_threads(before)


def test_headers_without_slots_are_refused() -> None:
    ids, rows = torch.arange(1), torch.empty(1, dtype=torch.int64)
    for header in (torch.zeros(ops.id_map.HEADER_WORDS).long(), torch.zeros(20, 2).long()):
        with pytest.raises(RuntimeError, match="must be the header of an IDMap"):
            ops.id_map.find(header, [ids], [0], rows)


@on_devices
def test_ids_beyond_the_used_ones_have_no_row(device: str) -> None:
    ids = [torch.tensor(part, device=device) for part in ([7, 8, 0], [0, 9])]
    used = [torch.tensor(part, dtype=torch.int64, device=device) for part in ([0, 1, 2], [])]
    id_map = IdMap(torch.device(device))
    id_map.reserve(5)
    rows, _ = id_map.find_or_insert(ids, [0, 1], used=used)
    id_map.commit()
    assert rows.tolist()[2] == -1
    assert len(id_map) == 4
    assert torch.equal(id_map.find(ids, [0, 1], used), rows)
    insert(id_map, torch.tensor([0], device=device))
    assert torch.equal(id_map.find(ids, [0, 1], used), rows)
    counts, admitted = IdCounts(torch.device(device)), torch.empty(5, dtype=torch.uint8, device=device)
    none = torch.full((5,), -1, device=device)
    counts.count(ids, [0, 1], none, used)
    ops.id_map.admit(counts.slots.header, ids, [0, 1], none, 1, admitted, used=used)
    assert admitted.tolist() == [1, 1, 0, 1, 1]
    assert len(counts) == 4


@on_devices
def test_buckets_match_the_checkpoint_format(device: str) -> None:
    # Buckets are part of the checkpoint format: the top 16 bits of SplitMix64's finalizer over id ^ salt.
    def bucket(i: int) -> int:
        mask = 2**64 - 1
        x = (i & mask) ^ 0x5851F42D4C957F2D
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return (x ^ (x >> 31)) >> 48

    assert ops.id_map.bucket_of(torch.tensor(EDGE_IDS, device=device)).tolist() == [bucket(i) for i in EDGE_IDS]


@on_devices
def test_rows_of_erased_ids_are_reused(device: str) -> None:
    id_map = IdMap(torch.device(device))
    rows = insert(id_map, torch.arange(100, device=device))
    erased = torch.tensor([3, 50, 99, 3, 12345], device=device)
    id_map.erase_slots(id_map.slots_of([erased], [0]))
    assert len(id_map) == 97
    assert id_map.find([erased], [0]).tolist() == [-1] * 5
    fresh = insert(id_map, torch.arange(1000, 1005, device=device))
    assert set(rows[erased[:3]].tolist()) < set(fresh.tolist())
    assert 102 <= id_map.row_bound <= (102 if device == "cpu" else 105)  # exact on the CPU
    assert torch.equal(id_map.find([torch.arange(4, 50, device=device)], [0]), rows[4:50])


@on_devices
def test_repeated_erasing_needs_no_more_slots(device: str) -> None:
    id_map = IdMap(torch.device(device))
    for repeat in range(200 if device == "cpu" else 20):
        ids = torch.arange(500, device=device) + 500 * repeat
        insert(id_map, ids)
        id_map.erase_slots(id_map.slots_of([ids], [0]))
    assert len(id_map) == 0
    assert id_map.capacity <= 2048
    assert id_map.row_bound == 500


@on_devices
def test_growth_out_of_memory_leaves_the_map_unchanged(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    id_map = IdMap(torch.device(device))
    rows = insert(id_map, torch.arange(700, device=device))

    def no_memory(size: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ops.memory, "zero_bytes", no_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        id_map.reserve(10_000)
    assert torch.equal(id_map.find([torch.arange(700, device=device)], [0]), rows)


@on_accelerators
def test_the_host_never_knows_fewer_rows_than_there_are(device: str) -> None:
    with late_streams(device):
        id_map, made = IdMap(torch.device(device)), 0
        for number in range(12):
            ids = torch.arange(40 * number, 40 * number + 60, device=device)  # 20 of them have a row
            id_map.reserve(60)
            id_map.find_or_insert([ids], [0])
            id_map.commit()
            made = 40 * number + 60
            assert id_map.row_bound >= made
            if number % 4 == 3:
                torch.accelerator.synchronize()
                # What was counted before the copy is known exactly; ids that were inserted since are not.
                assert made <= id_map.row_bound <= made + 60 * number
        assert id_map.row_bound_after_inserts() == made == id_map.row_bound == len(id_map)


def test_schemas_and_fakes_of_operators() -> None:
    id_map = IdMap(torch.device("cpu"), capacity=64)
    ids = torch.arange(5)
    header, counters = id_map.slots.header, id_map.counters
    larger = IdMap(torch.device("cpu"), capacity=128)
    words = [torch.zeros(5, dtype=torch.int64) for _ in range(5)]
    check = torch.library.opcheck
    check(
        torch.ops.recis.id_map_find_or_insert.default,
        (header, counters, id_map.free_rows, torch.ones(5, dtype=torch.uint8), [ids], [0], [ids], *words[:2]),
    )
    check(torch.ops.recis.id_map_commit.default, (counters,))
    check(torch.ops.recis.id_map_find.default, (header, [ids], [0], [], False, words[0]))
    check(torch.ops.recis.id_map_rehash.default, (header, 64, larger.slots.header))
    check(torch.ops.recis.id_map_list.default, (header, 64, *words[:4], torch.zeros(1, dtype=torch.int64)))
    marks = torch.zeros(5, dtype=torch.uint8)
    check(
        torch.ops.recis.id_map_list_marked.default,
        (header, 64, marks, *words[:2], torch.zeros(1, dtype=torch.int64)),
    )
    lifted = torch.zeros(20, 4, 2, dtype=torch.int64)
    check(torch.ops.recis.id_map_move_lines.default, (header, counters, 16, 0, 16, -1, lifted))
    check(torch.ops.recis.id_map_erase.default, (header, ids[:1], counters, words[0]))
    check(torch.ops.recis.id_map_set.default, (header, ids[:1], ids[:1]))
    check(torch.ops.recis.id_map_count.default, (header, counters, [ids], [0], [], words[0] - 1, None))
    admitted = torch.empty(5, dtype=torch.uint8)
    check(torch.ops.recis.id_map_admit.default, (header, [ids], [0], [], words[0], 2, admitted))
    check(torch.ops.recis.bucket_ids.default, (ids, words[0]))
    check(torch.ops.recis.file_order.default, (ids, ids * 0, ids, 1, torch.zeros(3, 5, dtype=torch.int64)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1)), unique=True, max_size=60))
def test_rows_are_sorted_as_in_files(keys: list[tuple[int, int]]) -> None:
    members, ids = (torch.tensor([key[n] for key in keys], dtype=torch.int64) for n in (0, 1))
    rows = torch.arange(len(keys)) * 3
    found = ops.id_map.file_order(ids, members, rows, 4)
    buckets = ops.id_map.bucket_of(ids).tolist()
    expected = sorted(zip(members.tolist(), buckets, ids.tolist(), rows.tolist(), strict=True))
    assert [column.tolist() for column in found] == [[row[n] for row in expected] for n in (2, 3, 1)]


def test_many_rows_are_sorted_as_in_files() -> None:
    # One member table with enough ids for a counting sort of its buckets, and one with few.
    ids = torch.randint(-(2**63), 2**63 - 1, (50_000,), generator=torch.Generator().manual_seed(0)).unique()
    members = (ids % 100 == 0).long() * 2
    rows = torch.arange(len(ids))
    found, at, buckets = ops.id_map.file_order(ids, members, rows, 3)
    assert torch.equal(ids[at], found)
    assert torch.equal(ops.id_map.bucket_of(found), buckets)
    keys = list(zip(members[at].tolist(), buckets.tolist(), found.tolist(), strict=True))
    assert keys == sorted(keys)
    assert at.sort().values.equal(rows)


def test_a_missing_member_table_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no member table 5"):
        ops.id_map.file_order(torch.tensor([1]), torch.tensor([5]), torch.tensor([0]), 3)
