"""Writes a whole checkpoint, all ranks together: apart from the others, forced to the disk, then put in its place."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

from recis_hybrid.saver.checkpoint.part_files import write_part, write_part_of_each
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.manifest import Link, Manifest, PartEntry, dump_manifest
from recis_hybrid.saver.parts.protocol import JSON, PartState
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.storage.local import Storage

Work: TypeAlias = tuple[str, str, Callable[[], PartState], bool]
"""Name and kind of a part, what hands out its state, and whether each rank has a part of its own."""


def write_checkpoint(
    storage: Storage, ranks: Ranks, step: int, parts: Iterable[Work], link: Link | None = None
) -> None:
    """Write a checkpoint; if that fails, nothing of it is left.

    Args:
        storage: where checkpoints lie, taken by the caller.
        ranks: this rank and the others.
        step: its step; where there is a checkpoint of that step, this one takes its place.
        parts: what it holds, on all ranks the same.
        link: what the checkpoint builds on.

    Raises:
        CheckpointError: it cannot be written, or another rank failed.
    """
    folder, first = storage.folder(step), ranks.rank == 0
    entries: dict[str, PartEntry] = {}

    def commit() -> None:
        if first:
            storage.commit(step, dump_manifest(Manifest(step, ranks.size, entries, _about(), link)))

    try:
        ranks.together(lambda: storage.begin(step) if first else None)
        for name, kind, hand_out, of_each in parts:
            if of_each:
                entries.update(write_part_of_each(folder, ranks, name, kind, hand_out))
            else:
                entries[name] = write_part(folder, ranks, name, kind, hand_out)
        ranks.together(commit)
    except BaseException as error:
        if first:
            storage.abandon(step)
        if isinstance(error, OSError):
            raise CheckpointError(f"{folder}: could not be written ({error}). Make room, or save elsewhere.") from error
        raise
    ranks.together(lambda: storage.settle(step) if first else None)


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
