"""Feature operations in eager torch, bitwise equal to ours: the peer of ``benchmarks/features.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.ragged import RaggedTensor

MULTIPLIER = 0xC6A4A7935BD1E995 - 2**64


def _stir(x: Tensor) -> Tensor:
    return x ^ (x >> 47 & (1 << 17) - 1)


def _block(state: Tensor, word: Tensor) -> Tensor:
    return (state ^ _stir(word * MULTIPLIER) * MULTIPLIER) * MULTIPLIER


def _finish(state: Tensor) -> Tensor:
    return _stir(_stir(state) * MULTIPLIER)


def murmur(ids: Tensor) -> Tensor:
    """Return MurmurHash64A (seed 0) of the eight bytes of each id."""
    return _finish(_block(torch.full_like(ids, 8) * MULTIPLIER, ids))


def cross(x: Tensor, y: Tensor) -> Tensor:
    """Return MurmurHash64A (seed 0) of the sixteen bytes of each pair."""
    return _finish(_block(_block(torch.full_like(x, 16) * MULTIPLIER, x), y))


def mod(ids: Tensor, n: int) -> Tensor:
    """Return the remainders of ids interpreted as unsigned."""
    rest = torch.remainder(ids, n)
    return torch.where(ids < 0, (rest + 2**64 % n) % n, rest)


def truncate(rows: RaggedTensor, length: int) -> RaggedTensor:
    """Return the first values of each row."""
    lengths = rows.lengths()
    kept = lengths.clamp(max=length)
    offsets = torch.zeros_like(rows.offsets)
    torch.cumsum(kept, 0, out=offsets[1:])
    skipped = torch.repeat_interleave(rows.offsets[:-1] - offsets[:-1], kept)
    return RaggedTensor(rows.values[skipped + torch.arange(skipped.numel(), device=skipped.device)], offsets)
