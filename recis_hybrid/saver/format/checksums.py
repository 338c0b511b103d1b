"""CRC-32 of chunks and pages, and of chunks from the checksums of their pages.

Python lacks zlib's ``crc32_combine``. The checksum of two concatenated pieces is that of the first, advanced by the
length of the second (a linear map of 32 bits), xor that of the second. R. Williams, "A painless guide to CRC error
detection algorithms", 1993.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recis_hybrid import ops

CHUNK_BYTES = 4 * 2**20
"""Bytes per checksum in the manifest."""
PAGE_BYTES = 2**14
"""Bytes per checksum in the header of a sparse file; small, so that a rank reads little more than its own rows."""

_POLYNOMIAL = 0xEDB88320

Sums = NDArray[np.uint32]


def page_sums(data: Tensor) -> Sums:
    """Return the CRC-32 of each page of 16 KiB; the last page may be shorter.

    Args:
        data: uint8 ``[n]``, on the CPU.

    Returns:
        uint32, one per page.
    """
    return ops.checksum.crc32_pages(data, PAGE_BYTES).numpy().astype(np.uint32)


def chunk_sums(head: bytes, pages: Sums, size: int) -> tuple[str, ...]:
    """Compute the CRC-32 of each chunk of 4 MiB of a file from those of its pages.

    Args:
        head: Bytes before the pages; whole pages if the file has more than one chunk.
        pages: Checksums of the pages of the rest of the file.
        size: Bytes of the file.

    Returns:
        8 hexadecimal digits each.
    """
    if size <= CHUNK_BYTES:
        sums = [_append_pages(zlib.crc32(head), pages, size - len(head))]
    else:
        per_chunk = CHUNK_BYTES // PAGE_BYTES
        units = np.concatenate([page_sums(torch.frombuffer(bytearray(head), dtype=torch.uint8)), pages])
        whole = size // CHUNK_BYTES
        level, length = units[: whole * per_chunk].reshape(whole, per_chunk), PAGE_BYTES
        while level.shape[1] > 1:  # neighbors, then pairs of neighbors, and so on
            level, length = _advance(level[:, ::2], length) ^ level[:, 1::2], length * 2
        sums = level[:, 0].tolist()
        if size % CHUNK_BYTES:
            rest = units[whole * per_chunk :]
            sums.append(_append_pages(0, rest, size % CHUNK_BYTES))
    return tuple(f"{each:08x}" for each in sums)


def _append_pages(first: int, pages: Sums, size: int) -> int:
    """Return the checksum of bytes with the checksum ``first`` followed by pages of ``size`` bytes in total."""
    total = np.array([first], dtype=np.uint32)
    for page in pages:
        length = min(PAGE_BYTES, size)
        total = _advance(total, length) ^ page
        size -= length
    return int(total[0])


def _advance(sums: Sums, length: int) -> Sums:
    """Advance each checksum by ``length`` bytes that follow it."""
    tables = _tables(length)
    advanced: Sums = tables[0][sums & 255]
    for place in range(1, 4):
        advanced = advanced ^ tables[place][(sums >> np.uint32(8 * place)) & 255]
    return advanced


@lru_cache(maxsize=256)
def _tables(length: int) -> Sums:
    """Return tables that advance each byte of a checksum by ``length`` bytes, uint32 ``[4, 256]``."""
    factor, square, bits = 1 << 31, 1 << 30, 8 * length  # 1 and x, reflected
    while bits:
        if bits & 1:
            factor = _product(factor, square)
        square, bits = _product(square, square), bits >> 1
    images = [_product(1 << bit, factor) for bit in range(32)]
    tables = np.zeros((4, 256), np.uint32)
    for place in range(4):
        for bit in range(8):
            tables[place, 1 << bit : 2 << bit] = tables[place, : 1 << bit] ^ np.uint32(images[8 * place + bit])
    return tables


def _product(a: int, b: int) -> int:
    """Return the product of two reflected polynomials, modulo that of CRC-32."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return result
