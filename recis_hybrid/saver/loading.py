"""Loads parts of a checkpoint: everything is found sound and fitting before anything is changed.

Rows of large tables are not held in memory for that. Tables that hold rows are replaced only after all files have been
read once for their checksums; tables without rows take them as they are read and checked, and are emptied again if a
file turns out to be damaged.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recis_hybrid.saver.adapters import Part, SaveablePart
from recis_hybrid.saver.compare import refuse_differences
from recis_hybrid.saver.files import Location
from recis_hybrid.saver.manifest import MANIFEST, PartEntry, TableEntry
from recis_hybrid.saver.part_files import read_dense, read_part
from recis_hybrid.saver.protocol import PartState, RowLoader, TableState
from recis_hybrid.saver.ranks import Ranks
from recis_hybrid.saver.row_files import Reads
from recis_hybrid.saver.table_files import read_pieces


@dataclass
class _Ready:
    """A part that fits, and what is to be loaded into it."""

    name: str
    part: Part
    entry: PartEntry
    state: PartState
    loader: RowLoader | None


def load_parts(
    directory: Location, ranks: Ranks, parts: Mapping[str, tuple[Part, str, PartEntry]], reads: Reads
) -> None:
    """Load parts, all ranks together.

    Args:
        directory: of the checkpoint.
        ranks: this rank and the others.
        parts: by the name under which the user passed it: the adapter, the name in the checkpoint, and its entry.
        reads: counts the bytes that are read.

    Raises:
        CorruptCheckpoint: a file is changed.
        CheckpointMismatch: the checkpoint is one of another model.
    """
    ready: list[_Ready] = []

    def prepare() -> None:
        for part, name, entry in parts.values():
            ready.append(_prepared(directory, ranks, part, name, entry, reads))

    def stream() -> None:
        for each in ready:
            if each.loader is not None:
                _stream(directory, ranks, each, reads)

    ranks.together(prepare)
    try:
        ranks.together(stream)
    except BaseException:
        for each in ready:
            if each.loader is not None:
                each.loader.abandon()
        raise
    for each in ready:
        if each.loader is None:
            each.part.load(each.state)
        else:
            each.loader.end()


def _prepared(directory: Location, ranks: Ranks, part: Part, name: str, entry: PartEntry, reads: Reads) -> _Ready:
    where = f"{directory / MANIFEST}: part {name!r}"
    if entry.file is not None:
        reads.add(entry.file.size)
    tables = {table: _without_rows(rows) for table, rows in entry.tables.items()}
    saved = PartState(tables, read_dense(directory, name, entry), entry.meta)
    loader = part.loader(saved) if isinstance(part, SaveablePart) and entry.tables else None
    if loader is None:
        state = read_part(directory, name, entry, ranks.buckets, reads)
        part.check(where, state)
        return _Ready(name, part, entry, state, None)
    refuse_differences(where, loader.differences)
    if loader.changes and ranks.rank == 0:
        more = f" and {len(loader.changes) - 8} more" if len(loader.changes) > 8 else ""
        warnings.warn(
            f"{where} is loaded into tables of another kind: {'; '.join(loader.changes[:8])}{more}. Values are "
            "converted, and what the checkpoint lacks starts with its first value.",
            stacklevel=4,
        )
    if loader.holds_rows:
        for table, rows in entry.tables.items():
            for _ in read_pieces(directory, name, table, rows, ranks.buckets, reads):
                pass
    return _Ready(name, part, entry, saved, loader)


def _stream(directory: Location, ranks: Ranks, ready: _Ready, reads: Reads) -> None:
    assert ready.loader is not None
    # Buckets differ by chance in how many rows they have.
    share = 1 if ranks.size == 1 else 1.02 / ranks.size
    ready.loader.begin({name: int(table.rows * share) for name, table in ready.entry.tables.items()})
    for name, table in ready.entry.tables.items():
        for rows in read_pieces(directory, ready.name, name, table, ranks.buckets, reads):
            ready.loader.load(name, rows.columns)


def _without_rows(table: TableEntry) -> TableState:
    columns: dict[str, Tensor] = {
        name: torch.empty((0, *spec.shape), dtype=getattr(torch, spec.dtype)) for name, spec in table.columns.items()
    }
    return TableState(columns, torch.empty(0, dtype=torch.int64), table.meta)
