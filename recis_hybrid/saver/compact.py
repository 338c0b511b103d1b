"""Compaction of incremental checkpoints into full ones, and exports for serving."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from recis_hybrid.checkpointing import PartState, TableState
from recis_hybrid.saver.actions.write import CapturedPart, Target, publish, write_checkpoint
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.location import Location, RemotePath
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.storage.resolve import storage_of
from recis_hybrid.saver.storage.step_directory import read_manifest, step_name

EXPORT_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
"""Dtypes of embeddings in an export."""
_EXPORTED_KINDS = ("saveable", "module", "json")


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


def export(checkpoint: StoredCheckpoint, out: Target, dtype: torch.dtype | None = None) -> Location:
    """Write the contents of a checkpoint that serving needs: ids and embeddings, modules and JSON.

    Optimizers, generators, schedules and reading positions are omitted, as are the optimizer state and metadata of rows
    and the admission counts. The result is a checkpoint in the same format, for ``recis_hybrid.serving``.

    Args:
        checkpoint: A checkpoint, incremental or full.
        out: Directory or URL of the export; created if missing.
        dtype: Dtype of the embeddings, one of ``EXPORT_DTYPES``; None keeps that of each table.

    Returns:
        Directory of the export, named after the step, in ``out``.

    Raises:
        CorruptCheckpoint: The checkpoint, or one that it builds on, is damaged.
        CheckpointError: The export exists already, or cannot be written.
    """
    captured = {
        name: CapturedPart(part.kind, partial(_exported_state, checkpoint, name, dtype))
        for name, part in checkpoint.manifest.parts.items()
        if part.kind in _EXPORTED_KINDS
    }
    return publish(out, checkpoint.manifest.step, captured)


def _exported_state(checkpoint: StoredCheckpoint, part: str, dtype: torch.dtype | None) -> PartState:
    """Return the exported state of a part.

    Tables are read one at a time, so that the columns that are not exported are freed before the next.
    """
    state = checkpoint.read(part, ())
    tables: dict[str, TableState] = {}
    for name, entry in checkpoint.manifest.parts[part].tables.items():
        if "embedding" in entry.columns:
            table = checkpoint.read(part, (name,)).tables[name]
            embedding = table.columns["embedding"]
            embedding = embedding if dtype is None else embedding.to(dtype)
            meta = table.meta | {"dtype": str(embedding.dtype).removeprefix("torch."), "optimizer_state": []}
            meta = {key: value for key, value in meta.items() if key in table.meta}
            tables[name] = TableState({"ids": table.columns["ids"], "embedding": embedding}, table.buckets, meta)
    return replace(state, tables=tables)
