"""Writes and reads the files of one part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from recis_hybrid.checkpointing import JSON, PartState
from recis_hybrid.saver.checkpoint.local_table import LocalTable, local_table
from recis_hybrid.saver.checkpoint.table_files import write_tables
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.file_io import encode_name
from recis_hybrid.saver.format.json_values import checked_object
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import FileEntry, PartEntry, RemovedEntry, TensorSpec
from recis_hybrid.saver.format.tensor_file import check_tensor, read_tensors, write_tensors
from recis_hybrid.saver.runtime.ranks import Ranks


@dataclass(frozen=True)
class CapturedPart:
    """A part on its way to files."""

    kind: str
    """One of ``manifest.KINDS``."""
    state: Callable[[], PartState]
    """Returns the state of this rank; called once, perhaps in another thread."""
    per_rank: bool = False
    """True if each rank writes its own state. Otherwise rank 0 writes all but the tables, which ranks share."""


def write_part(root: Location, ranks: Ranks, name: str, part: CapturedPart) -> dict[str, PartEntry]:
    """Write the files of a part, all ranks together, and force them to the disk.

    Args:
        root: Directory of the checkpoint.
        ranks: This rank and the others.
        name: Name of the part.
        part: The part.

    Returns:
        Entries of the manifest by name: one, or with ``per_rank`` one for each rank, named ``name[rank]``.

    Raises:
        CheckpointError: The state cannot be saved as it is, or cannot be written.
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
    for table, gone in write_tables(root, ranks, name, removed, "removed").items():
        entries[table] = replace(entries[table], removed=RemovedEntry(gone.rows, gone.ranges))
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
    """Write the dense tensors of a part, and return the file's path, size and checksums."""
    relative = f"dense/{encode_name(name)}.safetensors"
    (root / "dense").mkdir(exist_ok=True)
    size, sums = write_tensors(root / relative, tensors, _tag(name))
    return [relative, size, [*sums]]


def read_dense(root: Location, name: str, entry: PartEntry) -> dict[str, Tensor]:
    """Read the dense tensors of a part, and compare their file with its checksums.

    Args:
        root: Directory of the checkpoint.
        name: Name of the part.
        entry: What the manifest says of it.

    Returns:
        By name, in memory of their own.

    Raises:
        CorruptCheckpoint: The file has changed, or does not hold what the manifest says.
    """
    if entry.file is None:
        return {}
    file = entry.file
    return read_tensors(root / file.path, f"part {name!r}", file.size, file.crc32, entry.tensors, _tag(name))


def _tag(name: str) -> dict[str, JSON]:
    return {"part": name}
