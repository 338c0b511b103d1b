"""Sketch: approximate counts of ids in fixed memory, split by bucket.

Letters: M member tables, K blocks of a member table on this rank, C cells of a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.checkpointing import BUCKETS
from recis_hybrid.embedding.gate import TableShare
from recis_hybrid.ops.id_map import SKETCH_ROWS as ROWS, SKETCH_WORDS as WORDS

_BLOCK_BYTES = 8 * WORDS
LEAST_BYTES = 1 << 16
"""1,024 blocks, each for 64 buckets."""
_SALT = 0x5851F42D4C957F2D
_LEVEL_BITS = 6
_LEAST_LEVEL, _MOST_LEVEL = (BUCKETS - 1).bit_length(), 40
"""Levels in checkpoints. In the lowest, each bucket has one block, so that ranks can load those of their buckets."""


class Sketch:
    """A count-min sketch for each member table, in blocks of 64 bytes; see ``csrc/core/sketch.h``.

    Each member table has blocks of its own, and so has each bucket in a sketch of 4 MiB or more. So counts depend
    neither on coalescing nor on the number of ranks, and a checkpoint of a sketch can be loaded by any number of ranks.

    In a smaller sketch, a block is shared by a range of buckets. If these belong to two ranks, both have the block, and
    each counts its own ids there: counts are then lower than on one rank, but never too low. Ranks whose number is a
    power of two, up to the number of blocks, share none.

    Args:
        size: Bytes of each member table over all ranks, a power of two.
        cell_bits: Bits of a cell.
        share: The member tables and buckets on this rank.
    """

    def __init__(self, size: int, cell_bits: int, share: TableShare) -> None:
        self._cell_bits = cell_bits
        self._level = (size // _BLOCK_BYTES).bit_length() - 1
        """log2 of the number of blocks of all buckets."""
        self._buckets = share.buckets
        first, end = share.buckets
        self._first = (first << self._level) // BUCKETS
        blocks = -(-(end << self._level) // BUCKETS) - self._first if first < end else 0
        shape = len(share.members), blocks, WORDS
        # Memory that is never written takes no space on the CPU.
        zeros = ops.memory.zero_bytes(math.prod(shape) * 8, share.device)
        self._words = zeros.view(torch.int64).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks on this rank."""
        return self._words.nbytes

    def admit(
        self,
        ids: Sequence[Tensor],
        members: Sequence[int],
        rows: Tensor,
        used: Sequence[Tensor],
        counts: Tensor | None,
        least: int,
    ) -> Tensor:
        """Count ids without a row, and return which ids have a row or may have the count; as ``Gate.admitted``."""
        admitted = torch.empty(rows.numel(), dtype=torch.uint8, device=rows.device)
        ops.id_map.sketch_admit(
            self._words,
            self._first,
            64 - self._level,
            self._cell_bits,
            ids,
            members,
            rows,
            least,
            admitted,
            used=used,
            counts=counts,
        )
        return admitted

    def halve(self, times: int) -> None:
        """Halve all counts ``times`` times, rounding down."""
        if self._words.numel() > 0:
            ops.id_map.sketch_halve(self._words, self._cell_bits, min(times, self._cell_bits))

    def clear(self, member: int | None) -> None:
        """Set the counts of a member table, or of all, to zero."""
        (self._words if member is None else self._words[member]).zero_()

    @property
    def _column(self) -> str:
        return f"cells{self._cell_bits}"

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of :meth:`state_dict` without rows."""
        none = torch.empty(0, dtype=torch.int64, device=self._words.device)
        return {"ids": none, self._column: none.view(0, WORDS)}

    def state_dict(self, member: int) -> dict[str, Tensor]:
        """Return the blocks that are not empty.

        Returns:
            ``ids``, int64 ``[n]``, ascending: for each block, the id whose bucket hash begins with the bits of the
            block's number and ends with their number, so that blocks lie in the buckets of the ids that they count. And
            ``cells2``, ``cells4``, ``cells8`` or ``cells16`` by the bits of a cell, int64 ``[n, 8]``: the blocks. A
            block of several buckets is repeated for each of them.
        """
        words = self._words[member]
        at = (words != 0).any(1).nonzero().view(-1)
        numbers, level = at + self._first, self._level
        if level < _LEAST_LEVEL:
            each = 1 << (_LEAST_LEVEL - level)
            numbers = (numbers[:, None] * each + torch.arange(each, device=at.device)).view(-1)
            mine = (numbers >= self._buckets[0]) & (numbers < self._buckets[1])
            numbers, at, level = numbers[mine], at.repeat_interleave(each)[mine], _LEAST_LEVEL
        ids, order = _with_hash(numbers << (64 - level) | level).sort()
        return {"ids": ids, self._column: words[at[order]]}

    def load_state_dict(self, member: int, state: dict[str, Tensor]) -> None:
        """Load blocks that :meth:`state_dict` returned for a sketch with cells of the same size, but maybe more bytes.

        No count becomes too low. In a larger sketch, the ids of a block are spread over several, each of which starts
        with its cells; in a smaller one, the higher of two cells remains.
        """
        words = self._words[member]
        hashes = _hash(state["ids"].to(words.device))
        level = hashes & ((1 << _LEVEL_BITS) - 1)
        if bool(((level < _LEAST_LEVEL) | (level > _MOST_LEVEL)).any()):
            raise ValueError(f"the ids of {self._column} must be those of blocks of a sketch")
        cells = state[self._column].to(words.device)
        for saved in level.unique().tolist():
            mine = level == saved
            number, blocks = _shifted(hashes[mine], 64 - saved), cells[mine]
            if saved < self._level:
                children = 1 << (self._level - saved)
                number = (number[:, None] * children + torch.arange(children, device=number.device)).view(-1)
                blocks = blocks.repeat_interleave(children, 0)
            number = (number >> max(saved - self._level, 0)) - self._first
            here = (number >= 0) & (number < words.size(0))
            self._merge(words, number[here], blocks[here])

    def _merge(self, words: Tensor, number: Tensor, blocks: Tensor) -> None:
        """Raise the cells of blocks (numbers, int64 ``[n]``, some maybe several times) to those given."""
        unique, place = number.unique(return_inverse=True)
        cells = self._unpacked(words[unique])
        cells.scatter_reduce_(0, place[:, None].expand(-1, cells.size(1)), self._unpacked(blocks), "amax")
        words[unique] = self._packed(cells)

    def _unpacked(self, blocks: Tensor) -> Tensor:
        """Return the cells of blocks (int64 ``[n, 8]``), int64 ``[n, C]``."""
        shifts = torch.arange(0, 64, self._cell_bits, device=blocks.device)
        return ((blocks[:, :, None] >> shifts) & ((1 << self._cell_bits) - 1)).view(blocks.size(0), -1)

    def _packed(self, cells: Tensor) -> Tensor:
        shifts = torch.arange(0, 64, self._cell_bits, device=cells.device)
        return (cells.view(cells.size(0), WORDS, -1) << shifts).sum(2)


def false_positive_rate(size: int, cell_bits: int, count: int, ids: int) -> float:
    """Return the rate of :meth:`MinFrequency.false_positives`."""
    load = ids * _BLOCK_BYTES / size
    cells = 8 * _BLOCK_BYTES // (ROWS * cell_bits)
    most = int(load + 12 * math.sqrt(load) + 30)
    rate = 0.0
    for j in range(count - 1, most + 1):
        weight = math.exp(j * math.log(load) - load - math.lgamma(j + 1)) if load > 0 else float(j == 0)
        fewer = sum(math.comb(j, c) * (1 / cells) ** c * (1 - 1 / cells) ** (j - c) for c in range(count - 1))
        rate += weight * max(1 - fewer, 0.0) ** ROWS
    return rate


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Return unsigned words shifted right."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _hash(ids: Tensor) -> Tensor:
    """Return the bucket hash of ids; ``bucket_hash`` of ``csrc/core/hash/mix.h``."""
    x = ids ^ _SALT
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shifted(x, 31)


def _with_hash(hashes: Tensor) -> Tensor:
    """Return the ids with some bucket hashes."""
    x = hashes ^ _shifted(hashes, 31) ^ _shifted(hashes, 62)
    x = x * _signed(pow(0x94D049BB133111EB, -1, 1 << 64))
    x = x ^ _shifted(x, 27) ^ _shifted(x, 54)
    x = x * _signed(pow(0xBF58476D1CE4E5B9, -1, 1 << 64))
    return x ^ _shifted(x, 30) ^ _shifted(x, 60) ^ _SALT


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
