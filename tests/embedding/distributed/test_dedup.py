"""Distinct ids by owner: the native operator and its torch equivalent against plain Python."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from recis_hybrid.embedding.distributed.dedup import Distinct, Kind, distinct_by_sorting, distinct_ids, rank_of
from recis_hybrid.embedding.table.lookup import FeatureIds, Request
from recis_hybrid.ops.gather import MEAN, SOURCE_SHIFT
from recis_hybrid.ops.id_map import bucket_of
from recis_hybrid.ops.update import Gradients, reduce_rows
from tests.support import emulated
from tests.support.devices import EDGE_IDS, on_accelerators, on_devices
from tests.support.tables import feature

KINDS = [Kind(0, 0, None), Kind(1, 1, None), Kind(0, -1, None), Kind(2, 2, 1)]


def plain(request: Request, kind_of: list[int], ranks: int) -> dict[tuple[int, int, int], list[int]]:
    """Return the positions by (owner, kind, id)."""
    found: dict[tuple[int, int, int], list[int]] = {}
    position = 0
    for ids, kind in zip(request.ids, kind_of, strict=True):
        for key in ids.tolist():
            owner = KINDS[kind].owner
            if owner is None:
                owner = int(bucket_of(torch.tensor([key]))) * ranks // 65536
            found.setdefault((owner, kind, key), []).append(position)
            position += 1
    return found


def check(found: Distinct, expected: dict[tuple[int, int, int], list[int]], ranks: int) -> None:
    count = int(found.sizes.sum())
    assert count == len(expected)
    share = torch.arange(ranks * len(KINDS)).repeat_interleave(found.sizes.cpu().view(-1))
    places = found.places.tolist()
    assert found.counts[count:].tolist() == [0] * (found.counts.numel() - count)
    for number, (key, at) in enumerate(zip(found.ids[:count].tolist(), share.tolist(), strict=True)):
        positions = expected[divmod(at, len(KINDS))[0], at % len(KINDS), key]
        assert int(found.counts[number]) == len(positions)
        assert [place for place, where in enumerate(places) if where == number] == positions


ids = st.lists(st.sampled_from(EDGE_IDS) | st.integers(0, 20), max_size=40)


@on_devices
@given(
    features=st.lists(st.tuples(ids, st.integers(0, 3)), min_size=1, max_size=5),
    ranks=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_distinct_ids_by_owner_and_kind(
    device: str, features: list[tuple[list[int], int]], ranks: int, seed: int
) -> None:
    if device == "emulated":
        emulated.configure(seed=seed)
    request = Request.of([feature(keys, member=KINDS[kind].member, device=device) for keys, kind in features])
    kind_of = [kind for _, kind in features]
    expected = plain(request, kind_of, ranks)
    native = distinct_ids(request, kind_of, KINDS, ranks)
    check(native, expected, ranks)
    check(distinct_by_sorting(request, kind_of, KINDS, ranks), expected, ranks)
    everyone = distinct_ids(request, kind_of, KINDS, ranks, deduplicate=False)
    assert int(everyone.sizes.sum()) == sum(request.bags.lengths)
    assert sorted(everyone.places.tolist()) == list(range(sum(request.bags.lengths)))
    # Summing position numbers by group yields the sum of each id's positions, in the order of the ids.
    assert native.groups is not None
    count = len(expected)
    sums = torch.zeros(max(count, 1), 1, device=device)
    starts = [sum(request.bags.lengths[:f]) for f in range(len(features))]
    values = [
        torch.arange(start, start + n, dtype=torch.float32, device=device).view(-1, 1)
        for start, n in zip(starts, request.bags.lengths, strict=True)
    ]
    reduce_rows(Gradients(values, native.groups), sums)
    by_place = {native.places[positions[0]].item(): float(sum(positions)) for positions in expected.values()}
    assert sums[:count, 0].tolist() == [by_place[number] for number in range(count)]


@on_devices
@pytest.mark.parametrize("threads", [1, 2])
def test_distinct_ids_do_not_depend_on_threads(device: str, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = [
        torch.randint(-(2**63), 2**63 - 1, (9000,), generator=generator)[torch.randint(0, 9000, (20_000,))]
        for _ in range(3)
    ]
    request = Request.of([feature(part, member=k % 2, device=device) for k, part in enumerate(keys)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = distinct_ids(request, [0, 1, 0], KINDS, 3)
    finally:
        torch.set_num_threads(before)
    count = int(found.sizes.sum())
    whole = torch.cat(keys).to(device)
    assert torch.equal(found.ids[found.places], whole)
    assert int(found.counts[:count].sum()) == 60_000
    owners = torch.arange(3, device=device).repeat_interleave(found.sizes.sum(1))
    assert torch.equal(rank_of(found.ids[:count].contiguous(), 3), owners)
    again = distinct_ids(request, [0, 1, 0], KINDS, 3)
    assert torch.equal(again.ids[:count], found.ids[:count])
    assert torch.equal(again.places, found.places)


def partly_used(device: str) -> Request:
    """Return a request for the ids 5 | 6 5 (7) and 7, 5, of which one is not in use."""
    offsets = torch.tensor([0, 1, 3], device=device)
    used = FeatureIds(torch.tensor([5, 6, 5, 7], device=device), 2, 0, offsets, combiner=MEAN, used=offsets)
    return Request.of([used, feature([7, 5], device=device)])


@on_devices
def test_unused_ids_are_ignored(device: str) -> None:
    found = distinct_by_sorting(partly_used(device), [0, 0], KINDS, 1)
    assert found.ids[: int(found.sizes.sum())].tolist() == [5, 6, 7]
    assert found.places.tolist() == [0, 1, 0, -1, 2, 0]


@on_accelerators
def test_unused_ids_belong_to_no_group(device: str) -> None:
    found = distinct_ids(partly_used(device), [0, 0], KINDS[:1], 1)
    assert found.ids[:3].tolist() == [5, 6, 7]
    assert found.counts.tolist() == [3, 1, 1, 0, 0, 0]
    assert found.places.tolist() == [0, 1, 0, -1, 2, 0]
    assert found.sizes.tolist() == [[3]]
    groups = found.groups
    assert groups is not None
    assert groups.scales is not None
    assert groups.count.tolist() == [3]
    assert groups.offsets[:4].tolist() == [0, 3, 4, 5]
    second = 1 << SOURCE_SHIFT
    assert groups.sources[:5].tolist() == [0, 1, second + 1, 1, second]
    assert groups.scales[:5].tolist() == [1, 0.5, 1, 0.5, 1]


@on_accelerators
def test_a_request_without_ids(device: str) -> None:
    found = distinct_ids(Request.of([feature([], device=device)]), [1], KINDS, 2)
    assert found.sizes.tolist() == [[0] * 4] * 2
    assert found.groups is not None
    assert (found.groups.count.tolist(), found.groups.offsets.tolist()) == ([0], [0])


@pytest.mark.emulated
def test_the_device_is_not_waited_for() -> None:
    request = Request.of([feature(range(50), member=k % 2, device="emulated") for k in range(100)])
    with emulated.schedule(late=1):
        emulated.clear_counts()
        distinct_ids(request, [k % 2 for k in range(100)], KINDS, 3)
        counts = emulated.counts()
    assert counts["synchronizations"] == counts["pageable_copies"] == counts["copies_from_device"] == 0
