"""Makes whole checkpoints of incremental ones, and exports for serving."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch

from recis_hybrid.saver.actions.write import write_checkpoint
from recis_hybrid.saver.checkpoint.chain import Checkpoint
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.file_io import Location
from recis_hybrid.saver.parts.protocol import PartState, TableState
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.storage.local import Storage, storage_of
from recis_hybrid.saver.storage.remote import RemotePath
from recis_hybrid.saver.storage.step_directory import read_manifest, step_name

EXPORT_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
"""The dtypes that embeddings can be exported in."""
Target: TypeAlias = str | os.PathLike[str]
"""A directory or URL that takes a checkpoint."""
_SERVED = ("saveable", "module", "json")


def compact(checkpoint: Checkpoint, to: Target | None = None) -> Location:
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
    states = [(name, part.kind, partial(checkpoint.read, name)) for name, part in parts.items()]
    if to is not None:
        return publish(to, step, states)
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
        _write(storage, step, states)
    return checkpoint.directory


def export(checkpoint: Checkpoint, out: Target, dtype: torch.dtype | None = None) -> Location:
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
    served = {name: part for name, part in checkpoint.manifest.parts.items() if part.kind in _SERVED}
    states = [(name, part.kind, partial(_served, checkpoint, name, dtype)) for name, part in served.items()]
    return publish(out, checkpoint.manifest.step, states)


def publish(root: Target, step: int, states: Iterable[tuple[str, str, Callable[[], PartState]]]) -> Location:
    """Write a whole checkpoint of states that are not of live objects.

    Args:
        root: the directory or URL that takes it; made if it is not there.
        step: its step.
        states: name and kind of each part, and what returns its state.

    Returns:
        Its directory.

    Raises:
        CheckpointError: it is there already, another job saves there, or it cannot be written.
    """
    storage = storage_of(root)
    place = storage.root / step_name(step)
    # Before it is taken, which may end what another job does there, and when no other can write it any more.
    _refuse(place)
    storage.take()
    _refuse(place)
    _write(storage, step, states)
    return place


def _refuse(place: Location) -> None:
    if place.exists():
        raise CheckpointError(f"{place}: is there already. Name another directory, or delete it first.")


def _write(storage: Storage, step: int, states: Iterable[tuple[str, str, Callable[[], PartState]]]) -> None:
    write_checkpoint(storage, Ranks(None), step, ((name, kind, state, False) for name, kind, state in states))


def _served(checkpoint: Checkpoint, part: str, dtype: torch.dtype | None) -> PartState:
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
