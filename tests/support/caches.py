"""Small GPU caches: placements, and a model of a cache beside blocks in a numpy array."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Placement
from recis_hybrid.ops.blocks import Blocks
from recis_hybrid.ops.cache import BYTES_OF_A_WAY, COUNTER_COPIES, COUNTERS, WAYS, Cache


def cached(sets: int, optimizer: Any, id_map: Literal["cpu", "cuda"] = "cuda", **config: Any) -> Placement:
    """Return pinned blocks with a cache of ``sets`` sets for the rows of an EmbeddingConfig and an optimizer."""
    engine = EmbeddingEngine({"id": EmbeddingConfig(**config)}, optimizer=optimizer, group=False)
    record_bytes = engine.tables[0].layout.record_bytes
    return Placement(id_map=id_map, blocks="pinned", cache_bytes=sets * WAYS * (record_bytes + BYTES_OF_A_WAY))


FLOATS, SHIFT = 12, 4
"""Floats of a record, the last four of which are metadata; binary logarithm of the rows per block."""
_COUNT_BITS, _EPOCH_BITS = 23, 16


class Cached:
    """A cache before blocks of ``rows`` rows; ``values`` holds the current records."""

    def __init__(self, device: str, rows: int, sets: int) -> None:
        assert rows % (1 << SHIFT) == 0
        ways, self.device, self.rows, self.sets = sets * WAYS, device, rows, sets
        self.values = np.random.default_rng(0).standard_normal((rows, FLOATS)).astype(np.float32)
        self.host = torch.tensor(self.values, device=device)
        self.records = torch.full((ways, FLOATS), torch.nan, device=device)
        size = 4 * FLOATS
        starts = [self.host.data_ptr() + r * size for r in range(0, rows, 1 << SHIFT)]
        starts += [self.records.data_ptr() + w * size for w in range(0, ways, 1 << SHIFT)]
        self.blocks = Blocks(torch.tensor(starts, device=device), SHIFT, size - 16, size)
        self.cache = Cache(
            torch.zeros(ways, dtype=torch.int32, device=device),
            torch.zeros(ways, dtype=torch.int64, device=device),
            torch.zeros(COUNTER_COPIES, COUNTERS, dtype=torch.int64, device=device),
            rows,
        )

    def counters(self) -> list[int]:
        counts: list[int] = self.cache.counters.sum(0).tolist()
        return counts

    def held(self) -> dict[int, int]:
        """Return the way of each row that the cache holds."""
        tags = self.cache.tags.cpu().numpy().view(np.uint32).astype(np.int64)
        ways = np.flatnonzero(tags)
        rows = (tags[ways] - 1) * self.sets + ways // WAYS
        assert len(set(rows.tolist())) == len(rows)
        return dict(zip(rows.tolist(), ways.tolist(), strict=True))

    def admit(self, rows: list[int], lookup: int, epoch: int) -> None:
        """Admit rows, and check which ways were replaced."""
        before, states = self.held(), self.cache.states.tolist()
        counts = np.array(self.counters())
        buffer = torch.tensor([*rows, *rows[:3]], device=self.device)  # those past the count do not exist
        ops.cache.admit(self.blocks, self.cache, torch.tensor([len(rows)], device=self.device), buffer, lookup, epoch)
        after, expected = self.held(), dict(before)
        hits = [row for row in rows if row in before]
        missing = Counter(row % self.sets for row in rows if row not in before)
        bypassed = written = 0
        for number, misses in missing.items():
            used = {before[row] for row in hits if row % self.sets == number}
            free = [way for way in range(number * WAYS, (number + 1) * WAYS) if way not in used]
            free.sort(key=lambda way: (_score(states[way], 1 + lookup % (2**24 - 1), epoch), way))
            replaced = free[:misses]
            bypassed += misses - len(replaced)
            written += sum(states[way] & 1 for way in replaced)
            expected = {row: way for row, way in expected.items() if way not in replaced}
            new = {row: way for row, way in after.items() if way in replaced}
            assert set(new.values()) == set(replaced)
            assert all(row in rows and row not in before for row in new)
            expected |= new
        assert after == expected
        assert (np.array(self.counters()) - counts).tolist() == [
            len(hits),
            len(rows) - len(hits),
            bypassed,
            written,
        ]

    def places(self, rows: list[int], *, writes: bool = False) -> Tensor:
        """Return the places of rows, and check them."""
        found = ops.cache.locate(self.cache, torch.tensor(rows, dtype=torch.int64, device=self.device), writes=writes)
        held = self.held()
        assert found.tolist() == [self.rows + held[row] if row in held else row for row in rows]
        return found

    def read(self, rows: list[int]) -> Tensor:
        places = self.places(rows)
        values = torch.empty(len(rows), FLOATS, device=self.device)
        ops.blocks.read(self.blocks, places, 0, values)
        return values.cpu()

    def write(self, rows: list[int], values: np.ndarray) -> None:
        self.values[rows] = values
        ops.blocks.write(self.blocks, self.places(rows, writes=True), 0, torch.tensor(values, device=self.device))


def _score(state: int, lookup: int, epoch: int) -> tuple[int, int]:
    """Return the aged frequency of a way, and minus the number of lookups since it was used."""
    count = state >> 1 & (1 << _COUNT_BITS) - 1
    ago = (epoch - (state >> 1 + _COUNT_BITS)) % (1 << _EPOCH_BITS)
    used = state >> 1 + _COUNT_BITS + _EPOCH_BITS & 2**24 - 1
    return count >> ago, -((lookup - used) % 2**24)
