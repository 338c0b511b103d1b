from __future__ import annotations

import numpy as np
import pytest
import torch

from recis_hybrid import ops
from recis_hybrid.embedding import (
    Constant,
    EmbeddingBlocks,
    HashTable,
    MemberTable,
    Normal,
    RecordLayout,
    StateField,
    Uniform,
)
from recis_hybrid.embedding.initializers import table_key
from tests.support import philox
from tests.support.devices import EDGE_IDS, on_devices
from tests.support.near import assert_near
from tests.support.tables import feature, gathered, make_table, values_of

DIMS = [1, 3, 4, 10, 16, 32, 64, 100, 128]


def table_with(initializer: object, dim: int, device: str = "cpu", seed: int = 3) -> HashTable:
    return HashTable([MemberTable("item", initializer)], RecordLayout(dim), torch.device(device), seed)  # type: ignore[arg-type]


@on_devices
@pytest.mark.parametrize("dim", DIMS)
def test_uniform_first_values_equal_the_reference_bitwise(device: str, dim: int) -> None:
    got = values_of(table_with(Uniform(-0.3, 0.7), dim, device), EDGE_IDS)
    want = philox.uniform(table_key(3, "item"), np.array(EDGE_IDS), dim, -0.3, 0.7)
    assert np.array_equal(got.numpy(), want)


@on_devices
@pytest.mark.parametrize("dim", DIMS)
def test_normal_first_values_are_within_two_ulp_of_float64(device: str, dim: int) -> None:
    ids = list(range(-500, 500))
    got = values_of(table_with(Normal(0.0, 1.0), dim, device), ids).numpy()
    want = philox.normal(table_key(3, "item"), np.array(ids), dim, 0.0, 1.0)
    # A cosine has a large relative error near its zeros, so the error is relative to the largest value of a row.
    assert_near(got, want, 8)
    assert np.mean(np.abs(got - want) <= 2 * np.spacing(np.abs(want).astype(np.float32))) > 0.97


def test_normal_first_values_are_normal() -> None:
    values = values_of(table_with(Normal(1.0, 2.0), 64), list(range(20_000))).double()
    standard = ((values - 1) / 2).flatten()
    # 1.28 M numbers: the means of their powers are within five standard errors of those of a normal distribution.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((standard**power).mean()) - mean) < 5 * (variance / standard.numel()) ** 0.5


@on_devices
def test_constant_first_values(device: str) -> None:
    assert values_of(table_with(Constant(0.25), 5, device), [1, 2]).tolist() == [[0.25] * 5] * 2


@on_devices
def test_first_values_depend_on_seed_table_and_id_only(device: str) -> None:
    a = values_of(table_with(Normal(), 8, device), [1, 2, 3])
    b = values_of(table_with(Normal(), 8, device), [9, 3, 3, 1, 2])
    assert torch.equal(a[[2, 2, 0, 1]], b[1:])
    assert not torch.equal(a, values_of(table_with(Normal(), 8, device, seed=4), [1, 2, 3]))
    other = HashTable([MemberTable("user", Normal())], RecordLayout(8), torch.device(device), 3)
    assert not torch.equal(a, values_of(other, [1, 2, 3]))


@on_devices
def test_optimizer_state_starts_as_declared(device: str) -> None:
    state = (StateField("sum", first_value=0.1), StateField("step", width=1, first_value=-2.0))
    table = make_table(dim=6, state=state, device=device)
    lookup = table.lookup([feature([4, 5], device=device)], train=True)
    assert table.store.blocks.read(lookup.rows, "sum").tolist() == [pytest.approx([0.1] * 6)] * 2
    assert table.store.blocks.read(lookup.rows, "step").tolist() == [[-2.0]] * 2


@on_devices
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("combiner", ["sum", "mean"])
def test_pooling_equals_embedding_bag(device: str, dim: int, combiner: str) -> None:
    table = make_table(dim=dim, device=device)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 9, (40,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(0, 50, (int(offsets[-1]),), generator=generator)
    lookup = table.lookup(
        [
            feature(ids, offsets.tolist(), combiner=int(combiner == "mean"), device=device),
            feature([7, 8], device=device),
        ],
        train=True,
    )
    outs = gathered(table, lookup)

    weight = values_of(table, list(range(50)))
    bag = torch.nn.functional.embedding_bag(ids, weight, offsets, mode=combiner, include_last_offset=True)
    assert_near(outs[0], bag)
    assert torch.equal(outs[1].cpu(), weight[[7, 8]])


@on_devices
def test_unknown_ids_have_their_first_value_and_stay_unknown(device: str) -> None:
    table, twin = make_table(dim=10, device=device), make_table(dim=10, device=device)
    table.lookup([feature([1], device=device)], train=True)
    twin.lookup([feature([1, 2, 3], device=device)], train=True)
    outs = []
    for each in (table, twin):
        lookup = each.lookup([feature([1, 2, 3, 3], [0, 2, 4], device=device)], train=False)
        outs += gathered(each, lookup)
    assert torch.equal(outs[0], outs[1])
    assert len(table) == 1


@on_devices
def test_rows_never_move_while_blocks_grow(device: str) -> None:
    table = make_table(dim=16, device=device)
    table.store.blocks = EmbeddingBlocks(table.layout, table.device, block_rows=64)
    table.lookup([feature(list(range(60)), device=device)], train=True)
    addresses = [block.data_ptr() for block in table.store.blocks.blocks]
    before = values_of(table, list(range(60)))
    table.lookup([feature(list(range(100, 2000)), device=device)], train=True)
    assert [block.data_ptr() for block in table.store.blocks.blocks][: len(addresses)] == addresses
    assert len(table.store.blocks.blocks) > len(addresses)
    assert torch.equal(values_of(table, list(range(60))), before)


@on_devices
def test_more_features_than_fit_into_kernel_arguments(device: str) -> None:
    table = make_table(dim=4, members=2, device=device)
    features = [feature([f, f + 1], member=f % 2, device=device) for f in range(150)]
    lookup = table.lookup(features, train=True)
    first = values_of(table, list(range(151)))
    for f, out in enumerate(gathered(table, lookup)):
        want = first[[f, f + 1]] if f % 2 == 0 else torch.full((2, 4), 0.5)
        assert torch.equal(out.cpu(), want)


def test_blocks_refuse_bad_arguments() -> None:
    table = make_table(dim=4)
    rows = table.lookup([feature([1, 2])], train=True).rows
    with pytest.raises(ValueError, match=r"embedding: values must have shape \(2, 4\), got \(2, 3\)"):
        table.store.blocks.write(rows, "embedding", torch.zeros(2, 3))
    with pytest.raises(KeyError, match="no optimizer state 'exp_avg'"):
        table.store.blocks.read(rows, "exp_avg")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 300])
def test_an_export_equals_reads_of_parts(rows: int, dtype: torch.dtype) -> None:
    layout = RecordLayout(5, (StateField("sum", 1), StateField("exp_avg")), dtype)
    table = HashTable([MemberTable("item", Normal(0.0, 1.0))], layout, torch.device("cpu"))
    ids = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        table.lookup([feature(ids)], train=True)
    table.export(0)  # records the last lookup in the metadata
    chosen, blocks = table.rows(0, ids[:rows]), table.store.blocks
    parts = [torch.empty(rows, layout.width(part), dtype=layout.part_dtype(part)) for part in layout.parts]
    meta = [torch.full((rows,), -1) for _ in range(3)]
    ops.blocks.export(blocks.whole(), chosen, [layout.offset(part) for part in layout.parts], parts, meta)
    assert all(torch.equal(values, blocks.read(chosen, part)) for part, values in zip(layout.parts, parts, strict=True))
    assert torch.equal(torch.stack(meta), ops.blocks.read_meta(blocks.whole(), chosen))
    assert rows == 0 or meta[2].tolist() == [2] * rows


def test_bad_exports_are_refused() -> None:
    table = make_table(dim=4)
    rows, meta = table.lookup([feature(torch.arange(3))], train=True).rows, [torch.empty(3, dtype=torch.int64)] * 3
    for offset, shape in ((0, (2, 4)), (table.layout.record_bytes - 8, (3, 4)), (-8, (3, 1))):
        with pytest.raises(RuntimeError, match="parts must be|within the record"):
            ops.blocks.export(table.store.blocks.whole(), rows, [offset], [torch.empty(shape)], meta)


def test_schemas_and_fakes_of_operators() -> None:
    table = make_table(dim=4)
    ids = torch.arange(3)
    lookup = table.lookup([feature(ids)], train=True)
    blocks, check = tuple(table.store.blocks.whole()), torch.library.opcheck
    rows, groups = lookup.rows, lookup.groups
    initializers = torch.zeros(1, 5, dtype=torch.int64)
    check(
        torch.ops.recis.gather_bags.default,
        (*blocks, 0, 4, rows, *lookup.request.bags, [ids], [0], initializers, torch.empty(12), [0], None),
    )
    check(torch.ops.recis.blocks_read.default, (*blocks, rows, 0, torch.empty(3, 4)))
    check(torch.ops.recis.blocks_write.default, (*blocks, rows, 0, torch.ones(3, 4)))
    columns = torch.zeros(3, 3, dtype=torch.int64)
    check(torch.ops.recis.blocks_read_meta.default, (*blocks, rows, columns))
    check(torch.ops.recis.blocks_write_meta.default, (*blocks, rows, columns))
    parts, meta = [torch.empty(3, 4)], [torch.empty(3, dtype=torch.int64) for _ in range(3)]
    check(torch.ops.recis.blocks_export.default, (*blocks, rows, [0], parts, *meta))
    check(torch.ops.recis.blocks_copy_records.default, (*blocks, rows[:1], rows[1:2]))
    check(torch.ops.recis.blocks_see_rows.default, (*blocks, groups.count, groups.unique, groups.offsets, 1))
    marks = torch.zeros(3, dtype=torch.uint8)
    check(torch.ops.recis.blocks_mark_touched.default, (*blocks, 0, marks))
    check(
        torch.ops.recis.blocks_init_fresh.default,
        (
            *blocks,
            0,
            table.store.id_map.counters.clone(),
            rows,
            torch.zeros(3, dtype=torch.int64),
            [ids],
            [0],
            initializers,
            4,
            [],
            [],
            [],
            [],
        ),
    )
    winners, gradient = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 4)
    check(torch.ops.recis.spread_max.default, (torch.tensor([0, 1, 3]), winners, gradient, torch.empty(3, 4)))
    check(torch.ops.recis.huge_empty.default, (1 << 21,), test_utils=["test_schema"])
    check(torch.ops.recis.huge_zeros.default, (1 << 21,), test_utils=["test_schema"])
