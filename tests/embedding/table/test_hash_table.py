"""A table's rows: metadata, erasing, eviction, compaction, admission, placement, memory, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recis_hybrid import ops, optim
from recis_hybrid.embedding import (
    Admission,
    Constant,
    EmbeddingBlocks,
    EmbeddingConfig,
    EmbeddingEngine,
    HashTable,
    MemberTable,
    MinFrequency,
    Normal,
    Placement,
    RecordLayout,
    Rows,
    StateField,
    Unused,
)
from tests.support.devices import EDGE_IDS, on_accelerators, on_devices
from tests.support.near import assert_near
from tests.support.tables import feature, gathered, make_table, values_of

SUM = (StateField("sum", first_value=0.25),)


class OddIds:
    """Evicts the rows of odd ids."""

    def unwanted(self, rows: Rows) -> torch.Tensor:
        return rows.ids % 2 == 1


def sgd(lr: float) -> ops.update.Rule:
    return ops.update.Rule(ops.update.RULES["sgd"], [], [lr, 0.0])


def meta(table: HashTable, ids: list[int]) -> list[list[int]]:
    columns = table.export(0, torch.tensor(ids))
    return [columns[name].tolist() for name in ("updated_step", "seen_step", "frequency")]


@on_devices
def test_metadata_count_training_lookups_and_steps(device: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, device=device)
    optimizer, table = optim.SGD(engine.parameters(), lr=0.1), engine.tables[0]
    for ids in ([1, 2, 1], [2], [2, 3]):
        engine({"id": torch.tensor(ids, device=device)})["id"].sum().backward()
        optimizer.step()
    engine({"id": torch.tensor([1, 1, 9], device=device)})  # without a step afterwards
    engine.eval()
    engine({"id": torch.tensor([1, 2, 77], device=device)})
    assert meta(table, [1, 2, 3, 9]) == [[1, 3, 3, 0], [4, 3, 3, 4], [4, 3, 1, 1]]
    assert table.step == 3


@on_devices
def test_metadata_can_hold_large_numbers(device: str) -> None:
    table = make_table(device=device)
    rows = table.insert(0, torch.tensor([5, 6]))
    columns = torch.tensor([[2**40 - 1, 0], [0, 2**40 - 1], [2**48 - 1, 2**24 + 3]], device=device)
    ops.blocks.write_meta(table.store.blocks.whole(), rows, columns)
    assert torch.equal(ops.blocks.read_meta(table.store.blocks.whole(), rows), columns)
    table.lookup([feature([5, 6, 6], device=device)], train=True)
    assert meta(table, [5, 6])[2] == [2**48 - 1, 2**24 + 5]


@on_devices
def test_erase_insert_export(device: str) -> None:
    table = make_table(dim=3, state=SUM, members=2, device=device)
    ids = torch.tensor(EDGE_IDS, device=device)
    table.insert(0, ids, {"embedding": torch.arange(24.0).view(8, 3), "sum": torch.ones(8, 3)})
    table.insert(1, ids)
    assert table.erase(0, torch.tensor([0, -1, 0, 12345])) == 2
    assert table.ids(0).tolist() == sorted(set(EDGE_IDS) - {0, -1})
    assert table.ids(1).tolist() == sorted(EDGE_IDS)
    assert table.rows(0, torch.tensor([0])).tolist() == [-1]
    assert len(table) == 14
    exported = table.export(0, torch.tensor([1, 2**63 - 1]))
    assert exported["embedding"].tolist() == [[6.0, 7.0, 8.0], [12.0, 13.0, 14.0]]
    assert exported["sum"].tolist() == [[1.0] * 3] * 2
    with pytest.raises(KeyError, match=r"table 't0': no row for the ids \[-1\]; look them up first"):
        table.export(0, torch.tensor([1, -1]))


@on_devices
def test_a_reinserted_id_has_its_first_value_again(device: str) -> None:
    table = make_table(dim=5, state=SUM, device=device)
    first = values_of(table, [1, 2, 3])
    table.insert(0, torch.tensor([2]), {"embedding": torch.zeros(1, 5), "sum": torch.zeros(1, 5)})
    table.erase(0, torch.tensor([2]))
    assert torch.equal(values_of(table, [2]), first[1:2])
    assert table.export(0, torch.tensor([2]))["sum"].tolist() == [[0.25] * 5]
    assert table.store.id_map.row_bound == 3


def test_the_next_eviction_keeps_inserted_rows() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)})
    optimizer, table = optim.SGD(engine.parameters()), engine.tables[0]
    for _ in range(20):
        optimizer.step()
    table.insert(0, torch.tensor([1]))
    assert engine.evict(Unused(steps=10)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.insert(3, torch.tensor([1])), "insert: member must be 0 to 0, the number of a table, got 3"),
        (lambda t: t.ids(-1), "ids: member must be 0 to 0"),
        (lambda t: t.rows(1, torch.tensor([1])), "rows: member must be 0 to 0"),
        (
            lambda t: t.erase(0, torch.tensor([1], dtype=torch.int32)),
            r"table 't0': erase: ids must be int64 \[n\], got",
        ),
        (lambda t: t.insert(0, torch.tensor([[1]])), r"insert: ids must be int64 \[n\], got torch.int64 \[1, 1\]"),
        (lambda t: t.insert(0, torch.tensor([5]), {"embeding": torch.ones(1, 4)}), r"unknown columns \['embeding'\]"),
        (
            lambda t: t.insert(0, torch.tensor([5]), {"frequency": torch.ones(1)}),
            r"columns must include all of \[.*\] or none of them",
        ),
        (
            lambda t: t.insert(0, torch.tensor([5]), {"embedding": torch.ones(1, 3)}),
            r"embedding must have shape \[1, 4\]",
        ),
        (
            lambda t: t.insert(0, torch.tensor([5, 5]), {"embedding": torch.ones(2, 4)}),
            "ids must be distinct if columns",
        ),
    ],
)
def test_bad_bulk_changes_are_refused_and_change_nothing(change: Callable[[HashTable], object], message: str) -> None:
    table = make_table(dim=4)
    with pytest.raises(ValueError, match=message):
        change(table)
    assert len(table) == 0


@on_devices
def test_an_interrupted_insert_adds_no_ids(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(dim=4, device=device)
    first = values_of(table, [1, 2])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops.blocks, "init_fresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table.insert(0, torch.arange(100))
    monkeypatch.undo()
    assert table.ids(0).tolist() == [1, 2]
    assert table.store.id_map.counters.tolist()[0] == 0
    assert torch.equal(values_of(table, [1, 2, 50])[:2], first)
    assert torch.equal(values_of(table, [50]), values_of(make_table(dim=4), [50]))


@on_devices
def test_a_compaction_out_of_memory_moves_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(dim=4, device=device)
    table.insert(0, torch.arange(2000))
    table.erase(0, torch.arange(0, 2000, 2))
    before = table.export(0)
    lookup = table.lookup([feature([1, 3], device=device)], train=True)

    def no_memory(size: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ops.memory, "zero_bytes", no_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        table.compact()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="look up the batch again"):
        gathered(table, lookup)
    assert torch.equal(table.export(0)["embedding"], before["embedding"])


@on_devices
def test_admission_counts_survive_growth_out_of_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(dim=4, admission=MinFrequency(2), device=device)
    table.lookup([feature([7], device=device)], train=True)

    def no_blocks(rows: int) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(table.store.blocks, "reserve", no_blocks)
    with pytest.raises(RuntimeError, match="out of memory"):
        table.lookup([feature([7], device=device)], train=True)
    monkeypatch.undo()
    table.lookup([feature([7], device=device)], train=True)
    assert table.ids(0).tolist() == [7]


@on_devices
@pytest.mark.parametrize("where", [(ops.id_map, "find_or_insert"), (ops.blocks, "init_fresh")], ids=["map", "blocks"])
def test_admission_counts_survive_a_failed_insert(
    device: str, where: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(dim=4, admission=MinFrequency(3), device=device)
    assert table.store.gate is not None
    table.lookup([feature([7, 7, 8], device=device)], train=True)

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(*where, no_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        table.lookup([feature([7, 8], device=device)], train=True)
    monkeypatch.undo()
    known = table.store.gate.state_dict(0)
    assert (known["ids"].tolist(), known["count"].tolist(), len(table)) == ([7, 8], [3, 2], 0)
    table.lookup([feature([7, 8], device=device)], train=True)
    assert table.ids(0).tolist() == [7, 8]
    assert table.store.gate.state_dict(0)["ids"].tolist() == []


def test_counts_of_ids_never_admitted_are_reported_and_can_be_dropped() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, admission=MinFrequency(2))})
    optimizer, table = optim.SGD(engine.parameters()), engine.tables[0]
    empty = engine.memory()["admission"]
    for step in range(3):
        engine({"id": torch.arange(1000 * step, 1000 * step + 1000)})
        optimizer.step()
    engine.evict(Unused(1))
    assert table.store.gate is not None
    assert table.store.gate.state_dict(0)["ids"].numel() == 3000
    assert 16 / 0.75 <= engine.memory()["admission"] / 3000 <= 2 * 5 / 4 * 16 / 0.75
    table.store.gate.clear(None)
    assert table.store.gate.state_dict(0)["ids"].numel() == 0
    assert engine.memory()["admission"] == empty


@on_devices
def test_inserting_an_id_drops_its_count(device: str) -> None:
    table = make_table(dim=4, admission=MinFrequency(3), device=device)
    table.lookup([feature([7, 7], device=device)], train=True)
    table.insert(0, torch.tensor([7]))
    table.erase(0, torch.tensor([7]))
    table.lookup([feature([7], device=device)], train=True)
    assert len(table) == 0


def test_the_maximum_number_of_member_tables() -> None:
    members = [MemberTable(f"t{k}", Constant(float(k))) for k in range(1 << 16)]
    table = HashTable(members, RecordLayout(2), torch.device("cpu"))
    numbers = [0, 1, 32_767, 32_768, 65_535]
    lookup = table.lookup([feature([5, -1], member=number) for number in numbers], train=True)
    for number, out in zip(numbers, gathered(table, lookup), strict=True):
        assert out.tolist() == [[float(number)] * 2] * 2
    assert len(table) == 10
    assert table.ids(65_535).tolist() == [-1, 5]
    with pytest.raises(ValueError, match="a hash table holds 1 to 65536 member tables, got 65537"):
        HashTable([*members, MemberTable("more", Constant(0.0))], RecordLayout(2), torch.device("cpu"))


@on_devices
def test_clear_of_a_member_leaves_the_others(device: str) -> None:
    table = make_table(members=3, device=device)
    for member in range(3):
        table.insert(member, torch.arange(10))
    table.clear(1)
    assert [table.ids(member).numel() for member in range(3)] == [10, 0, 10]
    table.clear()
    assert len(table) == 0


@on_devices
def test_eviction_erases_unused_rows_and_reuses_them(device: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, device=device)
    optimizer, table = optim.SGD(engine.parameters(), lr=0.1), engine.tables[0]
    for step in range(10):
        ids = torch.arange(5 * step, 5 * step + 5, device=device)
        engine({"id": ids})["id"].sum().backward()
        optimizer.step()
    assert engine.evict(Unused(steps=4)) == 30
    assert table.ids(0).tolist() == list(range(30, 50))
    engine({"id": torch.arange(100, 130, device=device)})
    assert table.store.id_map.row_bound == 50
    assert engine.evict(Unused(steps=100)) == 0


@on_devices
def test_bulk_changes_refuse_pending_gradients_and_invalidate_lookups(device: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2)}, device=device)
    table, ids = engine.tables[0], torch.tensor([1, 2])
    engine({"id": ids})["id"].sum().backward()
    for change in (table.compact, lambda: table.erase(0, ids), lambda: table.evict(Unused(1)), lambda: table.clear(0)):
        with pytest.raises(RuntimeError, match="table id: .* would detach pending gradients.*zero_grad first"):
            change()
    engine.zero_grad()
    for change in (table.compact, lambda: table.erase(0, ids), lambda: table.evict(Unused(1)), lambda: table.clear(0)):
        output = engine({"id": ids})["id"]
        change()
        with pytest.raises(RuntimeError, match="rows were cleared, erased or moved since"):
            output.sum().backward()


@on_devices
def test_compaction_keeps_every_record_and_frees_memory(device: str) -> None:
    table = make_table(dim=4, state=SUM, members=2, device=device)
    table.store.blocks = EmbeddingBlocks(table.layout, table.device, block_rows=64)
    for member in range(2):
        table.insert(member, torch.arange(1000), {"embedding": torch.randn(1000, 4), "sum": torch.rand(1000, 4)})
    table.erase(0, torch.arange(0, 1000, 3))
    table.erase(1, torch.arange(20, 1000))
    before = [table.export(member) for member in range(2)]
    capacity, generation = table.store.id_map.capacity, table.generation
    table.compact()
    for member in range(2):
        after = table.export(member)
        assert all(torch.equal(after[name], values) for name, values in before[member].items())
    assert len(table) == table.store.id_map.row_bound == 686
    assert len(table.store.blocks.blocks) == 11
    assert table.store.id_map.capacity < capacity
    assert table.generation != generation
    assert table.memory()["free_rows"] == 0
    table.insert(0, torch.tensor([0]))
    assert table.store.id_map.row_bound == 687


@on_devices
@pytest.mark.parametrize("unknown", ["first_value", "zeros"])
def test_admission_by_frequency_is_exact(device: str, unknown: str) -> None:
    config = EmbeddingConfig(dim=2, admission=MinFrequency(3), unknown=unknown, initializer=Normal(1.0, 0.1))
    engine = EmbeddingEngine({"id": config}, device=device)
    optimizer, table = optim.SGD(engine.parameters(), lr=1.0), engine.tables[0]
    first = engine.eval()({"id": torch.tensor([1, 2, 3], device=device)})["id"]
    assert bool((first == 0).all()) == (unknown == "zeros")
    engine.train()
    seen = []
    for ids in ([1, 2, 1], [2, 3], [1, 2, 3, 2]):
        output = engine({"id": torch.tensor(ids, device=device)})["id"]
        output.sum().backward()
        optimizer.step()
        seen.append(table.ids(0).tolist())
    # Ids 1 and 2 occur for the third time in the third batch, id 3 only for the second time.
    assert seen == [[], [], [1, 2]]
    after = engine.eval()({"id": torch.tensor([1, 2, 3], device=device)})["id"].cpu()
    start = values_of(make_engine_table(config), [1, 2, 3])
    assert torch.equal(after[:2], start[:2] - torch.tensor([[1.0], [2.0]]))
    assert torch.equal(after[2], first[2].cpu())
    assert table.store.gate is not None
    known = table.store.gate.state_dict(0)
    assert (known["ids"].tolist(), known["count"].tolist()) == ([3], [2])


def make_engine_table(config: EmbeddingConfig) -> HashTable:
    """Return the table that an engine builds from a config, without admission."""
    return EmbeddingEngine({"id": EmbeddingConfig(dim=config.dim, initializer=config.initializer)}).tables[0]


@on_devices
def test_an_evicted_id_is_counted_from_zero(device: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, admission=MinFrequency(2))}, device=device)
    table = engine.tables[0]
    engine({"id": torch.tensor([7, 7])})
    table.erase(0, torch.tensor([7]))
    engine({"id": torch.tensor([7])})
    assert len(table) == 0
    engine({"id": torch.tensor([7])})
    assert len(table) == 1


@on_devices
def test_a_read_only_table_changes_only_by_loading(device: str) -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=2, trainable=False)}, device=device)
    table = engine.tables[0]
    table.load(0, torch.tensor([1]), {"embedding": torch.ones(1, 2)})
    output = engine({"id": torch.tensor([1, 2])})["id"]
    assert not output.requires_grad
    assert output[0].tolist() == [1.0, 1.0]
    assert len(table) == 1
    assert meta(table, [1]) == [[0], [0], [0]]
    changes = {
        "insert": lambda: table.insert(0, torch.tensor([3])),
        "erase": lambda: table.erase(0, torch.tensor([1])),
        "clear": lambda: table.clear(),
        "evict": lambda: table.evict(Unused(1)),
        "apply_gradients": lambda: table.gradients_of(
            table.lookup([feature([1], device=device)], train=False), [torch.ones(1, 2, device=device)]
        ),
    }
    for name, change in changes.items():
        with pytest.raises(RuntimeError, match=f"table id: {name} would change it, but it is read-only"):
            change()
    assert engine.evict(Unused(1)) == 0
    optim.SGD(engine.parameters()).step()


def test_growing_blocks_takes_at_most_a_tenth_of_extra_memory() -> None:
    tracker = {"now": 0, "peak": 0}
    allocate = ops.memory.empty_bytes

    def tracked(size: int, device: torch.device) -> torch.Tensor:
        tracker["now"] += size
        tracker["peak"] = max(tracker["peak"], tracker["now"])
        return allocate(size, device)

    table = make_table(dim=16)
    table.store.blocks = EmbeddingBlocks(table.layout, table.device, block_rows=256)
    pointers: dict[int, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.memory, "empty_bytes", tracked)
        for rows in range(0, 20_000, 500):
            table.store.blocks.reserve(rows)
            for number, block in enumerate(table.store.blocks.blocks):
                assert pointers.setdefault(number, block.data_ptr()) == block.data_ptr()
    assert tracker["peak"] <= 1.1 * table.store.blocks.nbytes


@on_devices
def test_growing_blocks_out_of_memory_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(dim=16, state=SUM, device=device)
    before = values_of(table, [1, 2, 3])
    allocate = ops.memory.empty_bytes

    def no_blocks(size: int, device: torch.device) -> torch.Tensor:
        if size == table.store.blocks.block_rows * table.layout.record_bytes:
            raise RuntimeError("out of memory")
        return allocate(size, device)

    monkeypatch.setattr(ops.memory, "empty_bytes", no_blocks)
    with pytest.raises(RuntimeError, match="out of memory"):
        table.lookup([feature(torch.arange(table.store.blocks.capacity + 1), device=device)], train=True)
    monkeypatch.undo()
    assert len(table) == 3
    assert torch.equal(values_of(table, [1, 2, 3]), before)
    assert table.store.id_map.counters.tolist()[:3] == [0, 3, 0]


@pytest.mark.parametrize("row", [2**31 - 1, 2**31, 2**33 + 5, 2**39])
def test_row_numbers_beyond_32_bits(row: int) -> None:
    # Only the last entry of the address table is a real block; the addresses before it are never dereferenced.
    blocks = EmbeddingBlocks(make_table(dim=4).layout, torch.device("cpu"), block_rows=1 << 20)
    blocks.reserve(1)
    number = row >> 20
    addresses = torch.zeros(number + 1, dtype=torch.int64)
    addresses[number] = blocks.blocks[0].data_ptr()
    far = blocks.whole()._replace(addresses=addresses)
    rows = torch.tensor([row])
    ops.blocks.write(far, rows, 0, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    within = torch.tensor([row & ((1 << 20) - 1)])
    assert blocks.read(within, "embedding").tolist() == [[1.0, 2.0, 3.0, 4.0]]
    groups = ops.gather.group_rows(torch.tensor([row, row, -1]), [0], row + 1, ops.gather.Bags.single([3]))
    assert (int(groups.count), int(groups.unique[0])) == (1, row)
    table = ops.update.Table(far, 0, 0, 4, 1, False, 0)
    ops.update.update_rows(table, ops.update.Gradients([torch.ones(3, 4)], groups), sgd(0.5), 1)
    assert blocks.read(within, "embedding").tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_an_id_map_entry_holds_a_forty_bit_row() -> None:
    table = make_table(members=1)
    table.insert(0, torch.tensor([5, 6]))
    last = 2**40 - 1
    ops.id_map.set_rows(
        table.store.id_map.slots.header, table.store.id_map.slots_of([torch.tensor([5])], [0]), torch.tensor([last])
    )
    assert table.rows(0, torch.tensor([5, 6])).tolist() == [last, 1]


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow_state", [False, True])
def test_narrow_rows_are_stored_and_read_exactly(device: str, dtype: torch.dtype, narrow_state: bool) -> None:
    table = make_table(
        dim=6, state=SUM, device=device, dtype=dtype, state_dtype=dtype if narrow_state else torch.float32
    )
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    embedding = every[: every.numel() // 6 * 6].view(-1, 6)
    ids = torch.arange(embedding.size(0))
    table.insert(0, ids, {"embedding": embedding})
    exported = table.export(0, ids)
    assert exported["embedding"].dtype == dtype
    assert torch.equal(exported["embedding"].cpu().view(torch.int16), embedding.view(torch.int16))
    assert exported["sum"].dtype == (dtype if narrow_state else torch.float32)
    assert bool((exported["sum"] == 0.25).all())
    out = gathered(table, table.lookup([feature(ids, device=device)], train=False))[0].cpu()
    assert torch.equal(out, embedding.float())


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_first_values_are_rounded_to_the_nearest(device: str, dtype: torch.dtype) -> None:
    wide, narrow = make_table(dim=8, device=device), make_table(dim=8, device=device, dtype=dtype)
    ids = list(range(2000))
    assert torch.equal(values_of(narrow, ids), values_of(wide, ids).to(dtype).float())
    assert torch.equal(values_of(narrow, [-5, -6], train=False), values_of(wide, [-5, -6]).to(dtype).float())


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, 1e-3, -3.0, 4e-6, -300.0])
def test_updates_below_half_the_spacing_are_exact_on_average(device: str, dtype: torch.dtype, value: float) -> None:
    n, dim = 2000, 16
    table = make_table(dim=dim, device=device, dtype=dtype)
    start = torch.full((n, dim), value).to(dtype)
    ids = torch.arange(n)
    table.insert(0, ids, {"embedding": start})
    base = start[0, 0].float()
    spacing = (torch.nextafter(start[0, 0], torch.tensor(torch.inf, dtype=dtype)).float() - base).abs()
    lookup = table.lookup([feature(ids, device=device)], train=True)
    step = 0.2 * spacing
    gradient = torch.rand(n, dim, generator=torch.Generator().manual_seed(0)).to(device) * step * 2
    records = ops.update.Table(table.store.blocks.whole(), table.layout.element, 0, dim, 1, False, table.rounding_seed)
    ops.update.update_rows(records, ops.update.Gradients([gradient], lookup.groups), sgd(1.0), 1)
    moved = base - table.export(0, ids)["embedding"].float().cpu()
    steps = (moved / spacing).round()
    assert set(steps.unique().tolist()) <= {0.0, 1.0} | ({0.5} if value < 0 else set())
    # The mean equals that of the gradient within five standard errors (of Bernoulli variables with variance below 1/4).
    error = float((moved.mean() - gradient.cpu().mean()) / spacing)
    assert abs(error) < 5 * 0.5 / (n * dim) ** 0.5


def test_rounding_depends_on_the_seed_but_not_on_row_numbers() -> None:
    results = []
    for seed, order in ((1, [0, 1, 2, 3]), (1, [3, 1, 0, 2]), (2, [0, 1, 2, 3])):
        config = EmbeddingConfig(dim=32, dtype=torch.bfloat16, initializer=Normal(0, 1))
        engine = EmbeddingEngine({"id": config}, seed=seed, optimizer=optim.Adam)
        engine({"id": torch.tensor(order)})
        # The same values for each seed, so that only the rounding differs.
        engine.tables[0].insert(0, torch.arange(4), {"embedding": torch.linspace(-1, 1, 128).view(4, 32)})
        optimizer = optim.Adam(engine.parameters(), lr=1e-4)
        for _ in range(5):
            engine({"id": torch.arange(4)})["id"].square().sum().backward()
            optimizer.step()
        results.append(engine.tables[0].export(0)["embedding"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@on_accelerators
@pytest.mark.parametrize("id_map", ["cpu", "cuda"])
@pytest.mark.parametrize("blocks", ["cpu", "cuda", "pinned"])
@pytest.mark.parametrize("admission", [None, MinFrequency(6)])
def test_every_placement_trains_to_the_same_values(
    device: str, id_map: Any, blocks: Any, admission: Admission | None
) -> None:
    outputs, states = [], []
    for placement in (Placement(id_map="cuda", blocks="cuda"), Placement(id_map=id_map, blocks=blocks)):
        config = EmbeddingConfig(dim=16, placement=placement, admission=admission)
        engine = EmbeddingEngine({"id": config}, optimizer=optim.Adam, device=device)
        optimizer, (table,) = optim.Adam(engine.parameters(), lr=0.1), engine.tables
        for step in range(4):
            ids = torch.arange(step, step + 2000, device=device) % 700
            engine({"id": ids})["id"].square().sum().backward()
            optimizer.step()
        table.erase(0, torch.arange(3, 90, device=device))
        assert engine.evict(OddIds()) > 0
        engine.compact()
        outputs.append(engine.eval()({"id": torch.arange(703, device=device)})["id"])
        assert outputs[-1].device.type == device
        states.append(engine.checkpoint_state().tables["id"])
    assert_near(outputs[0], outputs[1])
    for name, column in states[0].columns.items():
        assert_near(states[1].columns[name].cpu(), column.cpu())


def test_pinned_blocks_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="pinned blocks need a CUDA device, got cpu"):
        EmbeddingBlocks(make_table().layout, torch.device("cpu"), pinned=True)
    with pytest.raises(ValueError, match="blocks must be 'cpu', 'cuda', 'pinned' or 'disk', got 'tape'"):
        Placement(id_map="cpu", blocks="tape")  # type: ignore[arg-type]


def test_memory_is_reported_by_part() -> None:
    engine = EmbeddingEngine({"id": EmbeddingConfig(dim=4, admission=MinFrequency(1))})
    engine({"id": torch.arange(10)})
    report = engine.memory()
    assert report["id_map"] == engine.tables[0].store.id_map.slots.nbytes + 48
    assert report["blocks"] == sum(block.nbytes for block in engine.tables[0].store.blocks.blocks)
    assert report["admission"] > 0
    assert report["total"] == sum(size for part, size in report.items() if part != "total")
