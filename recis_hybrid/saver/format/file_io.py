"""File names, safe paths, verified reads, and durability."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
from functools import partial
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.checksums import CHUNK_BYTES
from recis_hybrid.saver.format.location import Location, RemotePath
from recis_hybrid.saver.runtime.workers import Workers

_LONGEST_NAME = 200  # of the 255 bytes that file systems allow; the rest is for the suffix
_SEGMENT = r"[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]*"
_RELATIVE_PATH = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")


def encode_name(name: str) -> str:
    """Encode any name as a file name: percent-encoded UTF-8, of letters, digits, ``_``, ``-``, ``.``, ``%`` and ``~``.

    A leading dot is encoded, too, so that no name is hidden, ``.`` or ``..``. A name that would be longer than 200
    characters keeps its first 150, followed by ``~`` and 32 hexadecimal digits of its SHA-256.

    Args:
        name: Name of a part or table; not empty.

    Returns:
        The file name; different names have different file names.

    Raises:
        CheckpointError: The name is empty, or not valid Unicode.

    Example:
        >>> encode_name("user/country")
        'user%2Fcountry'
        >>> encode_name("..")
        '%2E.'
    """
    if not name:
        raise CheckpointError("saver: the name of a part or table must not be empty, got ''. Name it.")
    try:
        encoded = quote(name, safe="").replace("~", "%7E")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"saver: the name {name!r} is not valid Unicode ({error}). Rename it.") from error
    if encoded.startswith("."):
        encoded = "%2E" + encoded[1:]
    if len(encoded) > _LONGEST_NAME:
        encoded = f"{encoded[:150]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return encoded


def is_safe_path(path: str) -> bool:
    """Return whether a path in a manifest is relative and has no ``..``, backslashes or hidden names."""
    return _RELATIVE_PATH.fullmatch(path) is not None


def list_files(directory: Location) -> dict[str, int]:
    """List all files below a directory; links are not followed.

    Args:
        directory: The directory.

    Returns:
        Size in bytes by path relative to the directory, with ``/`` between names.

    Raises:
        CorruptCheckpoint: An entry is neither a plain file nor a directory.
    """
    if isinstance(directory, RemotePath):
        return directory.files()
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
                        f"{directory / path}: a checkpoint must hold only plain files and directories, got mode "
                        f"{stat.filemode(mode)}. Remove it, or load another step."
                    )
    return found


def file_size(path: Location) -> int:
    """Return the size of a file in bytes."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def open_file(path: Location) -> io.RawIOBase:
    """Open a file for reading at any offset; no more is read than requested."""
    return path.open("rb") if isinstance(path, RemotePath) else open(path, "rb", buffering=0)  # noqa: SIM115


def read_chunk(file: io.RawIOBase, path: object, where: str, number: int, expected: str, out: Tensor) -> None:
    """Read the next chunk of a file and verify its checksum while it is in the cache.

    Args:
        file: Open file, at the start of the chunk.
        path: Path of the file.
        where: Part and table of the file, for the message.
        number: Number of the chunk.
        expected: Expected checksum.
        out: uint8, of the size of the chunk; written.

    Raises:
        CorruptCheckpoint: The checksum differs.
    """
    fill(file, out.numpy().data)
    check_sum(path, where, number * CHUNK_BYTES, expected, out)


def fill(file: io.RawIOBase, out: memoryview) -> None:
    """Fill ``out`` with the next bytes of a file; a short read is continued.

    Raises:
        OSError: The file ends early.
    """
    while out:
        if isinstance(file, io.RawIOBase):
            count = file.readinto(out) or 0
        else:  # fsspec's
            data = file.read(len(out))
            count = len(data)
            out[:count] = data
        if not count:
            raise OSError(f"the file ended {len(out)} bytes early")
        out = out[count:]


def check_size(path: object, where: str, size: int, file: io.RawIOBase) -> None:
    """Raise CorruptCheckpoint if the size of an open file, at its start, differs from the manifest."""
    found = file.seek(0, os.SEEK_END)
    found = file.tell() if found is None else found
    file.seek(0)
    if found != size:
        raise CorruptCheckpoint(
            f"{path} ({where}): must have {size} bytes, as the manifest says, has {found}. {OTHER_STEP}"
        )


def check_sum(path: object, where: str, first: int, expected: str, data: Tensor) -> None:
    """Raise CorruptCheckpoint if the checksum of bytes of a file, from ``first`` on, is not the expected one."""
    sums = ops.checksum.crc32_pages(data, CHUNK_BYTES).tolist()
    actual = f"{sums[0] if sums else 0:08x}"
    if actual != expected:
        raise CorruptCheckpoint(
            f"{path} ({where}): bytes {first} to {first + data.numel() - 1} must have the CRC-32 {expected}, as "
            f"the manifest says, have {actual}. {OTHER_STEP}"
        )


def remove_folder(folder: Path) -> None:
    """Remove a directory with all contents; links are not followed, and concurrent removal is no error."""
    with Workers(2) as pool:  # deleting large files takes long
        for path in folder.rglob("*.safetensors"):
            if not path.is_dir():
                pool.submit(partial(path.unlink, missing_ok=True))
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue


def sync_directory(directory: Path) -> None:
    """Sync a directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
