"""Paths of object stores and other file systems that fsspec or pyarrow know, as much of pathlib's as the saver uses."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, TypeAlias

from recis_hybrid.saver.errors import CheckpointError


class RemotePath:
    """A path in a file system of fsspec. There are no directories to make, and nothing is renamed.

    Args:
        filesystem: Of fsspec.
        path: The path in it, without a slash at its end.
        url: The path as the user would write it.
    """

    def __init__(self, filesystem: Any, path: str, url: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._url = url

    @classmethod
    def of(cls, url: str) -> RemotePath:
        """Find the file system of a URL: pyarrow's own where it has one (S3, GCS, Azure, HDFS), else fsspec's.

        Raises:
            CheckpointError: Nothing is known to read such a URL.
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
        """Nothing: what has a name with slashes needs no directories."""

    def open(self, mode: str) -> io.RawIOBase:
        """Open for writing ("wb"), or for reading at any place ("rb"), where no more is read than is asked for."""
        options: dict[str, object] = {"cache_type": "none"} if mode == "rb" else {}
        if type(self._filesystem).__name__ == "ArrowFSWrapper":  # it reads what it is asked for, and takes no options
            options = {}
        opened: io.RawIOBase = self._filesystem.open(self._path, mode, **options)
        return opened

    def read_bytes(self) -> bytes:
        """All of a file."""
        with self.open("rb") as file:
            content: bytes = file.read()
            return content

    def write_bytes(self, content: bytes) -> None:
        """Write a file, which appears whole or not at all."""
        with self.open("wb") as file:
            file.write(content)

    def size(self) -> int:
        """Return the bytes of a file."""
        self._filesystem.invalidate_cache()
        return int(self._filesystem.size(self._path))

    def exists(self) -> bool:
        """Return whether there is a file or anything below the path, by what the store says now."""
        self._filesystem.invalidate_cache()
        return bool(self._filesystem.exists(self._path))

    def is_file(self) -> bool:
        """Return whether there is a file of this path."""
        self._filesystem.invalidate_cache()
        return bool(self._filesystem.isfile(self._path))

    def is_dir(self) -> bool:
        """Return whether there is anything below the path."""
        return bool(self.names())

    def names(self) -> list[str]:
        """Return the entries below the path, by the first part of their names."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        names = {each.rstrip("/").rpartition("/")[2] for each in found}
        return sorted(names - {self.name, ""})

    def files(self) -> dict[str, int]:
        """Size in bytes of every file below the path, by its name from there."""
        self._filesystem.invalidate_cache()
        try:
            found = self._filesystem.find(self._path, detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._path.lstrip("/")) + 1
        return {name.lstrip("/")[start:]: int(about["size"]) for name, about in found.items()}

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove a file."""
        with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext():
            self._filesystem.rm_file(self._path)

    def remove_below(self) -> None:
        """Remove everything below the path, and what some file systems put there for an empty directory."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm(self._path, recursive=True)


Location: TypeAlias = Path | RemotePath
"""Path of a file or a checkpoint."""
