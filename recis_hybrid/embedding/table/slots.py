"""The slots of an IDMap, which grow in place and in steps.

Lines of four slots lie in the order of the ids' hashes. To grow, chunks are added, and the ids are moved from the last
line down, each to a line after its own: that reads and writes memory in order, and no second map exists meanwhile. A
few lines are moved with each reservation, so that growth never takes long; ids are found in both parts at any time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import is_accelerator, numbers_on
from recis_hybrid.ops.id_map import LINE_SLOTS

CHUNK_LINES = 1 << 15
"""Lines of a chunk, 2 MiB; a power of two."""
PIECE_LINES = {"cpu": 1 << 13, "other": 1 << 16}
"""Lines that are moved at once. On the CPU, they stay in the L2 cache."""
SLACK_LINES = 1 << 12
"""Full lines in a row that can be moved with a piece; ids that are not crafted fill far fewer."""

_READ_LINES = 16
_LINE_WORDS = 2 * LINE_SLOTS
_FRESH_WORK = 3
"""Cost of a line that moves to memory not accessed before, which the system must clear, relative to other lines."""


class Slots:
    """Empty slots in chunks, beside the header by which kernels find them.

    Args:
        lines: Number of lines; rounded up to whole chunks if it exceeds one.
        device: Device of the slots.
    """

    def __init__(self, lines: int, device: torch.device) -> None:
        self._chunk_lines = CHUNK_LINES
        self.lines = lines if lines <= CHUNK_LINES else self._whole(lines)
        self._old_lines = self.lines
        self._first = 0
        """Ids of lines from here on have been moved; 0 if none are left."""
        self._lifted: Tensor | None = None
        self.memory = [_zeros(self.lines, device)]
        """int64 ``[L, 4, 2]`` each: consecutive lines, in whole chunks."""
        words = [0] * ops.id_map.HEADER_WORDS
        words[ops.id_map.LINES] = words[ops.id_map.OLD_LINES] = self.lines
        words[ops.id_map.CHUNK_SHIFT] = self._chunk_lines.bit_length() - 1
        # A tensor created in inference mode cannot be written outside of it.
        with torch.inference_mode(False):
            self.header = numbers_on(device, [*words, *self._addresses(self.memory)])
        """int64 ``[HEADER_WORDS + C]``."""

    def __len__(self) -> int:
        """Return the number of slots."""
        return LINE_SLOTS * self.lines

    @property
    def device(self) -> torch.device:
        """Device of the slots."""
        return self.header.device

    @property
    def can_grow(self) -> bool:
        """True if the slots fill whole chunks, so that chunks can be added."""
        return self.lines >= self._chunk_lines

    @property
    def work_to_do(self) -> int:
        """Work of moving the ids that have not been moved, in lines that move to memory in use."""
        return self._first + (_FRESH_WORK - 1) * self._fresh

    @property
    def _fresh(self) -> int:
        """Lines that wait to be moved to added chunks."""
        return max(0, self._first - self._old_lines**2 // self.lines)

    @property
    def nbytes(self) -> int:
        """Bytes of chunks and header."""
        return sum(part.nbytes for part in self.memory) + self.header.nbytes

    def clear(self) -> None:
        """Empty all slots."""
        for part in self.memory:
            part.zero_()

    def read(self, first: int, end: int) -> Tensor:
        """Return a copy of the lines from ``first`` up to ``end``, int64 ``[end - first, 4, 2]``."""
        parts, begin = [], 0
        for part in self.memory:
            parts.append(part[max(first - begin, 0) : max(end - begin, 0)])
            begin += part.size(0)
        return torch.cat(parts)

    def find_range(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the slots in which the ids lie whose hashes are in a range, and some others; waits for the device.

        Args:
            first: Lowest hash, unsigned.
            end: Greater than every hash; greater than ``first``.

        Returns:
            Copies of the slots, int64 ``[n, 2]``, and their numbers, int64 ``[n]``.
        """
        words: list[int] = self.header[: ops.id_map.CHUNK_SHIFT].tolist()
        lines, old_lines, last_old = (word & (1 << 64) - 1 for word in words)

        def line_of(hash_: int) -> int:
            return hash_ * (old_lines if hash_ <= last_old else lines) >> 64

        def read(begin: int, stop: int) -> Tensor:
            if stop <= lines:
                return self.read(begin, stop)
            return torch.cat([self.read(begin, lines), self.read(max(begin - lines, 0), stop - lines)])

        begin, stop = line_of(first), line_of(end - 1) + 1
        # An id that found its line full is in a later one, after line 0 again, and the lines between are full, too.
        while stop - begin < lines:
            part = read(stop - 1, min(stop - 1 + _READ_LINES, begin + lines))
            not_full = (part[:, -1, 1] == 0).nonzero()
            stop += int(not_full[0]) if not_full.numel() > 0 else part.size(0)
            if not_full.numel() > 0:
                break
        stop = min(stop, begin + lines)
        numbers = torch.arange(LINE_SLOTS * begin, LINE_SLOTS * stop, device=self.device) % (LINE_SLOTS * lines)
        return read(begin, stop).view(-1, 2), numbers

    def entries_at(self, numbers: Tensor) -> Tensor:
        """Return the second words of slots (numbers, int64 ``[n]``), int64 ``[n]``."""
        entries = torch.empty_like(numbers)
        begin = 0
        for part in self.memory:
            end = begin + LINE_SLOTS * part.size(0)
            at = ((numbers >= begin) & (numbers < end)).nonzero().view(-1)
            entries[at] = part.view(-1, 2)[numbers[at] - begin, 1]
            begin = end
        return entries

    def start_moving(self, lines: int) -> None:
        """Add chunks for at least ``lines`` lines in all, to which the ids of all lines will be moved.

        With the present number of lines, only erased slots are dropped. If memory runs out, nothing changes.
        """
        lines = self._whole(lines)
        with torch.inference_mode(False):
            lifted = torch.empty(self._piece + SLACK_LINES, LINE_SLOTS, 2, dtype=torch.int64, device=self.device)
            if lines > self.lines:
                added = _zeros(lines - self.lines, self.device)
                self.header = torch.cat([self.header, numbers_on(self.device, self._addresses([added]))])
                self.memory.append(added)
        self._lifted = lifted
        self._old_lines = self._first = self.lines
        self.lines = lines

    def move(self, work: int, counters: Tensor) -> bool:
        """Move the ids of the next lines.

        Args:
            work: At most ``work_to_do``, of which all is done by as many lines as that needs.
            counters: Counters of the map.

        Returns:
            False if the last line was moved, and it turns out that some were not, because too many in a row were full;
            the map must then be copied. That needs ids that were chosen for it. Waits for the device after the last
            line.
        """
        fresh = min(self._fresh, -(-work // _FRESH_WORK))
        target = self._first - max(fresh, work - (_FRESH_WORK - 1) * fresh)
        while self._first > target:
            assert self._lifted is not None
            first = max(target, self._first - self._piece)
            last_old = -(-(first << 64) // self._old_lines) - 1  # the greatest hash whose probe starts before `first`
            last_old = last_old - (1 << 64) if last_old >= 1 << 63 else last_old
            ops.id_map.move_lines(self.header, counters, self.lines, first, self._first, last_old, self._lifted)
            self._first = first
        if self._first == 0 and self._lifted is not None:
            self._lifted = None
            return not int(self.header[ops.id_map.STUCK])
        return True

    def entries_in(self, copies: Sequence[Tensor]) -> Tensor:
        """Return a header by which entries can be listed from copies of ``memory`` on the CPU."""
        words = [0] * ops.id_map.HEADER_WORDS
        words[ops.id_map.CHUNK_SHIFT] = self._chunk_lines.bit_length() - 1
        return torch.tensor([*words, *self._addresses(copies)], dtype=torch.int64)

    @property
    def _piece(self) -> int:
        return PIECE_LINES["other" if is_accelerator(self.device) else "cpu"]

    def _whole(self, lines: int) -> int:
        """Return a number of lines rounded up to whole chunks."""
        return -(-lines // self._chunk_lines) * self._chunk_lines

    def _addresses(self, memory: Sequence[Tensor]) -> list[int]:
        chunk_bytes = self._chunk_lines * _LINE_WORDS * 8
        return [part.data_ptr() + at for part in memory for at in range(0, part.nbytes, chunk_bytes)]


def _zeros(lines: int, device: torch.device) -> Tensor:
    zeros = ops.memory.zero_bytes(lines * _LINE_WORDS * 8, device)
    return zeros.view(torch.int64).view(lines, LINE_SLOTS, 2)
