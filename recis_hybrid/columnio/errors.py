"""Errors for damaged files, and the record of what was skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class BadFileError(ValueError):
    """A file is damaged, does not have the format of its suffix, or changed while it was being read."""


@dataclass(frozen=True)
class Skipped:
    """A file, or a piece of one, that was skipped because it is damaged."""

    file: str
    """Path of the file."""
    piece: str
    """The piece, such as ``"row group 3"``, or ``"all"``."""
    rows: int
    """Rows missing from the epoch; 0 if the damage was found on opening, before rows were counted."""
    reason: str
    """Message of the error."""


def incomplete_file(file: Any, name: str, error: Exception) -> BadFileError:
    """Return the error for a file that cannot be opened."""
    size = file.filesystem.get_file_info(file.path).size
    return BadFileError(
        f"columnio: {file} ({size or 0} bytes) is not a complete {name} file ({error}); it was truncated during "
        f'writing or copying, or has another format: rewrite it, or skip it (on_bad_file="skip")'
    )


def missing_file(file: str, error: Exception) -> FileNotFoundError:
    """Return the error for a file that existed when the dataset was opened."""
    return FileNotFoundError(
        f"columnio: {file} existed when the dataset was opened, but is missing now ({error}); restore it, or skip it "
        f'(on_bad_file="skip")'
    )


def changed_file(file: str) -> BadFileError:
    """Return the error for a file that changed since the dataset was opened."""
    return BadFileError(
        f"columnio: {file} changed since the dataset was opened (its size or modification time differs); reopen the "
        f'dataset, or continue without its rows (on_bad_file="skip")'
    )


def unreadable_piece(piece: str, file: str, error: Exception) -> BadFileError:
    """Return the error for a damaged piece of a file."""
    return BadFileError(
        f"columnio: {piece} of {file} cannot be read ({error}); the file is damaged: rewrite it, or skip it "
        f'(on_bad_file="skip")'
    )
