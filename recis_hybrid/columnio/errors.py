"""Errors of damaged files, and the record of what was left out because of damage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class BadFileError(ValueError):
    """A file is damaged, has another format than its name says, or changed while it was read."""


@dataclass(frozen=True)
class Skipped:
    """A file, or a piece of one, left out because it is damaged."""

    file: str
    """Path of the file."""
    piece: str
    """The piece, such as ``"row group 3"``, or ``"all"``."""
    rows: int
    """Rows missing from the epoch; 0 if the damage was found on opening, before rows were counted."""
    reason: str
    """Message of the error."""


def not_whole(file: Any, name: str, error: Exception) -> BadFileError:
    """Return the error for a file that cannot be opened."""
    size = file.filesystem.get_file_info(file.path).size
    return BadFileError(
        f"columnio: {file} ({size or 0} bytes) is not a complete {name} file ({error}); it was truncated while written "
        f'or copied, or has another format: rewrite it, or leave it out (on_bad_file="skip")'
    )


def vanished(file: str, error: Exception) -> FileNotFoundError:
    """Return the error for a file that existed when the dataset was opened."""
    return FileNotFoundError(
        f"columnio: {file} existed when the dataset was opened, but is missing now ({error}); restore it, or leave it "
        f'out (on_bad_file="skip")'
    )


def changed(file: str) -> BadFileError:
    """Return the error for a file that changed since the dataset was opened."""
    return BadFileError(
        f"columnio: {file} changed since the dataset was opened (its size or modification time differs); open the "
        f'dataset again, or continue without its rows (on_bad_file="skip")'
    )


def cannot_be_read(piece: str, file: str, error: Exception) -> BadFileError:
    """Return the error for a damaged piece of a file."""
    return BadFileError(
        f"columnio: {piece} of {file} cannot be read ({error}); the file is damaged: rewrite it, or leave it out "
        f'(on_bad_file="skip")'
    )
