"""CRC-32 of chunks, of the pages that they are made of, and of the former from the latter.

zlib's ``crc32_combine`` is not in Python: the checksum of two pieces put together is that of the first, moved on by the
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
"""Bytes under one checksum of the manifest."""
PAGE_BYTES = 2**14
"""Bytes under one checksum of a sparse file's header, so that a rank reads little more than its own rows."""

_POLYNOMIAL = 0xEDB88320

Sums = NDArray[np.uint32]


def page_sums(data: Tensor) -> Sums:
    """Return the CRC-32 of each page of 16 KiB, the last one shorter.

    Args:
        data: uint8 ``[n]``, on the CPU.

    Returns:
        uint32, one a page.
    """
    return ops.checksum.crc32_pages(data, PAGE_BYTES).numpy().astype(np.uint32)


def chunk_sums(head: bytes, pages: Sums, size: int) -> tuple[str, ...]:
    """Return the CRC-32 of each chunk of 4 MiB of a file, from those of its pages.

    Args:
        head: What lies before the pages; where the file has more than one chunk, whole pages.
        pages: Of the rest of the file.
        size: Bytes of the file.

    Returns:
        8 hexadecimal digits each.
    """
    if size <= CHUNK_BYTES:
        sums = [_folded(zlib.crc32(head), pages, size - len(head))]
    else:
        per_chunk = CHUNK_BYTES // PAGE_BYTES
        units = np.concatenate([page_sums(torch.frombuffer(bytearray(head), dtype=torch.uint8)), pages])
        whole = size // CHUNK_BYTES
        level, length = units[: whole * per_chunk].reshape(whole, per_chunk), PAGE_BYTES
        while level.shape[1] > 1:  # neighbours, then pairs of neighbours, and so on
            level, length = _moved(level[:, ::2], length) ^ level[:, 1::2], length * 2
        sums = level[:, 0].tolist()
        if size % CHUNK_BYTES:
            rest = units[whole * per_chunk :]
            sums.append(_folded(0, rest, size % CHUNK_BYTES))
    return tuple(f"{each:08x}" for each in sums)


def _folded(first: int, pages: Sums, size: int) -> int:
    """Return the checksum of bytes whose own is ``first``, followed by pages of ``size`` bytes together."""
    total = np.array([first], dtype=np.uint32)
    for page in pages:
        length = min(PAGE_BYTES, size)
        total = _moved(total, length) ^ page
        size -= length
    return int(total[0])


def _moved(sums: Sums, length: int) -> Sums:
    """Each checksum, as it counts with ``length`` more bytes after it."""
    tables = _tables(length)
    moved: Sums = tables[0][sums & 255]
    for place in range(1, 4):
        moved = moved ^ tables[place][(sums >> np.uint32(8 * place)) & 255]
    return moved


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
