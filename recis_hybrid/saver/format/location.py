"""Paths in file systems of fsspec or pyarrow, with the part of pathlib's interface that the saver uses."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, TypeAlias

from recis_hybrid.saver.errors import CheckpointError


class RemotePath:
    """A path in an fsspec file system. There are no directories to create, and nothing is renamed.

    Args:
        filesystem: The fsspec file system.
        path: The path in it, without a trailing slash.
        url: The path as the user would write it.
    """

    def __init__(self, filesystem: Any, path: str, url: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._url = url

    @classmethod
    def of(cls, url: str) -> RemotePath:
        """Find the file system of a URL: pyarrow's if there is one (S3, GCS, Azure, HDFS), otherwise fsspec's.

        Raises:
            CheckpointError: No file system is known for the URL.
        """
        import fsspec
        import pyarrow as pa
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import FileSystem

        bare = url.partition("?")[0].rstrip("/")
        try:
            try:
                filesystem, path = FileSystem.from_uri(url)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                filesystem, path = fsspec.core.url_to_fs(url)
            else:
                filesystem = ArrowFSWrapper(filesystem)
        except (ImportError, ValueError, OSError) as error:
            raise CheckpointError(
                f"Saver: no file system is known for {url!r} ({error}). Install fsspec's package for it, or save to a "
                "directory."
            ) from error
        return cls(filesystem, path.rstrip("/"), bare)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The path without its last part."""
        return RemotePath(self._filesystem, self._path.rpartition("/")[0], self._url.rpartition("/")[0])

    def __truediv__(self, other: str) -> RemotePath:
        return RemotePath(self._filesystem, f"{self._path}/{other}", f"{self._url}/{other}")

    def __str__(self) -> str:
        return self._url

    def absolute(self) -> RemotePath:
        """Return the path itself."""
        return self

    def mkdir(self, *_: object, **__: object) -> None:
        """Do nothing: object stores need no directories."""

    def open(self, mode: str) -> io.RawIOBase:
        """Open for writing ("wb"), or for reading at any offset ("rb"), where no more is read than requested."""
        options: dict[str, object] = {"cache_type": "none"} if mode == "rb" else {}
        if type(self._filesystem).__name__ == "ArrowFSWrapper":  # it reads only what is requested, and has no options
            options = {}
        opened: io.RawIOBase = self._filesystem.open(self._path, mode, **options)
        return opened

    def read_bytes(self) -> bytes:
        """Return the contents of the file."""
        with self.open("rb") as file:
            content: bytes = file.read()
            return content

    def write_bytes(self, content: bytes) -> None:
        """Write the file atomically."""
        with self.open("wb") as file:
            file.write(content)

    def size(self) -> int:
        """Return the size of the file in bytes."""
        self._filesystem.invalidate_cache()
        return int(self._filesystem.size(self._path))

    def exists(self) -> bool:
        """Return whether the file, or anything below the path, exists now in the store."""
        self._filesystem.invalidate_cache()
        return bool(self._filesystem.exists(self._path))

    def is_file(self) -> bool:
        """Return whether the path is a file."""
        self._filesystem.invalidate_cache()
        return bool(self._filesystem.isfile(self._path))

    def is_dir(self) -> bool:
        """Return whether anything exists below the path."""
        return bool(self.names())

    def names(self) -> list[str]:
        """Return the names of the entries directly below the path."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = {each.rstrip("/").rpartition("/")[2] for each in found}
        return sorted(names - {self.name, ""})

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every file below the path, by its name from there."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(self._path, detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._path.lstrip("/")) + 1
        return {name.lstrip("/")[start:]: int(about["size"]) for name, about in found.items()}

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove the file."""
        with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext():
            self._filesystem.rm_file(self._path)

    def remove_below(self) -> None:
        """Remove everything below the path, including the markers of empty directories."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm(self._path, recursive=True)


Location: TypeAlias = Path | RemotePath
"""Path of a file or a checkpoint."""
