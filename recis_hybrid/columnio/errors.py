"""What is damaged: the error that says so, and the note of what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class BadFileError(ValueError):
    """A file is damaged, of another format than its name says, or was changed while it was read."""


@dataclass(frozen=True)
class Skipped:
    """What was left out because a file is damaged."""

    file: str
    """The file's path."""
    piece: str
    """Which part of it, `"row group 3"` for instance, or `"all"`."""
    rows: int
    """How many rows of the order went missing: 0 where the damage was found on opening, before there was an order."""
    reason: str
    """The error's message."""


def not_whole(file: Any, name: str, error: Exception) -> BadFileError:
    """Return the error for a file that does not even open."""
    size = file.filesystem.get_file_info(file.path).size
    return BadFileError(
        f"columnio: {file} ({size or 0} bytes) is no whole {name} file ({error}); it was cut off while written or "
        f'copied, or is of another format: write it anew, or leave it out (on_bad_file="skip")'
    )


def vanished(file: str, error: Exception) -> FileNotFoundError:
    """Return the error for a file that was there when the data set was made."""
    return FileNotFoundError(
        f"columnio: {file} was there when the data set was made and is not now ({error}); put it back, or leave it out "
        f'(on_bad_file="skip")'
    )


def changed(file: str) -> BadFileError:
    """Return the error for a file that is no longer the one that was opened."""
    return BadFileError(
        f"columnio: {file} was written anew since the data set was opened (its size or time of change is another); "
        f'open the data set again, or go on without the rows that it had (on_bad_file="skip")'
    )


def cannot_be_read(piece: str, file: str, error: Exception) -> BadFileError:
    """Return the error for a part of a file."""
    return BadFileError(
        f"columnio: {piece} of {file} cannot be read ({error}); the file is damaged: write it anew, or leave it out "
        f'(on_bad_file="skip")'
    )
