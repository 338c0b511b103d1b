"""Operators of caches beside a model: places, replaced ways, records and counters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recis_hybrid import ops
from recis_hybrid.ops.cache import BYPASSED, HITS, MISSES, WRITTEN_BACK
from tests.support.caches import FLOATS, Cached
from tests.support.devices import on_devices


@pytest.mark.quick
@on_devices
@pytest.mark.parametrize("sets", [1, 2])
def test_records_are_current_and_the_least_used_are_replaced(device: str, sets: int) -> None:
    random = np.random.default_rng(sets)
    cached = Cached(device, rows=96, sets=sets)
    for number in range(10):
        # Small rows are frequent; now and then a lookup has more rows than the cache.
        count = 80 if number % 5 == 4 else 24
        shares = 1 / np.arange(1, 97)
        rows = random.choice(96, count, replace=False, p=shares / shares.sum()).tolist()
        cached.admit(rows, number, number // 3)
        assert np.array_equal(cached.read([*rows, 3]), cached.values[[*rows, 3]])
        some = sorted({*rows[::2], 0, 95})
        cached.write(some, random.standard_normal((len(some), FLOATS)).astype(np.float32))
        assert np.array_equal(cached.read(list(range(96))), cached.values)
        if number % 4 == 3:
            before = cached.counters()[WRITTEN_BACK]
            dirty = int((cached.cache.states & 1).sum())
            held = cached.held()
            ops.cache.write_back(cached.blocks, cached.cache)
            assert np.array_equal(cached.host.cpu(), cached.values)
            assert cached.counters()[WRITTEN_BACK] - before == dirty > 0
            assert int((cached.cache.states & 1).sum()) == 0
            assert cached.held() == held
    assert min(cached.counters()[counter] for counter in (HITS, MISSES, BYPASSED)) > 0


@on_devices
def test_rows_without_a_record_are_their_own_places(device: str) -> None:
    cached = Cached(device, rows=64, sets=2)
    cached.admit([5, 6, 7], 0, 0)
    assert cached.places([-1, 5, 63, -1]).tolist()[::3] == [-1, -1]


@on_devices
def test_a_row_too_large_for_a_tag_is_not_cached(device: str) -> None:
    cached = Cached(device, rows=64, sets=1)
    far = 2**32 - 1  # its tag would be that of an empty way
    count, rows = torch.tensor([2], device=device), torch.tensor([3, far], device=device)
    ops.cache.admit(cached.blocks, cached.cache, count, rows, 0, 0)
    assert cached.places([3, far]).tolist() == [64 + cached.held()[3], far]
    assert cached.counters() == [0, 2, 1, 0]
    assert ops.cache.locate(cached.cache, torch.tensor([2**39 + 3], device=device)).tolist() == [2**39 + 3]


@on_devices
def test_numbers_of_lookups_and_epochs_wrap_around(device: str) -> None:
    cached = Cached(device, rows=64, sets=1)
    cached.admit(list(range(30)), 2**24 - 3, 2**16 - 1)
    cached.admit([0, *range(1, 20)], 2**24 - 2, 2**16)
    cached.admit([30, 31, 32, 40], 2**24 - 1, 2**16 + 1)
    assert set(cached.held()) >= {*range(20), 30, 31, 32, 40}


def test_schemas_and_fakes_of_operators() -> None:
    cached, check = Cached("cpu", rows=32, sets=1), torch.library.opcheck
    count, rows, missing = torch.tensor([3]), torch.tensor([4, 2, 9]), torch.zeros(3, dtype=torch.uint8)
    check(torch.ops.recis.cache_admit.default, (*cached.blocks, *cached.cache, count, rows, missing, 1, 0))
    for used, writes in ((None, False), (count, True)):
        check(torch.ops.recis.cache_locate.default, (*cached.cache, rows, used, writes, torch.empty_like(rows)))
    check(torch.ops.recis.cache_write_back.default, (*cached.blocks, *cached.cache))


def test_operators_check_the_sizes_of_a_cache() -> None:
    cached = Cached("cpu", rows=32, sets=1)
    rows = torch.tensor([1])
    bad = {"tags": torch.zeros(33, dtype=torch.int32), "counters": torch.zeros(4, dtype=torch.int64)}
    for name, tensor in bad.items():
        with pytest.raises(RuntimeError, match=f"{name} .*must be"):
            ops.cache.locate(cached.cache._replace(**{name: tensor}), rows)
