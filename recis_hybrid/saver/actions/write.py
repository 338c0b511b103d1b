"""Writes a checkpoint: all ranks write and sync files in a separate folder, then rank 0 commits it.

Each file of rows is written by one rank, to which the others send their rows. Once a table has more files than ranks,
at most W - 1 of its files have rows of several of the W ranks. With one writer per file, neither network file systems,
which separate concurrent writers only by whole pages, nor object stores, which cannot write at an offset, need special
treatment.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from recis_hybrid.checkpointing import JSON, PartState
from recis_hybrid.saver.checkpoint.local_table import LocalTable, local_table
from recis_hybrid.saver.checkpoint.table_plan import PlannedFile, plan_files
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.file_io import encode_name
from recis_hybrid.saver.format.header import Place, places, views
from recis_hybrid.saver.format.json_values import checked_object
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import (
    FileEntry,
    Link,
    Manifest,
    PartEntry,
    RangeEntry,
    RemovedEntry,
    TableEntry,
    TensorSpec,
    dump_manifest,
)
from recis_hybrid.saver.format.row_file import file_specs, row_tag
from recis_hybrid.saver.format.tensor_file import check_tensor, part_tag, write_assembled, write_tensors
from recis_hybrid.saver.runtime.ranks import Ranks
from recis_hybrid.saver.runtime.workers import Workers
from recis_hybrid.saver.storage.resolve import Storage, storage_of
from recis_hybrid.saver.storage.step_directory import step_name

_WRITERS = 2
"""Threads that assemble and write files, and as many that wait for the disk, so that it is never idle."""

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


def publish(root: Target, step: int, parts: Mapping[str, CapturedPart], link: Link | None = None) -> Location:
    """Write a checkpoint from states that are not those of live objects, by this process alone.

    Args:
        root: Directory or URL of the checkpoint; created if missing.
        step: Step of the checkpoint.
        parts: Parts by name.
        link: The checkpoint that it builds on, the latest in the same directory.

    Returns:
        Directory of the checkpoint.

    Raises:
        CheckpointError: The checkpoint exists already, another job saves there, it cannot be written, or the one that
            it builds on is not the latest.
    """
    storage = storage_of(root)
    place = storage.root / step_name(step)
    # Before the storage is taken, which may stop another job's saves, and again once no other job can write to it.
    _refuse_existing(place)
    storage.take()
    _refuse_existing(place)
    if link is not None and (latest := max(storage.steps(), default=None)) != link.step:
        raise CheckpointError(
            f"{place}: builds on step {link.step}, but the latest step in {storage.root} is {latest}. Another process "
            "writes there, too; write the changes again."
        )
    write_checkpoint(storage, Ranks(None), step, parts, link)
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


def write_tables(
    root: Location, ranks: Ranks, part: str, tables: Sequence[LocalTable], folder: str = "sparse"
) -> dict[str, TableEntry]:
    """Write and sync the tables of a part; collective.

    Args:
        root: Directory of the checkpoint.
        ranks: This rank and the others.
        part: Name of the part.
        tables: This rank's rows of each table.
        folder: Folder in ``root`` for the files.

    Returns:
        Manifest entries by table.

    Raises:
        CheckpointError: The ranks hold different tables, or one of them cannot write a file.
    """
    if not tables:
        return {}
    plan = plan_files(ranks, part, tables)
    written = ranks.together(lambda: _TableWriter(root, ranks, part, tables, plan, folder).write())
    entries = {
        number: FileEntry(path, size, tuple(sums)) for of_rank in written for number, path, size, sums in of_rank
    }
    ranges: list[list[RangeEntry]] = [[] for _ in tables]
    for file in plan:
        ranges[file.table].append(RangeEntry(file.first_bucket, file.last_bucket, sum(file.rows), entries[file.number]))
    return {
        table.name: TableEntry(sum(item.rows for item in of_table), table.specs, table.meta, tuple(of_table))
        for table, of_table in zip(tables, ranges, strict=True)
    }


class _TableWriter:
    """Writes this rank's files of a plan. Failures are raised only after all rows for other ranks are sent."""

    def __init__(
        self,
        root: Location,
        ranks: Ranks,
        part: str,
        tables: Sequence[LocalTable],
        plan: Sequence[PlannedFile],
        folder: str,
    ) -> None:
        self._folder = folder
        self._root, self._ranks, self._part, self._tables, self._plan = root, ranks, part, tables, plan
        counts = Counter(file.table for file in plan)
        self._cuts = [table.cuts(counts[number]) for number, table in enumerate(tables)]
        self._written: list[JSON] = []
        self._syncing: list[Future[None]] = []

    def write(self) -> list[JSON]:
        """Write the files.

        Returns:
            Number in the plan, path, size and checksums of each.
        """
        failures: list[BaseException] = []
        running: list[Future[None]] = []
        with Workers(_WRITERS) as disk, Workers(_WRITERS) as pool:
            # Files of several ranks first, in the same order everywhere: no rank waits for one that writes its own.
            for file in sorted(self._plan, key=lambda file: (sum(rows > 0 for rows in file.rows) < 2, file.number)):
                if file.writer == self._ranks.rank:
                    received = self._receive(file)
                    if not failures:
                        running.append(pool.submit(partial(self._write_file, file, received, disk)))
                    if len(running) > _WRITERS:
                        failures += _errors([running.pop(0)])
                elif file.rows[self._ranks.rank]:
                    failures += self._send(file)
            failures += _errors(running)
        failures += _errors(self._syncing)
        try:
            if failures:
                raise failures[0]
        finally:  # break the cycle of the error and this frame, which keeps the saver's lease alive
            failures.clear()
            running.clear()
            self._syncing.clear()
        return self._written

    def _receive(self, file: PlannedFile) -> dict[int, Tensor]:
        """Receive the rows of a file from other ranks; return them by rank."""
        others = [rank for rank, rows in enumerate(file.rows) if rows and rank != self._ranks.rank]
        return {rank: self._ranks.receive(_size(self._packed(file, rank)), rank, file.number) for rank in others}

    def _send(self, file: PlannedFile) -> list[BaseException]:
        """Send this rank's rows of a file; return errors of reading them, despite which a message is sent."""
        found, failures = self._packed(file, self._ranks.rank), []
        data = torch.zeros(_size(found), dtype=torch.uint8)
        try:
            self._read(file, views(data, found))
        except BaseException as error:
            failures.append(error)
        self._ranks.send(data, file.writer, file.number)
        return failures

    def _write_file(self, file: PlannedFile, received: dict[int, Tensor], disk: Workers) -> None:
        table = self._tables[file.table]
        relative = _path_of(self._folder, self._part, table.name, file)
        path = self._root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        specs = file_specs(table.specs, sum(file.rows), sum(file.present))
        tag = row_tag(self._part, table.name, file.first_bucket, file.last_bucket)
        written = write_assembled(path, specs, tag, partial(self._assemble, file, received))
        self._syncing.append(disk.submit(written.sync))
        if len(self._syncing) > 4 * _WRITERS:
            self._syncing[-4 * _WRITERS].exception()  # limits the number of open files
        self._written.append([file.number, relative, written.size, list(written.crc32)])

    def _assemble(self, file: PlannedFile, received: dict[int, Tensor], out: dict[str, Tensor]) -> None:
        """Write the rows of all ranks in order, and their index."""
        row = bucket = 0
        out["bucket_offsets"][:1] = 0
        for rank, (rows, present) in enumerate(zip(file.rows, file.present, strict=True)):
            if not rows:
                continue
            part = {name: out[name][row : row + rows] for name in self._tables[file.table].specs}
            part["buckets"] = out["buckets"][bucket : bucket + present]
            part["bucket_offsets"] = out["bucket_offsets"][bucket : bucket + present + 1]
            if rank == self._ranks.rank:
                self._read(file, part)
            else:
                for name, values in views(received[rank], self._packed(file, rank)).items():
                    part[name].copy_(values)
            part["bucket_offsets"] += row  # until now relative to the rank's own first row
            row, bucket = row + rows, bucket + present

    def _read(self, file: PlannedFile, out: dict[str, Tensor]) -> None:
        """Write this rank's rows of a file, and their index."""
        table, (rows, present) = self._tables[file.table], self._cuts[file.table]
        first, begin, end = rows[file.range], present[file.range], present[file.range + 1]
        table.read(first, rows[file.range + 1], out)
        out["buckets"].copy_(table.present[begin:end])
        out["bucket_offsets"].copy_(table.offsets[begin : end + 1] - first)

    def _packed(self, file: PlannedFile, rank: int) -> dict[str, Place]:
        """Return the layout of a rank's rows of a file in its message."""
        return places(file_specs(self._tables[file.table].specs, file.rows[rank], file.present[rank]))


def _errors(futures: Sequence[Future[None]]) -> list[BaseException]:
    errors = [future.exception() for future in futures]
    return [error for error in errors if error is not None]


def _size(found: dict[str, Place]) -> int:
    return max(place.stop for place in found.values())


def _path_of(folder: str, part: str, table: str, file: PlannedFile) -> str:
    table_folder = f"{folder}/{encode_name(part)}/{encode_name(table)}"
    return f"{table_folder}/{file.first_bucket:05d}-{file.last_bucket:05d}.safetensors"


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
