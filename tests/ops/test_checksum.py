from __future__ import annotations

import os
import zlib

import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid import ops


@given(st.binary(max_size=700), st.integers(1, 200), st.integers(0, 17))
def test_checksums_equal_those_of_zlib(data: bytes, page: int, offset: int) -> None:
    # Any length and alignment, so that the loops over 64, 16 and single bytes run.
    buffer = torch.tensor(list(data), dtype=torch.uint8)[offset:]
    pages = [data[offset:][at : at + page] for at in range(0, max(len(data) - offset, 0), page)]
    assert ops.checksum.crc32_pages(buffer, page).tolist() == [zlib.crc32(each) for each in pages]


def test_large_pages() -> None:
    data = bytearray(os.urandom(3 * 2**20 + 7))
    found = ops.checksum.crc32_pages(torch.frombuffer(data, dtype=torch.uint8), 2**20)
    assert found.tolist() == [zlib.crc32(data[at : at + 2**20]) for at in range(0, len(data), 2**20)]


def test_schema_and_fake_of_the_operator() -> None:
    arguments = (torch.arange(100, dtype=torch.uint8), 40, torch.zeros(3, dtype=torch.int64))
    torch.library.opcheck(torch.ops.recis.crc32_pages.default, arguments)


def test_empty_pages_are_refused() -> None:
    with pytest.raises(RuntimeError, match="page_bytes must be positive"):
        torch.ops.recis.crc32_pages(torch.empty(0, dtype=torch.uint8), 0, torch.empty(0, dtype=torch.int64))
