"""A checkpoint on disk and the chain it builds on: an incremental one holds changes since the one before."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, PartState, TableState
from recis_hybrid.saver.checkpoint.delta import apply_changes, between, merge_changes
from recis_hybrid.saver.checkpoint.table_reader import concatenate, read_pieces, read_table
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CheckpointMismatch, CorruptCheckpoint
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import MANIFEST, Link, Manifest, PartEntry, TableEntry
from recis_hybrid.saver.format.row_file import Reads, Rows
from recis_hybrid.saver.format.tensor_file import part_tag, read_tensors
from recis_hybrid.saver.storage.resolve import storage_of
from recis_hybrid.saver.storage.step_directory import STEP, read_manifest, step_name


class StoredCheckpoint:
    """A checkpoint whose manifest has been read and compared with its directory.

    Args:
        root: Directory that contains it and those it builds on.
        step: Step of the checkpoint.
        listed: Whether to list its files, and those of the checkpoints it builds on. One rank does so for all.

    Raises:
        CorruptCheckpoint: The manifest is damaged, or a file is missing, unknown or of another size.
        CheckpointError: The checkpoint does not exist, or its format version is not supported.
    """

    def __init__(self, root: Location, step: int, *, listed: bool = True) -> None:
        self.root = root
        self.directory = root / step_name(step)
        self.manifest: Manifest = read_manifest(self.directory, step, listed=listed)
        self._listed = listed
        self._previous: StoredCheckpoint | None = None

    def previous(self) -> StoredCheckpoint:
        """Return the checkpoint that this incremental one builds on.

        Raises:
            CorruptCheckpoint: That checkpoint is missing or damaged, or has changed since this one was written.
        """
        link = self.manifest.previous
        assert link is not None
        if self._previous is None:
            path = self.root / step_name(link.step) / MANIFEST
            where = f"{self.directory}: holds changes since step {link.step}, which"
            if not path.is_file():
                raise CorruptCheckpoint(f"{where} is missing in {self.root}. Put it back, or load another step.")
            found = link_to(self.root, link.step)
            if found != link:
                raise CorruptCheckpoint(
                    f"{where} has changed: the SHA-256 of {path} must be {link.sha256}, is {found.sha256}. {OTHER_STEP}"
                )
            self._previous = StoredCheckpoint(self.root, link.step, listed=self._listed)
        return self._previous

    def part(self, name: str, kind: str) -> PartEntry:
        """Return the manifest entry of a part of a kind.

        Args:
            name: Name of the part.
            kind: One of ``manifest.KINDS``.

        Raises:
            CheckpointMismatch: The part does not exist, or is of another kind.
        """
        parts = self.manifest.parts
        where = f"{self.directory / MANIFEST}: part {name!r}"
        if name not in parts:
            near = difflib.get_close_matches(name, parts, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise CheckpointMismatch(
                f"{where} must be in the checkpoint, which has {sorted(parts)}{meant}. Omit it, or save it first."
            )
        found = parts[name].kind
        if found != kind:
            remedy = "Use Saver.read_json." if found == "json" else "Pass the object that was saved under this name."
            raise CheckpointMismatch(f"{where} was saved from a {found}, but a {kind} was requested. {remedy}")
        return parts[name]

    def verify(self, name: str, reads: Reads | None = None) -> None:
        """Read and verify all files that a part needs, including those of earlier checkpoints.

        Args:
            name: Name of the part.
            reads: Counts the bytes of tables that are read.

        Raises:
            CorruptCheckpoint: A file differs from the manifest, or an earlier checkpoint is missing or has changed.
        """
        entry = self.manifest.parts[name]
        self.dense(name)
        for table in entry.tables:
            for _ in self.pieces(name, table, (0, BUCKETS), reads or Reads()):
                pass

    def rows(self, name: str, table: str) -> int:
        """Estimate the number of rows of a table.

        The estimate is limited to what the files can hold, whatever the manifest says.
        """
        entry = self.manifest.parts[name].tables[table]
        layers = [entry, *(below for _, below in self._earlier(name, table))]
        width = sum(math.prod(spec.shape) * spec.itemsize for spec in entry.columns.values())
        return sum(min(item.rows, item.file.size // width) for layer in layers for item in layer.ranges)

    def read(
        self,
        name: str,
        tables: Collection[str] | None = None,
        *,
        wanted: Callable[[str], tuple[int, int]] = lambda _: (0, BUCKETS),
        reads: Reads | None = None,
    ) -> PartState:
        """Read a part and verify its checksums.

        Args:
            name: Name of the part.
            tables: Tables to read; None for all.
            wanted: Returns, for the name of a table, the first bucket to read and the one after the last.
            reads: Counts the bytes of tables that are read.

        Returns:
            The state, with all changes of the chain applied to its tables, in new memory.

        Raises:
            CorruptCheckpoint: A file differs from the manifest, or an earlier checkpoint is missing.
        """
        entry = self.manifest.parts[name]
        whole = {
            table: concatenate(rows, list(self.pieces(name, table, wanted(table), reads or Reads())))
            for table, rows in entry.tables.items()
            if tables is None or table in tables
        }
        return PartState(whole, self.dense(name), entry.meta)

    def dense(self, name: str) -> dict[str, Tensor]:
        """Read the dense tensors of a part and verify the checksums of their file.

        Args:
            name: Name of the part.

        Returns:
            New tensors on the CPU, by name.

        Raises:
            CorruptCheckpoint: The file has changed, or its contents differ from the manifest.
        """
        entry = self.manifest.parts[name]
        if (file := entry.file) is None:
            return {}
        path = self.directory / file.path
        return read_tensors(path, f"part {name!r}", file.size, file.crc32, entry.tensors, part_tag(name))

    def pieces(self, name: str, table: str, wanted: tuple[int, int], reads: Reads) -> Iterator[Rows]:
        """Read the rows of some buckets of a table in pieces, with all changes of the chain applied.

        Args:
            name: Name of the part.
            table: Name of the table.
            wanted: The first bucket to read, and the one after the last.
            reads: Counts the bytes that are read.

        Yields:
            Rows, in order of (bucket, id).

        Raises:
            CorruptCheckpoint: A file differs from the manifest, or an earlier checkpoint is missing.
        """
        layers = [(self, self.manifest.parts[name].tables[table]), *self._earlier(name, table)]
        (base, entry), later = layers[-1], layers[-2::-1]
        pieces = read_pieces(base.directory, name, table, entry, wanted, reads)
        if not later:
            yield from pieces
            return
        change = merge_changes([_change(at.directory, name, table, rows, wanted, reads) for at, rows in later])
        items = [item for item in entry.ranges if item.first_bucket < wanted[1] and wanted[0] <= item.last_bucket]
        for item, rows in zip(items, pieces, strict=True):
            part = between(change, max(item.first_bucket, wanted[0]), min(item.last_bucket + 1, wanted[1]))
            state = apply_changes(TableState(rows.columns, rows.buckets, {}), part)
            yield Rows(state.columns, state.buckets)

    def changes_since(
        self, link: Link, name: str, table: str, wanted: tuple[int, int] = (0, BUCKETS)
    ) -> TableState | None:
        """Read the changes of a table since an earlier checkpoint of the same run, without reading that one's rows.

        Args:
            link: The earlier checkpoint.
            name: Name of the part.
            table: Name of the table.
            wanted: The first bucket to read, and the one after the last.

        Returns:
            Changed rows and removed ids, some of them perhaps unchanged; None if incremental checkpoints do not lead
            from this checkpoint to the earlier one.

        Raises:
            CorruptCheckpoint: A file differs from the manifest.
        """
        at, layers = self, list[tuple[StoredCheckpoint, TableEntry]]()
        while at.manifest.step > link.step:
            part = at.manifest.parts.get(name)
            entry = None if part is None else part.tables.get(table)
            before = at.manifest.previous
            if entry is None or entry.removed is None or before is None or before.step < link.step:
                return None
            if not (self.root / step_name(before.step) / MANIFEST).is_file():
                return None
            layers.append((at, entry))
            at = at.previous()
        # The digest of the checkpoint itself, if there is no link to it.
        found = link_to(self.root, at.manifest.step)
        if found != link or any(entry.columns != layers[0][1].columns for _, entry in layers):
            return None
        if not layers:
            state = read_table(self.directory, name, table, self.manifest.parts[name].tables[table], (0, 0))
            return replace(state, removed=replace(state, columns={"ids": state.columns["ids"]}))
        reads = Reads()
        return merge_changes([_change(at.directory, name, table, rows, wanted, reads) for at, rows in layers[::-1]])

    def _earlier(self, name: str, table: str) -> Iterator[tuple[StoredCheckpoint, TableEntry]]:
        """Yield the earlier states that a table builds on, newest first."""
        at, entry = self, self.manifest.parts[name].tables[table]
        while entry.removed is not None:
            at = at.previous()
            part = at.manifest.parts.get(name)
            below = None if part is None else part.tables.get(table)
            if below is None or below.columns != entry.columns or below.meta != entry.meta:
                raise CorruptCheckpoint(
                    f"{at.directory}: part {name!r} must have the table {table!r} with the columns "
                    f"{list(entry.columns)}, which {self.directory} builds on. {OTHER_STEP}"
                )
            entry = below
            yield at, entry


def _change(
    root: Location, name: str, table: str, entry: TableEntry, wanted: tuple[int, int], reads: Reads
) -> TableState:
    """Return the changes of some buckets of a table in an incremental checkpoint: rows and removed ids."""
    assert entry.removed is not None
    rows = read_table(root, name, table, entry, wanted, reads)
    return replace(rows, removed=read_table(root, name, table, entry.removed.as_table(), wanted, reads))


def open_checkpoint(place: str | os.PathLike[str], step: int | None = None) -> StoredCheckpoint:
    """Open a checkpoint by its own path, or by that of its run.

    Args:
        place: Directory or URL of a run, or of one of its checkpoints ``step_…``.
        step: Step of the checkpoint; None for the latest, or that of the path.

    Raises:
        CorruptCheckpoint: The manifest is damaged, or a file is missing, unknown or of another size.
        CheckpointError: There is no such checkpoint.
    """
    root = storage_of(place).root
    match = STEP.fullmatch(root.name)
    if match is None:
        steps = storage_of(place).steps()
        if not steps:
            raise CheckpointError(f"{place} holds no complete checkpoint. Name a run's directory, or a step_… in it.")
        if step is not None and step not in steps:
            raise CheckpointError(f"{place} holds no complete checkpoint of step {step}, only of {steps}.")
        return StoredCheckpoint(root, steps[-1] if step is None else step)
    if step is not None and step != int(match[1]):
        raise CheckpointError(
            f"{place} is not the checkpoint of step {step}. Name the run's directory, or omit --step."
        )
    if not root.is_dir():
        raise CheckpointError(f"{place} is not a directory. Name a run's directory, or a step_… in it.")
    return StoredCheckpoint(root.parent, int(match[1]))


def link_to(root: Location, step: int) -> Link:
    """Return the link by which an incremental checkpoint refers to the one it builds on.

    Args:
        root: Directory of both.
        step: Step of the earlier one.

    Returns:
        Its step, and the SHA-256 of its manifest.

    Raises:
        OSError: The manifest cannot be read.
    """
    return Link(step, hashlib.sha256((root / step_name(step) / MANIFEST).read_bytes()).hexdigest())


def obsolete_steps(root: Location, steps: list[int], keep: int, links: dict[int, int | None]) -> list[int]:
    """Return the steps of the checkpoints to delete.

    Args:
        root: Directory of the checkpoints.
        steps: Steps of all checkpoints, ascending.
        keep: Number of newest checkpoints to keep, together with those that they build on.
        links: The step that each checkpoint builds on, as far as known; extended.

    Returns:
        Steps to delete, each before those that it builds on, so that no checkpoint ever lacks what it needs.
    """
    if len(steps) <= keep:
        return []
    try:
        needed = _needed(root, steps[-keep:], links)
    except CheckpointError:
        # Delete nothing while a damaged checkpoint is among the newest `keep`: what it builds on is unknown.
        return []
    return [step for step in reversed(steps[:-keep]) if step not in needed]


def _needed(root: Location, steps: list[int], links: dict[int, int | None]) -> set[int]:
    """Return the steps of the given checkpoints, and of all that they build on."""
    needed: set[int] = set()
    for step in steps:
        at: int | None = step
        while at is not None and at not in needed and (root / step_name(at) / MANIFEST).is_file():
            needed.add(at)
            if at not in links:
                link = read_manifest(root / step_name(at), at).previous
                links[at] = None if link is None else link.step
            at = links[at]
    return needed


def other_steps(root: Location, steps: list[int], step: int, error: str) -> str:
    """Describe the other checkpoints, for the error message of a damaged one.

    Args:
        root: Directory of the checkpoints.
        steps: Steps of all checkpoints.
        step: Step of the damaged one.
        error: Its error message, with the path of the damaged file.

    Returns:
        A text that names the newest other checkpoint that has all its files and all that it builds on. Checksums are
        not verified.
    """
    others = [other for other in steps if other != step]
    if not others:
        return f"There is no other step in {root}."
    # The damaged file may belong to an earlier checkpoint that others build on, too.
    whole = (other for other in sorted(others, reverse=True) if f"{root / step_name(other)}/" not in error)
    last = next((other for other in whole if _is_complete(root, other)), None)
    offer = "none of them has all its files" if last is None else f"the last one with all its files is {last}"
    return f"Other steps in {root}: {others}. Of these, {offer}."


def _is_complete(root: Location, step: int) -> bool:
    try:
        at = StoredCheckpoint(root, step)
        while at.manifest.previous is not None:
            at = at.previous()
    except (CheckpointError, OSError):
        return False
    return True
