from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid import ops
from recis_hybrid.embedding.table.gradients import Part, PendingGradients
from recis_hybrid.embedding.table.lookup import Request
from recis_hybrid.ops.gather import Bags, RowGroups
from recis_hybrid.ops.update import Gradients
from tests.support import emulated
from tests.support.devices import on_devices
from tests.support.near import assert_near
from tests.support.tables import feature, make_table

DIMS = [1, 3, 4, 10, 16, 32, 64, 100, 128]


def groups_of(rows: list[int], device: str = "cpu", bound: int | None = None) -> RowGroups:
    tensor = torch.tensor(rows, dtype=torch.int64, device=device)
    return ops.gather.group_rows(tensor, [0], bound or max(rows, default=0) + 1, singles(len(rows)))


def singles(n: int) -> Bags:
    return Bags.single([n])


def check_groups(rows: list[int], groups: RowGroups) -> None:
    count = int(groups.count)
    unique, starts = groups.unique[:count].tolist(), groups.offsets[: count + 1].tolist()
    positions: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        if row >= 0:
            positions.setdefault(row, []).append(position)
    assert sorted(unique) == sorted(positions)
    assert starts[0] == 0
    assert starts[-1] == sum(row >= 0 for row in rows)
    bags = groups.sources.tolist()
    for u, row in enumerate(unique):
        assert bags[starts[u] : starts[u + 1]] == positions[row]


@given(st.lists(st.one_of(st.integers(-1, 5), st.integers(0, 2**40 - 1)), max_size=300))
def test_groups_keep_input_order(rows: list[int]) -> None:
    check_groups(rows, groups_of(rows))


@on_devices
@pytest.mark.parametrize("bound", [1, 2, 2**11, 2**11 + 1, 2**22, 2**40])
def test_groups_at_the_boundaries_of_digits(device: str, bound: int) -> None:
    rows = [bound - 1, -1, 0, bound // 2, bound - 1, 0, -1, bound // 3]
    check_groups(rows, groups_of(rows, device, bound))


@on_devices
def test_groups_without_rows(device: str) -> None:
    check_groups([], groups_of([], device))


@pytest.mark.slow
def test_groups_do_not_depend_on_the_number_of_threads() -> None:
    rows = torch.randint(-1, 5_000, (200_000,), generator=torch.Generator().manual_seed(1)).tolist()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(groups_of(rows))
    torch.set_num_threads(before)
    check_groups(rows, results[0])
    for name in ("count", "unique", "offsets", "sources"):
        ours, theirs = (getattr(groups, name) for groups in results)
        used = {"unique": int(results[0].count), "offsets": int(results[0].count) + 1, "sources": 199_000}.get(name, 1)
        assert torch.equal(ours[:used], theirs[:used])


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(-1, 9), max_size=12)), min_size=1, max_size=9))
def test_features_of_one_member_table_are_grouped_together(features: list[tuple[int, list[int]]]) -> None:
    # As in a table, rows of different member tables differ.
    rows = [row if row < 0 else 10 * member + row for member, part in features for row in part]
    counts, members = [len(part) for _, part in features], [member for member, _ in features]
    none = [0] * len(features)
    groups = ops.gather.group_rows(
        torch.tensor(rows, dtype=torch.int64), members, 30, Bags(counts, counts, [], [], none, none)
    )
    where = [(f << 40) + i for f, count in enumerate(counts) for i in range(count)]
    count = int(groups.count)
    starts = groups.offsets[: count + 1].tolist()
    assert sorted(groups.unique[:count].tolist()) == sorted({row for row in rows if row >= 0})
    for u, row in enumerate(groups.unique[:count].tolist()):
        want = [place for place, other in zip(where, rows, strict=True) if other == row]
        assert groups.sources[starts[u] : starts[u + 1]].tolist() == want


def chunked_sum(gradients: np.ndarray) -> np.ndarray:
    """Return the sum in the documented order, in float32: chunks of 256, then their sums."""
    total = None
    for start in range(0, len(gradients), 256):
        chunk = np.zeros(gradients.shape[1], np.float32)
        for gradient in gradients[start : start + 256]:
            chunk = chunk + gradient
        total = chunk if total is None else total + chunk
    assert total is not None
    return total


@on_devices
@pytest.mark.parametrize("dim", DIMS)
def test_reduction_adds_exactly_in_the_documented_order(device: str, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    rows = torch.cat([torch.randint(0, 7, (900,), generator=generator), torch.full((700,), 3)])
    gradient = torch.randn(1600, dim, generator=generator)
    groups = groups_of(rows.tolist(), device)
    out = torch.empty(1600, dim, device=device)
    ops.update.reduce_rows(Gradients([gradient.to(device)], groups), out)
    want = np.stack([chunked_sum(gradient[rows == row].numpy()) for row in groups.unique[:7].tolist()])
    assert np.array_equal(out[:7].cpu().numpy(), want)


@on_devices
@pytest.mark.parametrize("dim", [3, 32])
@pytest.mark.parametrize("scaled", [False, True])
def test_groups_of_every_length_are_added_in_the_documented_order(device: str, dim: int, scaled: bool) -> None:
    # Long groups begin anywhere within the chunks of positions, after each other and after short ones.
    lengths = [1, 256, 257, 300, 511, 512, 513, 1, 1, 1025, 255, 700, 2000, *[1] * 600]
    generator = torch.Generator().manual_seed(dim)
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rows = rows[torch.randperm(rows.numel(), generator=generator)]
    gradient = torch.randn(rows.numel(), dim, generator=generator)
    groups = groups_of(rows.tolist(), device)
    factor = torch.tensor([0.3]) if scaled else None
    out = torch.full((rows.numel(), dim), torch.nan, device=device)
    ops.update.reduce_rows(Gradients([gradient.to(device)], groups, None if factor is None else factor.to(device)), out)
    want = np.stack([chunked_sum(gradient[rows == row].numpy()) for row in groups.unique[: len(lengths)].tolist()])
    assert np.array_equal(out[: len(lengths)].cpu().numpy(), want if factor is None else want * factor.numpy())
    assert bool(out[len(lengths) :].isnan().all())


@pytest.mark.emulated
def test_grouping_and_reducing_take_few_launches() -> None:
    emulated.clear_counts()
    groups = groups_of([3, 1, 3, -1] * 100, "emulated")
    assert (emulated.counts()["launches"], emulated.counts()["cub_calls"]) == (4, 3)
    emulated.clear_counts()
    ops.update.reduce_rows(
        Gradients([torch.ones(400, 4, device="emulated")], groups), torch.empty(400, 4, device="emulated")
    )
    assert emulated.counts()["launches"] == 2  # the chunks of long groups, and the rows


def sum_by_halves(terms: np.ndarray) -> np.float64:
    """Return the sum in the documented order: 32 running sums, then these by halves."""
    sums = np.zeros(32)
    for start in range(0, len(terms), 32):
        part = terms[start : start + 32]
        sums[: len(part)] += part
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return np.float64(sums[0])


@on_devices
@pytest.mark.parametrize(
    ("bound", "dim", "count"),
    [(0, 4, 0), (5, 4, 0), (1, 1, 1), (7, 3, 5), (300, 33, 299), (4096, 2, 4096), (4100, 64, 1030), (70_000, 128, 10)],
)
def test_squares_of_rows_in_use_are_summed_in_the_documented_order(
    device: str, bound: int, dim: int, count: int
) -> None:
    values = torch.randn(bound, dim, generator=torch.Generator().manual_seed(dim)) * 1e25  # overflows in float32
    values[count:] = torch.nan
    found = ops.update.sum_squares(values.to(device), torch.tensor([count], device=device))
    squares = values[:count].double().square().flatten().numpy()
    chunks = [sum_by_halves(squares[start : start + 8192]) for start in range(0, len(squares), 8192)]
    assert len(chunks) <= 1024
    assert found.dtype == torch.float64
    assert found.tolist() == [sum_by_halves(np.array(chunks))]


@pytest.mark.slow
@on_devices
def test_squares_of_many_rows_are_summed_in_two_more_levels(device: str) -> None:
    values = torch.randn(8192 * 1025, 1, generator=torch.Generator().manual_seed(0))
    found = ops.update.sum_squares(values.to(device), torch.tensor([8192 * 1024 + 40], device=device))
    squares = values[: 8192 * 1024 + 40].double().square().numpy()
    lanes = squares[: 8192 * 1024].reshape(1024, 256, 32)
    sums = np.zeros((1024, 32))
    for k in range(256):
        sums += lanes[:, k]
    while sums.shape[1] > 1:
        sums = sums[:, : sums.shape[1] // 2] + sums[:, sums.shape[1] // 2 :]
    assert found.tolist() == [sum_by_halves(sums[:, 0]) + sum_by_halves(squares[8192 * 1024 :, 0])]


def test_the_sum_of_squares_does_not_depend_on_the_number_of_threads() -> None:
    values, before, found = torch.randn(40_000, 16), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.update.sum_squares(values, torch.tensor([39_000])))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@on_devices
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_rows_in_use_are_clipped(device: str, dim: int, scaled: bool) -> None:
    values = torch.randn(50, dim, generator=torch.Generator().manual_seed(dim)) * torch.logspace(-3, 3, 50).unsqueeze(1)
    values[3] = 0.0
    values[7, 0] = torch.inf
    values[9, dim - 1] = torch.nan
    factor = torch.tensor([0.25]) if scaled else torch.ones(1)
    want = values * factor
    want *= (2.0 / (want.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0)
    found = values.clone().to(device)
    ops.update.clip_rows(found, torch.tensor([40], device=device), factor.to(device) if scaled else None, 2.0)
    torch.testing.assert_close(found[:40].cpu(), want[:40], equal_nan=True)
    assert torch.equal(found[40:].cpu(), values[40:])
    short = (values * factor)[:40].norm(dim=1) < 1.99
    assert torch.equal(found[:40].cpu()[short], (values * factor)[:40][short])


@on_devices
def test_reduction_over_features_bags_and_means(device: str) -> None:
    table = make_table(dim=6, device=device)
    bags, lengths = 20, [3, 0, 1, 5] * 5
    offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 12, (offsets[-1],), generator=generator)
    flat = torch.randint(0, 12, (bags,), generator=generator)
    lookup = table.lookup([feature(ids, offsets, combiner=1, device=device), feature(flat, device=device)], train=True)
    gradients = [torch.randn(bags, 6, generator=generator) for _ in range(2)]
    out = torch.empty(lookup.rows.numel(), 6, device=device)
    ops.update.reduce_rows(Gradients([gradient.to(device) for gradient in gradients], lookup.groups), out)

    weight = torch.zeros(12, 6, requires_grad=True)
    pooled = torch.nn.functional.embedding_bag(
        ids, weight, torch.tensor(offsets), mode="mean", include_last_offset=True
    )
    torch.autograd.backward([pooled, weight[flat]], gradients)
    count = int(lookup.groups.count)
    rows = table.lookup([feature(list(range(12)), device=device)], train=False).rows.tolist()
    for row, got in zip(lookup.groups.unique[:count].tolist(), out[:count].cpu(), strict=True):
        assert weight.grad is not None
        assert_near(got, weight.grad[rows.index(row)])


@on_devices
@pytest.mark.parametrize("dim", [1, 3, 4, 64])
def test_strided_gradients_are_accepted(device: str, dim: int) -> None:
    groups = groups_of([2, 0, 2, 1], device)
    wide = torch.randn(4, 2 * dim, device=device)
    out, want = torch.empty(4, dim, device=device), torch.empty(4, dim, device=device)
    for gradient in (wide[:, dim:], torch.randn(1, dim, device=device).expand(4, dim)):
        ops.update.reduce_rows(Gradients([gradient], groups), out)
        ops.update.reduce_rows(Gradients([gradient.contiguous()], groups), want)
        assert torch.equal(out[:3], want[:3])


@on_devices
def test_gradients_of_several_lookups_are_reduced_together(device: str) -> None:
    table = make_table(dim=4, device=device)
    first = table.lookup([feature([1, 2, 1], device=device)], train=True)
    second = table.lookup([feature([2, 3], [0, 2], combiner=1, device=device)], train=True)
    gradients = [torch.randn(3, 4, device=device), torch.randn(1, 4, device=device)]
    pending = PendingGradients()
    for lookup, gradient in zip((first, second), gradients, strict=True):
        pending.add(
            Part(lookup.rows, lookup.request.members, lookup.row_bound, lookup.sources, [gradient], lookup.groups)
        )
    out = torch.empty(5, 4, device=device)
    merged = pending.gradients()
    ops.update.reduce_rows(merged, out)
    rows = table.rows(0, torch.tensor([1, 2, 3])).tolist()
    want = {
        rows[0]: gradients[0][0] + gradients[0][2],
        rows[1]: gradients[0][1] + 0.5 * gradients[1][0],
        rows[2]: 0.5 * gradients[1][0],
    }
    assert_near(out[:3], torch.stack([want[row] for row in merged.groups.unique[:3].tolist()]))


@on_devices
@pytest.mark.parametrize(
    ("lengths", "members"), [([2], 1), ([4], 1), ([3, 1], 2), ([], 0), ([3], 2), ([1, 2], 1), ([-1, 4], 2)]
)
def test_lengths_that_do_not_fit_are_refused(device: str, lengths: list[int], members: int) -> None:
    zeros, refusal = [0] * len(lengths), "lengths must not be negative and must sum to 3"
    ids = torch.arange(3, device=device)
    bags = Bags(lengths, lengths, [], [], zeros, zeros)
    with pytest.raises(RuntimeError, match=refusal):
        ops.gather.group_rows(ids, [0] * members, 3, bags)
    table = make_table(dim=4, device=device)
    table.store.blocks.reserve(8)
    words = [torch.empty(9, dtype=torch.int64, device=device) for _ in range(4)]
    with pytest.raises(RuntimeError, match=refusal):
        torch.ops.recis.insert_grouped(
            table.store.id_map.slots.header,
            table.store.id_map.counters,
            table.store.id_map.free_rows,
            *table.store.blocks.whole(),
            0,
            4,
            torch.zeros(1, 5, dtype=torch.int64, device=device),
            [],
            [],
            [],
            [],
            [ids],
            [0] * members,
            [],
            8,
            lengths,
            lengths,
            [],
            [],
            zeros,
            zeros,
            torch.empty(3, dtype=torch.int64, device=device),
            *words[:3],
            None,
            words[3][:1],
        )
    assert len(table) == 0
    numbers = [torch.empty(3, dtype=torch.int64, device=device) for _ in range(3)]
    with pytest.raises(RuntimeError, match=refusal):
        torch.ops.recis.distinct_ids(
            [ids], [0] * members, [], [-1], 1, *bags, *words[:3], None, words[3][:1], *numbers[:2], numbers[2][:1]
        )


IDS = st.lists(st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1)), max_size=40)


@on_devices
@settings(max_examples=40)
@given(data=st.data(), features=st.lists(st.tuples(st.integers(0, 2), IDS), min_size=1, max_size=5))
def test_a_training_lookup_equals_inserting_and_grouping(
    device: str, data: st.DataObject, features: list[tuple[int, list[int]]]
) -> None:
    table = make_table(members=3, dim=4, device=device)
    table.insert(1, torch.tensor([0, 1, 2, 2**40], device=device))
    table.erase(1, torch.tensor([1, 2], device=device))
    request = []
    for member, ids in features:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
        weights = torch.rand(len(ids), device=device) if data.draw(st.booleans()) else None
        request.append(feature(ids, [0, *cuts, len(ids)], member, ops.gather.MEAN, device, weights))
    lookup = table.lookup(request, train=True)
    flat = [(member, i) for member, ids in features for i in ids]
    found = [int(table.rows(member, torch.tensor([i], device=device))) for member, i in flat]
    assert lookup.rows.tolist() == found
    assert len(set(zip(found, flat, strict=True))) == len(set(found)) == len(set(flat))
    by_rows = ops.gather.group_rows(lookup.rows, lookup.request.members, lookup.row_bound, lookup.sources)
    by_row, by_id = dict(_groups(by_rows)), dict(_groups(lookup.groups))
    assert by_id == by_row
    assert len(table) == len(set(flat) | {(1, 0), (1, 2**40)})
    first = make_table(members=3, dim=4, device=device)
    for member, i in set(flat):
        ids = torch.tensor([i], device=device)
        first.insert(member, ids)
        assert torch.equal(table.export(member, ids)["embedding"], first.export(member, ids)["embedding"])


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "length"), [(4, 7), (16, 9000), (16, 40_000), (20, 5000), (64, 300), (128, 5000)])
def test_a_training_lookup_gathers_in_the_same_pass(device: str, dtype: torch.dtype, dim: int, length: int) -> None:
    table = make_table(members=2, dim=dim, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(dim)
    # Two features of one member table, one of another, and one without ids.
    ids = [torch.randint(0, length, (n,), generator=generator).tolist() for n in (length, 3, length, 0)]
    request = Request.of([feature(part, None, m, device=device) for part, m in zip(ids, (0, 0, 1, 1), strict=True)])
    starts = [0, *itertools.accumulate(-(-len(part) * dim // 16) * 16 for part in ids)]
    fused, separate = torch.full((starts[-1],), 7.0, device=device), torch.full((starts[-1],), 7.0, device=device)
    lookup = table.find(request, train=True, out=fused, starts=starts[:-1])
    assert lookup.gathered is fused
    table.gather(lookup, separate, starts[:-1])
    assert torch.equal(fused, separate)
    for start, part in zip(starts, ids, strict=False):
        assert not bool((fused[start : start + len(part) * dim] == 7.0).any())


def _groups(groups: RowGroups) -> list[tuple[int, list[tuple[int, float]]]]:
    count = int(groups.count)
    starts, sources = groups.offsets.tolist(), groups.sources.tolist()
    scales = [1.0] * len(sources) if groups.scales is None else groups.scales.tolist()
    parts = [list(zip(sources[a:b], scales[a:b], strict=True)) for a, b in itertools.pairwise(starts[: count + 1])]
    return list(zip(groups.unique[:count].tolist(), parts, strict=True))


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 6))
def test_reduction_does_not_depend_on_the_number_of_threads(dim: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randint(0, 10**spread, (40_000,), generator=generator)
    gradient = torch.randn(40_000, dim, generator=generator)
    before, outs = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        groups = groups_of(rows.tolist())
        out = torch.zeros(40_000, dim)
        ops.update.reduce_rows(Gradients([gradient], groups), out)
        outs.append(out)
    torch.set_num_threads(before)
    assert torch.equal(*outs)


def test_schemas_and_fakes_of_operators() -> None:
    table = make_table(dim=4)
    lookup = table.lookup([feature([1, 2, 1], combiner=0)], train=True)
    groups = lookup.groups
    grouped = ([torch.ones(3, 4)], groups.count, groups.unique, groups.offsets, groups.sources, None, torch.ones(1))
    words = [torch.empty(4, dtype=torch.int64) for _ in range(4)]
    records, check = (*table.store.blocks.whole(), 0, 0, 4, 1, True, 7), torch.library.opcheck
    check(torch.ops.recis.group_rows.default, (lookup.rows, [0], 2, *singles(3), *words[:3], None, words[3][:1]))
    check(
        torch.ops.recis.distinct_ids.default,
        (
            [torch.tensor([1, 7, 1])],
            [0],
            [],
            [-1],
            2,
            *singles(3),
            *words[:3],
            None,
            words[3][:1],
            torch.ones(3).long(),
            torch.ones(3).long(),
            torch.zeros(2, 1).long(),
        ),
    )
    table.store.blocks.reserve(10)
    check(
        torch.ops.recis.insert_grouped.default,
        (
            table.store.id_map.slots.header,
            table.store.id_map.counters,
            table.store.id_map.free_rows,
            *table.store.blocks.whole(),
            0,
            4,
            torch.zeros(1, 5, dtype=torch.int64),
            [],
            [],
            [],
            [],
            [torch.tensor([1, 7, 1])],
            [0],
            [],
            10,
            *singles(3),
            torch.empty(3, dtype=torch.int64),
            *words[:3],
            None,
            words[3][:1],
        ),
    )
    check(torch.ops.recis.reduce_rows.default, (*grouped, torch.zeros(3, 4)))
    check(torch.ops.recis.sum_squares.default, (torch.ones(3, 4), groups.count))
    check(torch.ops.recis.clip_rows.default, (torch.ones(3, 4), groups.count, torch.ones(1), 1.0))
    check(torch.ops.recis.update_rows.default, (*records, *grouped, 0, [], [0.1, 0.0], 1))
    check(torch.ops.recis.update_rows.default, (*records, *grouped, 4, [0, 0], [0.1, 0.9, 0.999, 1e-8, 0.0], 1))
    steps = torch.zeros(2 * ops.update.STEP_BYTES, dtype=torch.uint8)
    check(torch.ops.recis.record_steps.default, (0, [], [0.1, 0.5], 1, 7, 9, [0.0] * 3, [-0.1, 0.0, 0.0], steps))
    late = (*table.store.blocks.whole(), 0, 0, 4, 2, groups.count, groups.unique, steps, 1, 0, 0, True, [])
    check(torch.ops.recis.catch_up_rows.default, late)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 0}, "steps count from 1"),
        ({"kind": ops.update.RULES["lamb"]}, "cannot be caught up on: 12"),
        ({"scaled": [0, 0, 0]}, "at most 2 fields"),
        ({"replays": -1}, "steps count from 1"),
        ({"step": 3}, "steps are missing"),
    ],
)
def test_steps_that_cannot_be_caught_up_on_are_refused(change: dict[str, Any], message: str) -> None:
    table = make_table(dim=4)
    lookup = table.lookup([feature([1, 2, 1], combiner=0)], train=True)
    step = change.get("step", 2)
    replay = ops.update.Replay(0, 1, 0, True, [])._replace(**{k: v for k, v in change.items() if k != "step"})
    steps = torch.zeros(2 * ops.update.STEP_BYTES, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=message):
        ops.update.catch_up_rows(
            table.store.blocks.whole(), 0, 0, 4, step, lookup.groups.count, lookup.groups.unique, steps, replay
        )


def test_steps_of_an_unknown_rule_are_not_recorded() -> None:
    steps = torch.zeros(ops.update.STEP_BYTES, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="cannot be recorded: 12"):
        ops.update.record_steps(ops.update.Rule(12, [], []), 1, 0, 0, [0.0] * 3, [0.0] * 3, steps)
    with pytest.raises(RuntimeError, match="whole steps"):
        ops.update.record_steps(ops.update.Rule(0, [], [0.1, 0.0]), 1, 0, 0, [0.0] * 3, [0.0] * 3, steps[1:])


@pytest.mark.parametrize(
    ("kind", "offsets", "values", "message"),
    [(99, [], [], "unknown rule: 99"), (0, [0] * 9, [], "too many offsets"), (0, [], [0.0] * 9, "or values")],
)
def test_unknown_rules_are_refused(kind: int, offsets: list[int], values: list[float], message: str) -> None:
    table = make_table(dim=4)
    lookup = table.lookup([feature([1, 2, 1], combiner=0)], train=True)
    records, gradients = table.records(Gradients([torch.ones(3, 4)], lookup.groups))
    with pytest.raises(RuntimeError, match=message):
        ops.update.update_rows(records, gradients, ops.update.Rule(kind, offsets, values), 1)


def test_rules_have_the_numbers_of_the_kernels(root: Path) -> None:
    source = (root / "csrc" / "core" / "rules" / "rule.h").read_text()
    found = {name.lower(): int(number) for name, number in re.findall(r"  k(\w+) = (\d+),", source)}
    assert {name.replace("_", ""): number for name, number in ops.update.RULES.items()} == found
