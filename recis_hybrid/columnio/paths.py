"""From what a user writes, a file, a folder, a pattern or a list of them, to the files in a fixed order."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, a folder, a pattern, or a sequence of these."""

SUFFIXES = (".parquet", ".pq")


def find_files(paths: Paths) -> list[Path]:
    """Returns the files that `paths` names.

    A folder gives all files below it that end in .parquet or .pq, by name. A pattern as of `glob` (with `**` for any
    depth) gives the files and folders that match, by name. Both leave out names that begin with a dot or an underscore,
    which other programs keep for themselves (`_SUCCESS`, `_temporary`, `.part.crc`). A sequence keeps its order.

    Args:
        paths: What to read.

    Raises:
        FileNotFoundError: A path does not exist, a pattern matches nothing or a folder has no such file.
        ValueError: There are no paths, a file is named twice, or a path is a URL.
    """
    entries = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not entries:
        raise ValueError("columnio: paths must name at least one file, folder or pattern, got an empty sequence")
    files = [file for entry in entries for file in _expand(os.fspath(entry))]
    seen: set[Path] = set()
    for file in files:
        if (real := file.resolve()) in seen:
            raise ValueError(
                f"columnio: {file} is named twice, and its rows would be read twice; remove one from {entries}"
            )
        seen.add(real)
    return files


def _expand(entry: str) -> list[Path]:
    if "://" in entry:
        raise ValueError(f"columnio: {entry} is a URL, and only local files can be read; copy or mount the files")
    path = Path(entry)
    if path.is_file():
        return [path]
    if path.is_dir():
        if files := _files_below(path):
            return files
        raise FileNotFoundError(
            f"columnio: the folder {entry} holds no file that ends in {' or '.join(SUFFIXES)}; "
            f"name files that end otherwise by a pattern, {os.path.join(entry, '*')} for instance"
        )
    if not glob.has_magic(entry):
        raise FileNotFoundError(f"columnio: {entry} does not exist (seen from {Path.cwd()}); check the path")
    matches = [Path(match) for match in sorted(glob.glob(entry, recursive=True)) if not _is_hidden(Path(match).name)]
    files = [file for match in matches for file in ([match] if match.is_file() else _files_below(match))]
    if not files:
        raise FileNotFoundError(f"columnio: no file matches {entry} (seen from {Path.cwd()}); check the pattern")
    # With ** a folder matches and so does what is in it; each file counts once.
    return list(dict.fromkeys(files))


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES and not any(map(_is_hidden, file.relative_to(folder).parts)) and file.is_file()
    )


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))
