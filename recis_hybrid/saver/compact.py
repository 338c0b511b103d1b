"""Makes whole checkpoints of incremental ones, and exports for serving."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from recis_hybrid.checkpointing import PartState, TableState
from recis_hybrid.saver.actions.write import Target, publish, write_checkpoint
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.checkpoint.part_files import CapturedPart
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.location import Location, RemotePath
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.storage.resolve import storage_of
from recis_hybrid.saver.storage.step_directory import read_manifest, step_name

EXPORT_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
"""The dtypes that embeddings can be exported in."""
_SERVED = ("saveable", "module", "json")


def compact(checkpoint: StoredCheckpoint, to: Target | None = None) -> Location:
    """Write a checkpoint whole that holds just what changed.

    Its files are then those that a save of the same state without `delta` writes, byte for byte.

    Args:
        checkpoint: what to make whole.
        to: the directory or URL that takes it, or None to put it in the place of the incremental one, which an object
            store cannot.

    Returns:
        Directory of the whole checkpoint.

    Raises:
        CorruptCheckpoint: it, or one that it builds on, is damaged.
        CheckpointError: others build on it, another job saves there, or it cannot be written.
    """
    step, parts = checkpoint.manifest.step, checkpoint.manifest.parts
    captured = {name: CapturedPart(part.kind, partial(checkpoint.read, name)) for name, part in parts.items()}
    if to is not None:
        return publish(to, step, captured)
    if checkpoint.manifest.previous is not None:
        if isinstance(checkpoint.root, RemotePath):
            raise CheckpointError(
                f"{checkpoint.directory}: an object store cannot replace a checkpoint at once. Name another place with "
                "--to."
            )
        storage = storage_of(checkpoint.root)
        storage.take()
        for later in storage.steps():
            link = read_manifest(storage.root / step_name(later), later).previous
            if link is not None and link.step == step:
                raise CheckpointError(
                    f"{checkpoint.directory}: step {later} builds on it as it is. Compact the last step that does, or "
                    "write elsewhere with --to."
                )
        write_checkpoint(storage, Ranks(None), step, captured)
    return checkpoint.directory


def export(checkpoint: StoredCheckpoint, out: Target, dtype: torch.dtype | None = None) -> Location:
    """Write what serving needs of a checkpoint: ids and embeddings, modules and JSON.

    Optimizers, generators, schedulers and reading positions stay behind, and so do the optimizer state and metadata of
    rows and what admission knows. The result is a checkpoint of the same format, which `recis_hybrid.serving` reads.

    Args:
        checkpoint: what to export, incremental or whole.
        out: the directory or URL that takes it; made if it is not there.
        dtype: of the embeddings, one of `EXPORT_DTYPES`; None for that of the table.

    Returns:
        Directory of the export: `out` and the step.

    Raises:
        CorruptCheckpoint: the checkpoint, or one that it builds on, is damaged.
        CheckpointError: there is such an export already, or it cannot be written.
    """
    captured = {
        name: CapturedPart(part.kind, partial(_served, checkpoint, name, dtype))
        for name, part in checkpoint.manifest.parts.items()
        if part.kind in _SERVED
    }
    return publish(out, checkpoint.manifest.step, captured)


def _served(checkpoint: StoredCheckpoint, part: str, dtype: torch.dtype | None) -> PartState:
    """A part as it is served; its tables are read one by one, for what is left out of each to go again."""
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
