from __future__ import annotations

import os
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, strategies as st

from recis_hybrid.saver import CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.checksums import CHUNK_BYTES, PAGE_BYTES, chunk_sums, page_sums
from recis_hybrid.saver.format.file_io import (
    check_size,
    encode_name,
    is_safe_path,
    list_files,
    open_file,
    read_chunk,
)
from recis_hybrid.saver.format.tensor_file import ChunkSums, write_file

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400)


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("user", "user"),
        ("user/country", "user%2Fcountry"),
        (".", "%2E"),
        ("..", "%2E."),
        ("a b\n", "a%20b%0A"),
        ("城", "%E5%9F%8E"),
        ("~", "%7E"),
        ("%2E", "%252E"),
    ],
)
def test_names(name: str, encoded: str) -> None:
    assert encode_name(name) == encoded


@given(names, names)
@example("x" * 201, "x" * 202)
@example("..", "%2E.")
@example("城" * 300, "城" * 301)
def test_any_name_is_one_unique_safe_segment(a: str, b: str) -> None:
    for name in (a, b):
        file_name = f"{encode_name(name)}.safetensors"
        assert is_safe_path(f"dense/{file_name}")
        assert "/" not in file_name
        assert len(file_name) <= 255
    assert (encode_name(a) == encode_name(b)) == (a == b)


@pytest.mark.parametrize("name", ["", "\ud800"])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="saver: "):
        encode_name(name)


@pytest.mark.parametrize(
    "path",
    ["", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/", ".a", "a\\b", "a\0", "a\n"],
)
def test_unsafe_paths_are_found(path: str) -> None:
    assert not is_safe_path(path)


def sealed(path: Path, *pieces: bytes) -> tuple[int, tuple[str, ...]]:
    sums = ChunkSums()
    path.unlink(missing_ok=True)
    write_file(path, sums.add(memoryview(piece) for piece in pieces))()
    return sums.size, sums.sums


def read_file(path: Path, size: int, sums: tuple[str, ...]) -> None:
    with open_file(path) as file:
        check_size(path, "part 'p'", size, file)
        for number, expected in enumerate(sums):
            out = torch.empty(min(CHUNK_BYTES, size - number * CHUNK_BYTES), dtype=torch.uint8)
            read_chunk(file, path, "part 'p'", number, expected, out)


def zlib_sums(data: bytes) -> tuple[str, ...]:
    return tuple(f"{zlib.crc32(data[i : i + CHUNK_BYTES]):08x}" for i in range(0, len(data), CHUNK_BYTES))


def test_every_chunk_has_a_checksum(tmp_path: Path) -> None:
    data = os.urandom(2 * CHUNK_BYTES + 5)
    for cuts in ([], [1], [CHUNK_BYTES], [CHUNK_BYTES - 1, CHUNK_BYTES + 1], [5, 5, 2 * CHUNK_BYTES]):
        pieces = [data[a:b] for a, b in pairwise([0, *cuts, len(data)])]
        assert sealed(tmp_path / "f", *pieces) == (len(data), zlib_sums(data))
        assert (tmp_path / "f").read_bytes() == data
    assert len(sealed(tmp_path / "g", data[:CHUNK_BYTES])[1]) == 1
    assert sealed(tmp_path / "h") == (0, ())


@pytest.mark.parametrize(
    ("head", "data"),
    [
        (96, 0),
        (96, 1),
        (104, 3 * PAGE_BYTES + 5),
        (104, CHUNK_BYTES - 104),
        (PAGE_BYTES, CHUNK_BYTES),
        (2 * PAGE_BYTES, 2 * CHUNK_BYTES + 77),
        (PAGE_BYTES, 2 * CHUNK_BYTES - PAGE_BYTES),
    ],
)
def test_chunk_checksums_are_computed_from_page_checksums(head: int, data: int) -> None:
    file = os.urandom(head + data)
    pages = page_sums(torch.frombuffer(bytearray(file), dtype=torch.uint8)[head:])
    assert [zlib.crc32(file[i : i + PAGE_BYTES]) for i in range(head, len(file), PAGE_BYTES)] == pages.tolist()
    assert chunk_sums(file[:head], pages, len(file)) == zlib_sums(file)


def test_a_changed_chunk_is_named(tmp_path: Path) -> None:
    data = bytearray(CHUNK_BYTES + 10)
    seal = sealed(tmp_path / "f", data)
    read_file(tmp_path / "f", *seal)
    data[CHUNK_BYTES] = 1
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=rf"f \(part 'p'\): bytes {CHUNK_BYTES} to {CHUNK_BYTES + 9} must have"):
        read_file(tmp_path / "f", *seal)
    (tmp_path / "f").write_bytes(data[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"must have {CHUNK_BYTES + 10} bytes, .* has {CHUNK_BYTES + 9}"):
        read_file(tmp_path / "f", *seal)


def test_files_are_listed_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"123")
    (tmp_path / "d").write_bytes(b"")
    assert list_files(tmp_path) == {"a/b/c": 3, "d": 0}


@pytest.mark.parametrize("target", ["file", "folder", "nowhere"])
def test_links_and_pipes_are_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / target)
    with pytest.raises(CorruptCheckpoint, match=r"inside/link: .* plain files"):
        list_files(tmp_path / "inside")
    (tmp_path / "inside" / "link").unlink()
    os.mkfifo(tmp_path / "inside" / "pipe")
    with pytest.raises(CorruptCheckpoint, match=r"inside/pipe: .* plain files"):
        list_files(tmp_path / "inside")
