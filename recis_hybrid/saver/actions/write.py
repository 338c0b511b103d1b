"""Writes a whole checkpoint, all ranks together: apart from the others, forced to the disk, then put in its place."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import TypeAlias

import torch

from recis_hybrid.checkpointing import JSON
from recis_hybrid.saver.checkpoint.part_files import CapturedPart, write_part
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import Link, Manifest, PartEntry, dump_manifest
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.storage.resolve import Storage, storage_of
from recis_hybrid.saver.storage.step_directory import step_name

Target: TypeAlias = str | os.PathLike[str]
"""A directory or URL that a checkpoint is written to."""


def write_checkpoint(
    storage: Storage, ranks: Ranks, step: int, parts: Mapping[str, CapturedPart], link: Link | None = None
) -> None:
    """Write a checkpoint; if that fails, nothing of it is left.

    Args:
        storage: Where checkpoints lie; the caller has taken it.
        ranks: This rank and the others.
        step: Step of the checkpoint; one that exists is replaced.
        parts: Its parts by name, the same names and kinds on all ranks.
        link: The checkpoint that it builds on.

    Raises:
        CheckpointError: It cannot be written, or another rank failed.
    """
    folder, first = storage.folder(step), ranks.rank == 0
    entries: dict[str, PartEntry] = {}

    def commit() -> None:
        if first:
            storage.commit(step, dump_manifest(Manifest(step, ranks.size, entries, _about(), link)))

    try:
        ranks.together(lambda: storage.begin(step) if first else None)
        for name, part in parts.items():
            entries.update(write_part(folder, ranks, name, part))
        ranks.together(commit)
    except BaseException as error:
        if first:
            storage.abandon(step)
        if isinstance(error, OSError):
            raise CheckpointError(f"{folder}: could not be written ({error}). Make room, or save elsewhere.") from error
        raise
    ranks.together(lambda: storage.finish(step) if first else None)


def publish(root: Target, step: int, parts: Mapping[str, CapturedPart]) -> Location:
    """Write a checkpoint whose states do not come from live objects, by this process alone.

    Args:
        root: Directory or URL of the checkpoint; made if it does not exist.
        step: Step of the checkpoint.
        parts: Its parts by name.

    Returns:
        Directory of the checkpoint.

    Raises:
        CheckpointError: The checkpoint exists already, another job saves there, or it cannot be written.
    """
    storage = storage_of(root)
    place = storage.root / step_name(step)
    # Before the storage is taken, which may end another job's saves, and again when no other job can write to it.
    _refuse_existing(place)
    storage.take()
    _refuse_existing(place)
    write_checkpoint(storage, Ranks(None), step, parts)
    return place


def _refuse_existing(place: Location) -> None:
    if place.exists():
        raise CheckpointError(f"{place}: exists already. Name another directory, or delete it first.")


def _about() -> dict[str, JSON]:
    try:
        own = importlib.metadata.version("recis_hybrid")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        own = "not installed"
    versions: dict[str, JSON] = {
        "python": platform.python_version(),
        "recis_hybrid": own,
        "safetensors": importlib.metadata.version("safetensors"),
        "torch": torch.__version__,
    }
    return {"wall_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "versions": versions}
