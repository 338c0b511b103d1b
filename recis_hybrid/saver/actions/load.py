"""Loads parts of a checkpoint; everything is verified before anything is changed.

Verification does not hold the rows of large tables in memory. Tables that hold rows are replaced only after all files
have been read once to verify their checksums. Empty tables are filled while files are read and verified, and cleared
again if a file turns out to be damaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from recis_hybrid.checkpointing import BUCKETS, JSON, PartState, StateLoader, TableState
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.errors import OTHER_STEP, CorruptCheckpoint
from recis_hybrid.saver.format.manifest import MANIFEST, PartEntry, TableEntry
from recis_hybrid.saver.format.row_file import Reads, Rows
from recis_hybrid.saver.parts.compare import refuse_differences
from recis_hybrid.saver.parts.part import Part, SaveablePart
from recis_hybrid.saver.runtime.ranks import Ranks


@dataclass(frozen=True)
class PartToLoad:
    """A live object and the saved part to load into it."""

    part: Part
    name: str
    """Name in the checkpoint."""
    entry: PartEntry


@dataclass
class _Ready:
    """A part that passed the checks, and the state to load into it."""

    name: str
    part: Part
    entry: PartEntry
    state: PartState
    loader: StateLoader | None


def load_parts(checkpoint: StoredCheckpoint, ranks: Ranks, parts: Mapping[str, PartToLoad], reads: Reads) -> set[str]:
    """Load parts; collective.

    Args:
        checkpoint: Checkpoint to load from.
        ranks: This rank and the others.
        parts: Parts to load, by the name that the user passed.
        reads: Counts the bytes that are read.

    Returns:
        Names, as the user passed them, of parts that now differ from the checkpoint, so that later changes to them
        cannot be saved as a delta.

    Raises:
        CorruptCheckpoint: A file has changed.
        CheckpointMismatch: The checkpoint belongs to another model.
    """
    ready: list[_Ready] = []

    def prepare() -> list[JSON]:
        for each in parts.values():
            ready.append(_prepare(checkpoint, ranks, each, reads))
        return [each.name for each in ready if each.loader is not None and each.loader.holds_rows]

    # If one rank has rows to lose, all ranks verify their files before any rank replaces rows.
    holding = {name for answer in ranks.together(prepare) for name in answer}

    def verify() -> None:
        for each in ready:
            if each.loader is not None and each.name in holding:
                for table, rows in _pieces(checkpoint, ranks, each, reads):
                    _attempt(checkpoint, each, partial(each.loader.check, table, rows.columns))

    def stream() -> None:
        for each in ready:
            if each.loader is not None:
                each.loader.begin(_expected_rows(checkpoint, ranks, each))
                for table, rows in _pieces(checkpoint, ranks, each, reads):
                    _attempt(checkpoint, each, partial(each.loader.load, table, rows.columns))

    if holding:
        ranks.together(verify)
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
    loaders = zip(parts, (each.loader for each in ready), strict=True)
    return {name for name, loader in loaders if loader is not None and loader.changes}


def _prepare(checkpoint: StoredCheckpoint, ranks: Ranks, chosen: PartToLoad, reads: Reads) -> _Ready:
    part, name, entry = chosen.part, chosen.name, chosen.entry
    where = f"{checkpoint.directory / MANIFEST}: part {name!r}"
    if entry.file is not None:
        reads.add(entry.file.size)
    if not isinstance(part, SaveablePart) or not part.streams:
        state = checkpoint.read(name, wanted=partial(_wanted_buckets, part, ranks), reads=reads)
        part.check(where, state)
        return _Ready(name, part, entry, state, None)
    tables = {table: _without_rows(rows) for table, rows in entry.tables.items()}
    saved = PartState(tables, checkpoint.dense(name), entry.meta)
    try:
        loader = part.loader(saved)
    except ValueError as error:
        raise CorruptCheckpoint(f"{where}: {error}. {OTHER_STEP}") from error
    refuse_differences(where, loader.differences)
    if loader.changes and ranks.rank == 0:
        more = f" and {len(loader.changes) - 8} more" if len(loader.changes) > 8 else ""
        warnings.warn(
            f"{where} is loaded into tables of another kind: {'; '.join(loader.changes[:8])}{more}. Values are "
            "converted, and what the checkpoint lacks starts with its first value.",
            stacklevel=5,
        )
    return _Ready(name, part, entry, saved, loader)


def _pieces(checkpoint: StoredCheckpoint, ranks: Ranks, ready: _Ready, reads: Reads) -> Iterator[tuple[str, Rows]]:
    """Yield this rank's share of the tables of a part, in pieces."""
    for table in ready.entry.tables:
        for rows in checkpoint.pieces(ready.name, table, _wanted_buckets(ready.part, ranks, table), reads):
            yield table, rows


def _wanted_buckets(part: Part, ranks: Ranks, table: str) -> tuple[int, int]:
    return part.buckets(table, ranks) if isinstance(part, SaveablePart) else ranks.buckets


def _expected_rows(checkpoint: StoredCheckpoint, ranks: Ranks, ready: _Ready) -> dict[str, int]:
    """Estimate the number of rows that this rank loads, by table."""
    rows: dict[str, int] = {}
    for table in ready.entry.tables:
        first, stop = _wanted_buckets(ready.part, ranks, table)
        # 2 % of slack, because the number of rows varies between buckets.
        share = min(1.02 * (stop - first) / BUCKETS, 1)
        rows[table] = int(checkpoint.rows(ready.name, table) * share)
    return rows


def _attempt(checkpoint: StoredCheckpoint, ready: _Ready, work: Callable[[], None]) -> None:
    """Check or load rows; raise a ValueError of the loader as CorruptCheckpoint."""
    try:
        work()
    except ValueError as error:
        raise CorruptCheckpoint(f"{checkpoint.directory}: part {ready.name!r}: {error}. {OTHER_STEP}") from error


def _without_rows(table: TableEntry) -> TableState:
    columns: dict[str, Tensor] = {
        name: torch.empty((0, *spec.shape), dtype=getattr(torch, spec.dtype)) for name, spec in table.columns.items()
    }
    return TableState(columns, torch.empty(0, dtype=torch.int64), table.meta)
