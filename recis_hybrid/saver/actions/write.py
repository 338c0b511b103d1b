"""Writes a checkpoint: all ranks write and sync files in a separate folder, then rank 0 commits it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from recis_hybrid.checkpointing import JSON, PartState
from recis_hybrid.saver.checkpoint.local_table import LocalTable, local_table
from recis_hybrid.saver.checkpoint.table_files import write_tables
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.file_io import encode_name
from recis_hybrid.saver.format.json_values import checked_object
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import (
    FileEntry,
    Link,
    Manifest,
    PartEntry,
    RemovedEntry,
    TensorSpec,
    dump_manifest,
)
from recis_hybrid.saver.format.tensor_file import check_tensor, part_tag, write_tensors
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.storage.resolve import Storage, storage_of
from recis_hybrid.saver.storage.step_directory import step_name

Target: TypeAlias = str | os.PathLike[str]
"""A directory or URL to write a checkpoint to."""


@dataclass(frozen=True)
class CapturedPart:
    """The captured state of a part, ready to be written."""

    kind: str
    """One of ``manifest.KINDS``."""
    state: Callable[[], PartState]
    """Returns this rank's state. Called once, possibly in another thread."""
    per_rank: bool = False
    """True if each rank writes its own state. Otherwise rank 0 writes everything but tables, which ranks share."""


def write_checkpoint(
    storage: Storage, ranks: Ranks, step: int, parts: Mapping[str, CapturedPart], link: Link | None = None
) -> None:
    """Write a checkpoint; collective. If it fails, none of its files remain.

    Args:
        storage: Storage of the checkpoints, which the caller has taken.
        ranks: This rank and the others.
        step: Step of the checkpoint; an existing one is replaced.
        parts: Parts by name; the same names and kinds on all ranks.
        link: The checkpoint that it builds on.

    Raises:
        CheckpointError: The checkpoint cannot be written, or another rank failed.
    """
    folder, first = storage.folder(step), ranks.rank == 0
    entries: dict[str, PartEntry] = {}

    def commit() -> None:
        if first:
            storage.commit(step, dump_manifest(Manifest(step, ranks.size, entries, _about(), link)))

    try:
        ranks.together(lambda: storage.begin(step) if first else None)
        for name, part in parts.items():
            entries.update(_write_part(folder, ranks, name, part))
        ranks.together(commit)
    except BaseException as error:
        if first:
            storage.abandon(step)
        if isinstance(error, OSError):
            raise CheckpointError(f"{folder}: could not be written ({error}). Make room, or save elsewhere.") from error
        raise
    ranks.together(lambda: storage.finish(step) if first else None)


def publish(root: Target, step: int, parts: Mapping[str, CapturedPart]) -> Location:
    """Write a checkpoint from states that are not those of live objects, by this process alone.

    Args:
        root: Directory or URL of the checkpoint; created if missing.
        step: Step of the checkpoint.
        parts: Parts by name.

    Returns:
        Directory of the checkpoint.

    Raises:
        CheckpointError: The checkpoint exists already, another job saves there, or it cannot be written.
    """
    storage = storage_of(root)
    place = storage.root / step_name(step)
    # Before the storage is taken, which may stop another job's saves, and again once no other job can write to it.
    _refuse_existing(place)
    storage.take()
    _refuse_existing(place)
    write_checkpoint(storage, Ranks(None), step, parts)
    return place


def _write_part(root: Location, ranks: Ranks, name: str, part: CapturedPart) -> dict[str, PartEntry]:
    """Write and sync the files of a part; collective.

    Args:
        root: Directory of the checkpoint.
        ranks: This rank and the others.
        name: Name of the part.
        part: The part.

    Returns:
        Manifest entries by name: one, or with ``per_rank`` one per rank, named ``name[rank]``.

    Raises:
        CheckpointError: The state is not valid, or cannot be written.
    """
    own = f"{name}[{ranks.rank}]" if part.per_rank else name
    where = f"Saver.save: part {own!r}"
    tables: list[LocalTable] = []
    removed: list[LocalTable] = []

    def write_dense() -> JSON:
        state = part.state()
        if state.tables and part.per_rank:
            raise CheckpointError(f"{where}: ranks share tables. Pass the object without PerRank.")
        meta = checked_object(f"{where}, meta", state.meta)
        for tensor_name, tensor in state.tensors.items():
            check_tensor(where, tensor_name, tensor)
        for table, rows in state.tables.items():
            tables.append(local_table(f"{where}, table {table!r}", table, rows))
            if rows.removed is not None:
                removed.append(local_table(f"{where}, table {table!r}, removed", table, rows.removed))
        if not part.per_rank and ranks.rank != 0:
            return None
        specs = {tensor_name: TensorSpec.of(tensor) for tensor_name, tensor in state.tensors.items()}
        file = _write_dense_file(root, own, state.tensors) if state.tensors else None
        return [own, meta, [[each, spec.dtype, [*spec.shape]] for each, spec in specs.items()], file]

    written = [answer for answer in ranks.together(write_dense) if answer is not None]
    entries = write_tables(root, ranks, name, tables)
    for table, ids in write_tables(root, ranks, name, removed, "removed").items():
        entries[table] = replace(entries[table], removed=RemovedEntry(ids.rows, ids.ranges))
    return {
        each: PartEntry(
            part.kind,
            meta,
            {tensor: TensorSpec(dtype, tuple(shape)) for tensor, dtype, shape in specs},
            None if file is None else FileEntry(file[0], file[1], tuple(file[2])),
            entries,
        )
        for each, meta, specs, file in written
    }


def _write_dense_file(root: Location, name: str, tensors: dict[str, Tensor]) -> list[JSON]:
    """Write and sync the dense tensors of a part, and return the path, size and checksums of the file."""
    relative = f"dense/{encode_name(name)}.safetensors"
    (root / "dense").mkdir(exist_ok=True)
    written = write_tensors(root / relative, tensors, part_tag(name))
    written.sync()
    return [relative, written.size, [*written.crc32]]


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
