"""Finds the storage that a path or a URL names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from recis_hybrid.saver.format.location import RemotePath
from recis_hybrid.saver.storage.local import LocalStorage
from recis_hybrid.saver.storage.remote import RemoteStorage

Storage: TypeAlias = LocalStorage | RemoteStorage


def storage_of(path: str | os.PathLike[str] | RemotePath) -> Storage:
    """Find where a path leads: a URL to a file system of fsspec or pyarrow, everything else to a directory.

    Raises:
        CheckpointError: nothing is known to read such a URL.
    """
    if isinstance(path, RemotePath):
        return RemoteStorage(path)
    text = os.fspath(path)
    return RemoteStorage(RemotePath.of(text)) if "://" in text else LocalStorage(Path(path).absolute())
