"""The storage that a path or a URL names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from recis_hybrid.saver.format.location import RemotePath
from recis_hybrid.saver.storage.local import LocalStorage
from recis_hybrid.saver.storage.remote import RemoteStorage

Storage: TypeAlias = LocalStorage | RemoteStorage


def storage_of(path: str | os.PathLike[str] | RemotePath) -> Storage:
    """Return the storage of a path: a URL names a file system of pyarrow or fsspec, everything else a directory.

    Raises:
        CheckpointError: No file system is known for the URL.
    """
    if isinstance(path, RemotePath):
        return RemoteStorage(path)
    text = os.fspath(path)
    return RemoteStorage(RemotePath.of(text)) if "://" in text else LocalStorage(Path(path).absolute())
