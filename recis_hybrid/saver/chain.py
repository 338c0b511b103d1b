"""A checkpoint on disk with those it builds on: an incremental one has only what changed since the one before."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from recis_hybrid.saver.directory import read_manifest, step_name
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.manifest import MANIFEST, Link, Manifest, PartEntry, TableEntry
from recis_hybrid.saver.merge import merged
from recis_hybrid.saver.part_files import read_part, verify_part, verify_table
from recis_hybrid.saver.protocol import PartState, TableState
from recis_hybrid.saver.table_files import read_table


class Checkpoint:
    """One checkpoint, whose manifest has been read and held against the folder.

    Args:
        root: the directory in which it and those it builds on lie.
        step: its step.

    Raises:
        CorruptCheckpoint: the manifest is damaged, or a file is missing, unknown or of another size.
        CheckpointError: it is not there, or has another format version.
    """

    def __init__(self, root: Path, step: int) -> None:
        self.root = root
        self.directory = root / step_name(step)
        self.manifest: Manifest = read_manifest(self.directory, step)
        self._previous: Checkpoint | None = None

    def previous(self) -> "Checkpoint":
        """The checkpoint that this one builds on.

        Returns:
            It, of an incremental checkpoint.

        Raises:
            CorruptCheckpoint: it is missing, damaged, or another than when this one was written.
        """
        link = self.manifest.previous
        assert link is not None
        if self._previous is None:
            path = self.root / step_name(link.step) / MANIFEST
            where = f"{self.directory}: holds what changed since step {link.step}, which"
            if not path.is_file():
                raise CorruptCheckpoint(f"{where} is missing in {self.root}. Put it back, or load another step.")
            found = link_to(self.root, link.step)
            if found != link:
                raise CorruptCheckpoint(
                    f"{where} has changed: the SHA-256 of {path} must be {link.sha256}, is {found.sha256}. {OTHER_STEP}"
                )
            self._previous = Checkpoint(self.root, link.step)
        return self._previous

    def verify(self, name: str, tables: Collection[str] | None = None) -> None:
        """Compare all files that a part needs with their checksums, those of earlier checkpoints among them.

        Args:
            name: name of the part.
            tables: the tables to look at; None for all.

        Raises:
            CorruptCheckpoint: a file has changed, or an earlier checkpoint is missing or another one.
        """
        entry = self._entry(name, tables)
        verify_part(self.directory, name, entry)
        for table in entry.tables:
            for checkpoint, rows in self._below(name, table):
                verify_table(checkpoint.directory, name, table, rows)

    def read(self, name: str, tables: Collection[str] | None = None) -> PartState:
        """Read a part whose files have been verified.

        Args:
            name: name of the part.
            tables: the tables to read; None for all.

        Returns:
            The state, tables whole, in memory of its own.

        Raises:
            CorruptCheckpoint: a file does not hold what the manifest says, or an earlier checkpoint is missing.
        """
        entry = self._entry(name, tables)
        state = read_part(self.directory, name, entry)
        whole: dict[str, TableState] = {}
        for table, rows in state.tables.items():
            layers = [_layer(self.directory, name, table, entry.tables[table], rows)]
            for checkpoint, below in self._below(name, table):
                layers.insert(0, _layer(checkpoint.directory, name, table, below))
            whole[table] = merged(layers)
        return replace(state, tables=whole)

    def _entry(self, name: str, tables: Collection[str] | None) -> PartEntry:
        entry = self.manifest.parts[name]
        if tables is None:
            return entry
        return replace(entry, tables={table: rows for table, rows in entry.tables.items() if table in tables})

    def _below(self, name: str, table: str) -> Iterator[tuple["Checkpoint", TableEntry]]:
        """The earlier states of a table that are needed, newest first."""
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


def _layer(root: Path, name: str, table: str, entry: TableEntry, rows: TableState | None = None) -> TableState:
    """The rows of one checkpoint, with what it says of ids that went."""
    rows = read_table(root, name, table, entry) if rows is None else rows
    if entry.removed is None:
        return rows
    return replace(rows, removed=read_table(root, name, table, entry.removed.as_table()))


def link_to(root: Path, step: int) -> Link:
    """Return what an incremental checkpoint says of the one it builds on.

    Args:
        root: the directory of both.
        step: of the earlier one.

    Returns:
        Its step, and the SHA-256 of its manifest.

    Raises:
        OSError: it cannot be read.
    """
    return Link(step, hashlib.sha256((root / step_name(step) / MANIFEST).read_bytes()).hexdigest())


def needed_steps(root: Path, steps: list[int]) -> set[int]:
    """Find the checkpoints that others build on.

    Args:
        root: the directory.
        steps: the checkpoints that are to be loadable.

    Returns:
        All steps that they need, themselves among them.

    Raises:
        CheckpointError: a manifest cannot be read, so that it is not known what it needs.
    """
    needed: set[int] = set()
    for step in steps:
        at: int | None = step
        while at is not None and at not in needed and (root / step_name(at) / MANIFEST).is_file():
            needed.add(at)
            link = read_manifest(root / step_name(at), at).previous
            at = None if link is None else link.step
    return needed


def last_complete(root: Path, steps: list[int]) -> int | None:
    """Find the newest checkpoint that has all its files and all that it builds on; checksums are not looked at.

    Args:
        root: the directory.
        steps: where to look.

    Returns:
        Its step, or None.
    """
    for step in sorted(steps, reverse=True):
        try:
            at = Checkpoint(root, step)
            while at.manifest.previous is not None:
                at = at.previous()
        except (CheckpointError, OSError):
            continue
        return step
    return None
