"""Compaction of incremental checkpoints into full ones."""

from __future__ import annotations

from functools import partial

from recis_hybrid.saver.actions.write import CapturedPart, Target, publish, write_checkpoint
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.location import Location, RemotePath
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.storage.resolve import storage_of
from recis_hybrid.saver.storage.step_directory import read_manifest, step_name


def compact(checkpoint: StoredCheckpoint, to: Target | None = None) -> Location:
    """Rewrite an incremental checkpoint as a full one.

    The files have the same bytes as those of a full save of the same state.

    Args:
        checkpoint: An incremental checkpoint.
        to: Directory or URL of the full checkpoint. None replaces the incremental one, which object stores do not
            support.

    Returns:
        Directory of the full checkpoint.

    Raises:
        CorruptCheckpoint: The checkpoint, or one that it builds on, is damaged.
        CheckpointError: Other checkpoints build on it, another job saves there, or the files cannot be written.
    """
    step, parts = checkpoint.manifest.step, checkpoint.manifest.parts
    captured = {name: CapturedPart(part.kind, partial(checkpoint.read, name)) for name, part in parts.items()}
    if to is not None:
        return publish(to, step, captured)
    if checkpoint.manifest.previous is not None:
        if isinstance(checkpoint.root, RemotePath):
            raise CheckpointError(
                f"{checkpoint.directory}: an object store cannot replace a checkpoint atomically. Name another "
                "location with --to."
            )
        storage = storage_of(checkpoint.root)
        storage.take()
        for later in storage.steps():
            link = read_manifest(storage.root / step_name(later), later).previous
            if link is not None and link.step == step:
                raise CheckpointError(
                    f"{checkpoint.directory}: step {later} builds on it. Compact the newest step that does, or write "
                    "elsewhere with --to."
                )
        write_checkpoint(storage, Ranks(None), step, captured)
    return checkpoint.directory
