"""Checksums of files."""

from __future__ import annotations

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned

nothing_returned("crc32_pages")


def crc32_pages(data: Tensor, page_bytes: int) -> Tensor:
    """Return the CRC-32 (as in zlib) of each page of a buffer; runs in the calling thread.

    Args:
        data: uint8 ``[n]``, contiguous, on the CPU.
        page_bytes: Bytes per page; the last page may be shorter.

    Returns:
        int64 ``[ceil(n / page_bytes)]``, 0 to 2^32 - 1.
    """
    sums = torch.empty(-(-data.numel() // page_bytes), dtype=torch.int64)
    torch.ops.recis.crc32_pages(data, page_bytes, sums)
    return sums
