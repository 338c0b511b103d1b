"""File names, paths, checksums and durability."""

import hashlib
import os
import re
import stat
import zlib
from pathlib import Path
from urllib.parse import quote

from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint

CHUNK_BYTES = 4 * 2**20
"""Bytes under one checksum, so that a reader of a part of a file verifies just what it reads."""

_LONGEST_NAME = 200  # of the 255 bytes that file systems allow; the rest is for the suffix
_SEGMENT = r"[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]*"
_RELATIVE_PATH = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")


def encode_name(name: str) -> str:
    """Make a file name of any name: percent-encoded UTF-8, of letters, digits, `_`, `-`, `.`, `%` and `~`.

    A leading dot is encoded too, so that no name is hidden, `.` or `..`. A name that would be longer than 200
    characters keeps its first 150, followed by `~` and 32 hexadecimal digits of its SHA-256.

    Args:
        name: the name of a part or of a table; not empty.

    Returns:
        The file name; different names give different file names.

    Raises:
        CheckpointError: the name is empty, or no valid Unicode.

    Example:
        >>> encode_name("user/country")
        'user%2Fcountry'
        >>> encode_name("..")
        '%2E.'
    """
    if not name:
        raise CheckpointError("saver: a name of a part or table must not be empty, got ''. Give it a name.")
    try:
        encoded = quote(name, safe="").replace("~", "%7E")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"saver: the name {name!r} is no valid Unicode ({error}). Rename it.") from error
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if len(encoded) > _LONGEST_NAME:
        encoded = f"{encoded[:150]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return encoded


def is_safe_path(path: str) -> bool:
    """Whether a path of a manifest stays inside the checkpoint: relative, without `..`, backslashes or hidden names."""
    return _RELATIVE_PATH.fullmatch(path) is not None


def list_files(directory: Path) -> dict[str, int]:
    """List all files below a directory, following no link.

    Args:
        directory: where to look.

    Returns:
        Size in bytes by path relative to the directory, with `/` between names.

    Raises:
        CorruptCheckpoint: something there is neither a plain file nor a directory.
    """
    found: dict[str, int] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(directory / prefix) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                path = f"{prefix}{entry.name}"
                if stat.S_ISDIR(mode):
                    pending.append(f"{path}/")
                elif stat.S_ISREG(mode):
                    found[path] = entry.stat(follow_symlinks=False).st_size
                else:
                    raise CorruptCheckpoint(
                        f"{directory / path}: a checkpoint holds plain files and directories, this is neither (mode "
                        f"{stat.filemode(mode)}). Remove it, or load another step."
                    )
    return found


def seal_file(path: Path) -> tuple[int, tuple[str, ...]]:
    """Force a file to the disk and checksum it.

    Args:
        path: a file that is completely written.

    Returns:
        Its size in bytes and the CRC-32 of each chunk of 4 MiB, the last one shorter, as 8 hexadecimal digits.
    """
    with open(path, "rb") as file:
        size, sums = _checksums(file.fileno())
        os.fsync(file.fileno())
    return size, sums


def verify_file(path: Path, where: str, size: int, sums: tuple[str, ...]) -> None:
    """Compare a file with its size and checksums.

    Args:
        path: the file.
        where: what the file holds, for the message.
        size: its size in bytes.
        sums: the CRC-32 of each chunk.

    Raises:
        CorruptCheckpoint: the size or a checksum differs.
    """
    with open(path, "rb") as file:
        found_size, found = _checksums(file.fileno())
    if found_size != size:
        raise CorruptCheckpoint(
            f"{path} ({where}): must have {size} bytes by the manifest, has {found_size}. {OTHER_STEP}"
        )
    for chunk, (expected, actual) in enumerate(zip(sums, found, strict=True)):
        if expected != actual:
            first = chunk * CHUNK_BYTES
            raise CorruptCheckpoint(
                f"{path} ({where}): bytes {first} to {min(first + CHUNK_BYTES, size) - 1} must have the CRC-32 "
                f"{expected} by the manifest, have {actual}. {OTHER_STEP}"
            )


def sync_directory(directory: Path) -> None:
    """Force a directory's entries to the disk.

    Args:
        directory: the directory.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksums(descriptor: int) -> tuple[int, tuple[str, ...]]:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    size = 0
    sums: list[str] = []
    while True:
        filled = 0
        while filled < CHUNK_BYTES:  # a read may come back short; a chunk must not
            count = os.readv(descriptor, [buffer[filled:]])
            if count == 0:
                break
            filled += count
        if filled:
            sums.append(f"{zlib.crc32(buffer[:filled]):08x}")
            size += filled
        if filled < CHUNK_BYTES:
            return size, tuple(sums)
