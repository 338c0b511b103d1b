"""Files of a path, a folder, a pattern, a URL or a list of these, in a fixed order. Imports pyarrow."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from recis_hybrid.columnio.files.memory_file import MemoryFile
from recis_hybrid.columnio.files.partitions import Partition, partitions_of
from recis_hybrid.columnio.formats import SUFFIXES, Format, compression_of, format_of, is_known
from recis_hybrid.columnio.options import CsvOptions, ReadOptions

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, a folder, a pattern, a URL of any of these, or a sequence of them."""


@dataclass(frozen=True)
class File:
    """A file in a file system."""

    path: str
    """Path in the file system."""
    filesystem: Any = field(repr=False)
    """A ``pyarrow.fs.FileSystem``."""
    partition: dict[str, int | str | None] = field(default_factory=dict)
    """Columns in the names of its folders, such as ``day=7``."""
    csv: CsvOptions | None = None
    """Dialect of a CSV file; None for the default."""

    @property
    def format(self) -> Format:
        """Format by suffix; CSV for an unknown suffix if there are CSV options."""
        return format_of(self.name, "parquet" if self.csv is None else "delimited")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]

    def open(self) -> Any:
        """Open the file for random access.

        Raises:
            OSError: The file does not exist or cannot be read.
        """
        return self.filesystem.open_input_file(self.path)

    def stream(self) -> Any:
        """Open the file for sequential reading, decompressed according to its suffix.

        Raises:
            OSError: The file does not exist or cannot be read.
        """
        return self.filesystem.open_input_stream(self.path, compression=compression_of(self.name))

    def stamp(self) -> tuple[int | None, int | None] | None:
        """Return size [bytes] and modification time [ns] (None if unknown); None if the file does not exist.

        Raises:
            OSError: The file system cannot be reached.
        """
        info = self.filesystem.get_file_info(self.path)
        return None if info.type == pafs.FileType.NotFound else (info.size, info.mtime_ns)

    @property
    def is_local(self) -> bool:
        """True if the file system is local, so that ``stamp`` is cheap."""
        return _is_local(self.filesystem)

    def __str__(self) -> str:
        return self.path


Source: TypeAlias = File | MemoryFile
"""A file, or data in memory."""


def find_files(paths: Paths, options: ReadOptions | None = None) -> list[File]:
    """Return the files of ``paths``.

    A folder contributes all files below it with a suffix of ``formats.SUFFIXES``, sorted by name. A ``glob`` pattern
    (``**`` for any depth; in a URL, only ``*`` and ``[...]``) contributes the matching files and folders, sorted by
    name. Both ignore names that begin with a dot or an underscore, which other programs reserve (``_SUCCESS``,
    ``_temporary``, ``.part.crc``). A sequence keeps its order.

    Args:
        paths: The paths. A URL (``s3://bucket/folder``) is opened by pyarrow's file system for it, or by fsspec's.
        options: File system, partitions and CSV dialect of the files.

    Raises:
        FileNotFoundError: A path does not exist, a pattern matches nothing, or a folder has no such file.
        TypeError: ``paths``, or an entry of it, is not a path.
        ValueError: ``paths`` is empty, a file is named twice, or no known file system reads the URL.
    """
    options = options or ReadOptions()
    if hasattr(paths, "__arrow_c_stream__") or isinstance(paths, Mapping):
        raise TypeError(
            f"columnio: paths must be paths, got {type(paths).__name__}; read data in memory with "
            f"ColumnDataset.from_arrow"
        )
    entries = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    for entry in entries:
        if not isinstance(entry, str | os.PathLike):
            raise TypeError(
                f"columnio: paths must be paths, got {type(entry).__name__} in {type(paths).__name__}; read data in "
                f"memory with ColumnDataset.from_arrow"
            )
    if not entries:
        raise ValueError("columnio: paths must name at least one file, folder or pattern, got an empty sequence")
    filesystem = None if options.filesystem is None else as_filesystem(options.filesystem)
    files = [file for entry in entries for file in _expand(os.fspath(entry), filesystem)]
    seen: set[tuple[str, str]] = set()
    for file in files:
        # A symbolic link is the same file as its target.
        real = os.path.realpath(file.path) if _is_local(file.filesystem) else file.path
        if (file.filesystem.type_name, real) in seen:
            raise ValueError(
                f"columnio: {file} is named twice, so its rows would be read twice; remove one from "
                f"{[str(entry) for entry in entries]}"
            )
        seen.add((file.filesystem.type_name, real))
    partitions: Sequence[Partition] = [{}] * len(files)
    if options.partitions:
        partitions = partitions_of([file.path for file in files])
    return [
        replace(file, partition=partition, csv=options.csv) for file, partition in zip(files, partitions, strict=True)
    ]


def relative_paths(files: Sequence[Source]) -> list[str]:
    """Return the path of each file relative to the common folder, preceded by the folders above it that are columns.

    The result does not depend on the location of the data.

    Example:
        >>> relative_paths([File("/data/day-1/a.csv", None), File("/data/day-2/a.csv", None)])
        ['day-1/a.csv', 'day-2/a.csv']
    """
    parts = [(os.path.abspath(file.path) if file.is_local else file.path).split("/") for file in files]
    common = len(os.path.commonprefix([each[:-1] for each in parts]))
    # A column in a folder name is part of the rows, even if all files share the folder.
    above = (
        [part for part in parts[0][:common] if unquote(part.partition("=")[0]) in files[0].partition] if files else []
    )
    return ["/".join([*above, *each[common:]]) for each in parts]


def as_filesystem(filesystem: Any) -> Any:
    """Return a file system of pyarrow or fsspec as one of pyarrow.

    Raises:
        TypeError: ``filesystem`` is neither of these.
    """
    if isinstance(filesystem, pafs.FileSystem):
        return filesystem
    from fsspec import AbstractFileSystem

    if isinstance(filesystem, AbstractFileSystem):
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem))
    raise TypeError(
        f"columnio: filesystem must come from pyarrow.fs or fsspec, got {type(filesystem).__name__}; pass one of "
        f"these, or a URL as path"
    )


def locate(entry: str, filesystem: Any = None) -> tuple[Any, str]:
    """Return the file system of a path or URL without a pattern, and its path there.

    Raises:
        ValueError: No known file system reads the URL.
    """
    if filesystem is not None:
        return filesystem, entry
    if "://" not in entry:
        return pafs.LocalFileSystem(), entry
    try:
        location, path = pafs.FileSystem.from_uri(entry)
        return location, path
    except pa.ArrowInvalid:
        pass
    from fsspec.core import url_to_fs

    try:
        fsspec_filesystem, path = url_to_fs(entry)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"columnio: neither pyarrow nor fsspec has a file system for {entry} ({error}); install the package "
            f"named there, or pass ReadOptions(filesystem=...)"
        ) from error
    return as_filesystem(fsspec_filesystem), path


def _expand(entry: str, filesystem: Any) -> list[File]:
    if filesystem is None and "://" not in entry:
        return [File(path, pafs.LocalFileSystem()) for path in _local(entry)]
    base, pattern = _split_pattern(entry)
    location, path = locate(base, filesystem)
    path = path.rstrip("/")
    if pattern:
        files = _matching(location, path, pattern)
        if not files:
            raise FileNotFoundError(f"columnio: no file matches {entry}; check the pattern")
        return [File(each, location) for each in files]
    kind = location.get_file_info(path).type
    if kind == pafs.FileType.File:
        return [File(path, location)]
    # An empty path is the root, which some file systems report as missing.
    if kind == pafs.FileType.Directory or path == "":
        if files := list(_below(location, path)):
            return [File(each, location) for each in files]
        raise FileNotFoundError(_no_such_file(entry))
    raise FileNotFoundError(f"columnio: {entry} does not exist; check the path")


def _split_pattern(entry: str) -> tuple[str, str]:
    """Split an entry before its first part with a wildcard; the query of a URL stays with the first half."""
    query = ""
    if "://" in entry and "?" in entry:
        entry, query = entry.split("?", 1)
    magic = "*[" if "://" in entry else "*?["
    parts = entry.split("/")
    first = next((number for number, part in enumerate(parts) if set(part) & set(magic)), len(parts))
    base = "/".join(parts[:first])
    return base + (f"?{query}" if query else ""), "/".join(parts[first:])


def _matching(filesystem: Any, base: str, pattern: str) -> list[str]:
    from fsspec.implementations.arrow import ArrowFSWrapper

    whole = f"{base}/{pattern}" if base else pattern
    files: list[str] = []
    for match in sorted(ArrowFSWrapper(filesystem).glob(whole)):
        if not _adds_hidden(match[len(base) :], pattern):
            is_file = filesystem.get_file_info(match).type == pafs.FileType.File
            files += [match] if is_file else _below(filesystem, match)
    return list(dict.fromkeys(files))


def _below(filesystem: Any, folder: str) -> Iterator[str]:
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True))
    for path in sorted(info.path for info in infos if info.type == pafs.FileType.File):
        inner = path[len(folder) :] if path.startswith(folder) else path
        if is_known(path) and not any(map(_is_hidden, inner.split("/"))):
            yield path


def _local(entry: str) -> list[str]:
    path = Path(entry)
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        if files := _files_below(path):
            return files
        raise FileNotFoundError(_no_such_file(entry))
    if not glob.has_magic(entry):
        raise FileNotFoundError(f"columnio: {entry} does not exist (in {Path.cwd()}); check the path")
    matches = [Path(match) for match in sorted(glob.glob(entry, recursive=True)) if not _adds_hidden(match, entry)]
    files = [file for match in matches for file in ([str(match)] if match.is_file() else _files_below(match))]
    if not files:
        raise FileNotFoundError(f"columnio: no file matches {entry} (in {Path.cwd()}); check the pattern")
    # With ** both a folder and its files match; each file counts once.
    return list(dict.fromkeys(files))


def _files_below(folder: Path) -> list[str]:
    return [
        str(file)
        for file in sorted(folder.rglob("*"))
        if is_known(file.name) and not any(map(_is_hidden, file.relative_to(folder).parts)) and file.is_file()
    ]


def _no_such_file(folder: str) -> str:
    return (
        f"columnio: the folder {folder} has no file with a suffix of {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; "
        f"use a pattern for files with other suffixes, such as {os.path.join(folder, '*')}"
    )


def _is_local(filesystem: Any) -> bool:
    return isinstance(filesystem, pafs.LocalFileSystem)


def _adds_hidden(match: str, pattern: str) -> bool:
    """Return whether a match has a hidden part that is not in the pattern."""
    return any(_is_hidden(part) for part in set(match.split("/")) - set(pattern.split("/")))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))
