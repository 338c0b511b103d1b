"""File names, paths, checksums and durability."""

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
    """Make a file name of any name: percent-encoded UTF-8, of letters, digits, ``_``, ``-``, ``.``, ``%`` and ``~``.

    A leading dot is encoded too, so that no name is hidden, ``.`` or ``..``. A name that would be longer than 200
    characters keeps its first 150, followed by ``~`` and 32 hexadecimal digits of its SHA-256.

    Args:
        name: The name of a part or of a table; not empty.

    Returns:
        The file name; different names give different file names.

    Raises:
        CheckpointError: The name is empty, or no valid Unicode.

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
    """Return whether a path of a manifest is relative, without ``..``, backslashes and hidden names."""
    return _RELATIVE_PATH.fullmatch(path) is not None


def list_files(directory: Location) -> dict[str, int]:
    """List all files below a directory, following no link.

    Args:
        directory: Where to look.

    Returns:
        Size in bytes by path relative to the directory, with ``/`` between names.

    Raises:
        CorruptCheckpoint: Something there is neither a plain file nor a directory.
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
                        f"{directory / path}: a checkpoint holds plain files and directories, this is neither (mode "
                        f"{stat.filemode(mode)}). Remove it, or load another step."
                    )
    return found


def file_size(path: Location) -> int:
    """Return the bytes that a file has."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def open_file(path: Location) -> io.RawIOBase:
    """Open a file for reading at any place, of which no more is read than is asked for."""
    return path.open("rb") if isinstance(path, RemotePath) else open(path, "rb", buffering=0)  # noqa: SIM115


def read_chunk(file: io.RawIOBase, path: object, where: str, number: int, expected: str, out: Tensor) -> None:
    """Read the next chunk of a file and compare it with its checksum, while it is in the cache.

    Args:
        file: Open at the beginning of the chunk.
        path: The file.
        where: What it holds, for the message.
        number: Of the chunk.
        expected: Its checksum.
        out: uint8, as many as the chunk has.

    Raises:
        CorruptCheckpoint: The checksum differs.
    """
    fill(file, out.numpy().data)
    check_sum(path, where, number * CHUNK_BYTES, expected, out)


def fill(file: io.RawIOBase, out: memoryview) -> None:
    """Read as many bytes as ``out`` has; a read may come back short.

    Raises:
        OSError: The file ends before.
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
    """Raise CorruptCheckpoint if an open file, at its beginning, has not the size that the manifest says."""
    found = file.seek(0, os.SEEK_END)
    found = file.tell() if found is None else found
    file.seek(0)
    if found != size:
        raise CorruptCheckpoint(f"{path} ({where}): must have {size} bytes by the manifest, has {found}. {OTHER_STEP}")


def check_sum(path: object, where: str, first: int, expected: str, data: Tensor) -> None:
    """Raise CorruptCheckpoint if bytes of a file, from ``first`` on, have not the checksum that they must have."""
    sums = ops.checksum.crc32_pages(data, CHUNK_BYTES).tolist()
    actual = f"{sums[0] if sums else 0:08x}"
    if actual != expected:
        raise CorruptCheckpoint(
            f"{path} ({where}): bytes {first} to {first + data.numel() - 1} must have the CRC-32 {expected} by the "
            f"manifest, have {actual}. {OTHER_STEP}"
        )


def remove_folder(folder: Path) -> None:
    """Remove a directory and all that is below it, following no link; what another removes meanwhile is no error."""
    with Workers(2) as pool:  # a file system takes its time to give up large files
        for path in folder.rglob("*.safetensors"):
            if not path.is_dir():
                pool.submit(partial(path.unlink, missing_ok=True))
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue


def sync_directory(directory: Path) -> None:
    """Force a directory's entries to the disk.

    Args:
        directory: The directory.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
