"""Makes whole checkpoints of incremental ones, and exports for serving."""

import ctypes
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from recis_hybrid.saver.chain import Checkpoint
from recis_hybrid.saver.directory import read_manifest, step_name
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.lease import Lease
from recis_hybrid.saver.protocol import PartState, TableState
from recis_hybrid.saver.saver import Saver
from recis_hybrid.saver.writing import partial_of, write_checkpoint

EXPORT_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
"""The dtypes that embeddings can be exported in."""
_SERVED = ("saveable", "module", "json")


def compact(checkpoint: Checkpoint, to: Path | None = None) -> Path:
    """Write a checkpoint whole that holds just what changed.

    Its files are then those that a save of the same state without `delta` writes, byte for byte.

    Args:
        checkpoint: what to make whole.
        to: the directory that takes it, or None to put it in the place of the incremental one.

    Returns:
        Directory of the whole checkpoint.

    Raises:
        CorruptCheckpoint: it, or one that it builds on, is damaged.
        CheckpointError: others build on it, another job saves there, or it cannot be written.
    """
    step, root = checkpoint.manifest.step, to or checkpoint.root
    place = root / step_name(step)
    if to is None:
        if checkpoint.manifest.previous is None:
            return place
        for later in Saver(root).steps():
            link = read_manifest(root / step_name(later), later).previous
            if link is not None and link.step == step:
                raise CheckpointError(
                    f"{place}: step {later} builds on it as it is. Compact the last step that does, or write elsewhere "
                    "with --to."
                )
    states = ((name, part.kind, _sound(checkpoint, name)) for name, part in checkpoint.manifest.parts.items())
    lease = _leased(root, place if to is not None else None)
    write_checkpoint(root, step, states, lambda new: new.rename(place) if to is not None else _exchange(new, place))
    if to is None:
        shutil.rmtree(partial_of(root, step), ignore_errors=True)  # the incremental one, which is there now
    del lease
    return place


def export(checkpoint: Checkpoint, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write what serving needs of a checkpoint: ids and embeddings, modules and JSON.

    Optimizers, generators, schedulers and reading positions stay behind, and so do the optimizer state and metadata of
    rows and what admission knows. The result is a checkpoint of the same format, which `recis_hybrid.serving` reads.

    Args:
        checkpoint: what to export, incremental or whole.
        out: the directory that takes it; made if it is not there.
        dtype: of the embeddings, one of `EXPORT_DTYPES`; None for that of the table.

    Returns:
        Directory of the export: `out` and the step.

    Raises:
        CorruptCheckpoint: the checkpoint, or one that it builds on, is damaged.
        CheckpointError: there is such an export already, or it cannot be written.
    """
    served = {name: part for name, part in checkpoint.manifest.parts.items() if part.kind in _SERVED}
    states = ((name, part.kind, _served(checkpoint, name, dtype)) for name, part in served.items())
    return publish(out, checkpoint.manifest.step, states)


def publish(root: Path, step: int, states: Iterable[tuple[str, str, PartState]]) -> Path:
    """Write a whole checkpoint of states that are not of live objects.

    Args:
        root: the directory that takes it; made if it is not there.
        step: its step.
        states: name, kind and state of each part.

    Returns:
        Its directory.

    Raises:
        CheckpointError: it is there already, another job saves there, or it cannot be written.
    """
    place = root / step_name(step)
    lease = _leased(root, place)
    write_checkpoint(root, step, states, lambda new: new.rename(place))
    del lease
    return place


def _served(checkpoint: Checkpoint, part: str, dtype: torch.dtype | None) -> PartState:
    """A part as it is served; its tables are read one by one, for what is left out of each to go again."""
    state = _sound(checkpoint, part, ())
    tables: dict[str, TableState] = {}
    for name, entry in checkpoint.manifest.parts[part].tables.items():
        if "embedding" in entry.columns:
            table = _sound(checkpoint, part, (name,)).tables[name]
            embedding = table.columns["embedding"]
            embedding = embedding if dtype is None else embedding.to(dtype)
            meta = table.meta | {"dtype": str(embedding.dtype).removeprefix("torch."), "optimizer_state": []}
            meta = {key: value for key, value in meta.items() if key in table.meta}
            tables[name] = TableState({"ids": table.columns["ids"], "embedding": embedding}, table.buckets, meta)
    return replace(state, tables=tables)


def _sound(checkpoint: Checkpoint, name: str, tables: Collection[str] | None = None) -> PartState:
    checkpoint.verify(name, tables)
    return checkpoint.read(name, tables)


def _leased(root: Path, place: Path | None) -> Lease:
    root.mkdir(parents=True, exist_ok=True)
    lease = Lease(root)
    lease.take()
    if place is not None and place.exists():
        raise CheckpointError(f"{place}: is there already. Name another directory, or delete it first.")
    return lease


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step, so that at every moment one of them is in its place.

    File systems that cannot (some network ones) get two renames: a crash between them leaves both under names that the
    next save removes.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(here, os.fsencode(new), here, os.fsencode(old), both) == 0:
        return
    aside = old.with_name(f".{old.name}.deleted")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside)
