"""The errors of the saver. Each message says where, which rule, the values found, and what to do."""

from __future__ import annotations

OTHER_STEP = "The checkpoint is damaged or was changed after it was written: load another step."
"""The remedy for damage, which nothing can undo."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, read or used as asked."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint is not what was once written: bytes, files or structure are wrong."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint belongs to another model: tables, tensors, dtypes, widths or layouts differ."""
