"""Errors of the saver. Each message says where, the rule, the values found, and the remedy."""

from __future__ import annotations

OTHER_STEP = "The checkpoint is damaged or was changed after it was written: load another step."
"""The remedy for damage that cannot be undone."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, read or used in this way."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint is damaged: bytes, files or structure are wrong."""


class CheckpointMismatch(CheckpointError):
    """An intact checkpoint belongs to another model: tables, tensors, dtypes, widths or layouts differ."""
