"""The count-min sketch against a model in Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recis_hybrid import ops
from tests.support.devices import EDGE_IDS, on_devices

WORD = (1 << 64) - 1


def bucket_hash(number: int) -> int:
    x = (number ^ 0x5851F42D4C957F2D) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


class Model:
    """Cells of some blocks of member tables."""

    def __init__(self, first: int, blocks: int, shift: int, bits: int) -> None:
        self.first, self.blocks, self.shift, self.bits = first, blocks, shift, bits
        self.cells: dict[tuple[int, int, int, int], int] = {}

    def places(self, member: int, number: int) -> list[tuple[int, int, int, int]]:
        """Return the cells of an id: member table, block, row and cell; none if its block is elsewhere."""
        hashed = bucket_hash(number)
        block = (hashed >> self.shift) - self.first
        if not 0 <= block < self.blocks:
            return []
        return [(member, block, row, (hashed >> 6 * row) % (128 // self.bits)) for row in range(ops.id_map.SKETCH_ROWS)]

    def add(self, member: int, number: int, count: int) -> None:
        for place in self.places(member, number):
            self.cells[place] = min(self.cells.get(place, 0) + count, (1 << self.bits) - 1)

    def count(self, member: int, number: int) -> int:
        return min((self.cells.get(place, 0) for place in self.places(member, number)), default=0)

    def words(self, members: int) -> list[int]:
        words = [0] * (members * self.blocks * ops.id_map.SKETCH_WORDS)
        for (member, block, row, cell), count in self.cells.items():
            bit = cell * self.bits
            at = (member * self.blocks + block) * ops.id_map.SKETCH_WORDS + 2 * row + bit // 64
            words[at] |= count << bit % 64
        return words


def words_of(words: Tensor) -> list[int]:
    return [word & WORD for word in words.flatten().tolist()]


@on_devices
@pytest.mark.parametrize("bits", ops.id_map.CELL_BITS)
def test_ids_are_counted_as_by_the_model(device: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    # Three quarters of the blocks of eight, so that the ids of some buckets are elsewhere.
    model = Model(first=1, blocks=6, shift=61, bits=bits)
    words = torch.zeros(2, 6, ops.id_map.SKETCH_WORDS, dtype=torch.int64, device=device)
    pool = torch.cat([torch.tensor(EDGE_IDS), torch.randint(-(2**63), 2**63 - 1, (60,), generator=generator)])
    least = min(3, (1 << bits) - 1)
    for _ in range(3):
        ids = [pool[torch.randint(0, len(pool), (n,), generator=generator)] for n in (90, 40, 30)]
        members, lengths = [0, 1, 0], [90, 25, 0]
        used = [torch.tensor([n]) for n in lengths]
        rows = torch.randint(-1, 2, (160,), generator=generator)
        counts = torch.randint(1, 4, (160,), generator=generator)
        admitted = torch.empty(160, dtype=torch.uint8, device=device)
        ops.id_map.sketch_admit(
            words,
            1,
            61,
            bits,
            [part.to(device) for part in ids],
            members,
            rows.to(device),
            least,
            admitted,
            used=[part.to(device) for part in used],
            counts=counts.to(device),
        )
        flat = [
            (m, i, at < n)
            for m, part, n in zip(members, ids, lengths, strict=True)
            for at, i in enumerate(part.tolist())
        ]
        for (member, number, valid), row, count in zip(flat, rows.tolist(), counts.tolist(), strict=True):
            if valid and row < 0:
                model.add(member, number, count)
        assert words_of(words) == model.words(2)
        expected = [
            row >= 0 or (valid and model.count(member, number) >= least)
            for (member, number, valid), row in zip(flat, rows.tolist(), strict=True)
        ]
        assert admitted.bool().tolist() == expected
    for times in range(1, bits + 1):
        halved = words.clone()
        ops.id_map.sketch_halve(halved, bits, times)
        smaller = Model(1, 6, 61, bits)
        smaller.cells = {place: count >> times for place, count in model.cells.items()}
        assert words_of(halved) == smaller.words(2)


def test_arguments_are_checked() -> None:
    words, ids = torch.zeros(1, 4, ops.id_map.SKETCH_WORDS, dtype=torch.int64), torch.arange(2)
    none, admitted = torch.full((2,), -1), torch.empty(2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a cell has 2, 4, 8 or 16 bits, got 3"):
        ops.id_map.sketch_admit(words, 0, 62, 3, [ids], [0], none, 1, admitted)
    with pytest.raises(RuntimeError, match="there is no member table 1"):
        ops.id_map.sketch_admit(words, 0, 62, 4, [ids], [1], none, 1, admitted)
    with pytest.raises(RuntimeError, match="counts and admitted must hold one element for each id"):
        ops.id_map.sketch_admit(words, 0, 62, 4, [ids], [0], none, 1, admitted[:1])
    with pytest.raises(RuntimeError, match="cells are halved 1 to 4 times, got 5"):
        ops.id_map.sketch_halve(words, 4, 5)


def test_schemas_and_fakes_of_operators() -> None:
    words, ids = torch.zeros(1, 4, ops.id_map.SKETCH_WORDS, dtype=torch.int64), torch.arange(5)
    admitted = torch.empty(5, dtype=torch.uint8)
    check = torch.library.opcheck
    check(
        torch.ops.recis.sketch_admit.default,
        (words, 0, 62, 4, [ids], [0], [ids], torch.full((5,), -1), torch.ones_like(ids), 2, admitted),
    )
    check(torch.ops.recis.sketch_halve.default, (words, 4, 1))
