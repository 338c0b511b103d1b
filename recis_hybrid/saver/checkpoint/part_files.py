"""Writes and reads the files of one part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from recis_hybrid.saver.checkpoint.local_table import LocalTable, local_table
from recis_hybrid.saver.checkpoint.table_files import write_tables
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.file_io import Location, encode_name
from recis_hybrid.saver.format.json_values import checked_object
from recis_hybrid.saver.format.manifest import FileEntry, PartEntry, RemovedEntry, TensorSpec
from recis_hybrid.saver.format.tensor_file import check_tensor, read_tensors, write_tensors
from recis_hybrid.saver.parts.protocol import JSON, PartState
from recis_hybrid.saver.runtime.ranks import Ranks


def write_part(root: Location, ranks: Ranks, name: str, kind: str, hand_out: Callable[[], PartState]) -> PartEntry:
    """Write a part's files, all ranks together, and force them to the disk.

    Args:
        root: directory of the checkpoint.
        ranks: this rank and the others.
        name: name of the part.
        kind: one of `manifest.KINDS`.
        hand_out: returns this rank's state; of all but its tables, that of rank 0 is written.

    Returns:
        What the manifest says of the part.

    Raises:
        CheckpointError: the state cannot be saved as it is, or cannot be written.
    """
    where = f"Saver.save: part {name!r}"
    meta: dict[str, JSON] = {}
    specs: dict[str, TensorSpec] = {}
    tables: list[LocalTable] = []
    removed: list[LocalTable] = []

    def write_dense() -> JSON:
        state = hand_out()
        meta.update(checked_object(f"{where}, meta", state.meta))
        for tensor_name, tensor in state.tensors.items():
            check_tensor(where, tensor_name, tensor)
        specs.update({tensor_name: TensorSpec.of(tensor) for tensor_name, tensor in state.tensors.items()})
        for table, rows in state.tables.items():
            tables.append(local_table(f"{where}, table {table!r}", table, rows))
            if rows.removed is not None:
                removed.append(local_table(f"{where}, table {table!r}, removed", table, rows.removed))
        if ranks.rank != 0 or not state.tensors:
            return None
        return [*write_dense_file(root, name, state.tensors)]

    path, size, sums = ranks.together(write_dense)[0] or (None, 0, ())
    file = None if path is None else FileEntry(path, size, tuple(sums))
    entries = write_tables(root, ranks, name, tables)
    for table, gone in write_tables(root, ranks, name, removed, "removed").items():
        entries[table] = replace(entries[table], removed=RemovedEntry(gone.rows, gone.ranges))
    return PartEntry(kind, meta, specs, file, entries)


def write_part_of_each(
    root: Location, ranks: Ranks, name: str, kind: str, hand_out: Callable[[], PartState]
) -> dict[str, PartEntry]:
    """Write a part that is another one on each rank: a part for each of them, named `name[rank]`.

    Args:
        root: directory of the checkpoint.
        ranks: this rank and the others.
        name: name of the part.
        kind: one of `manifest.KINDS`.
        hand_out: returns this rank's state, which has no tables.

    Returns:
        What the manifest says of each, by name.

    Raises:
        CheckpointError: the state cannot be saved as it is, or cannot be written.
    """
    own = f"{name}[{ranks.rank}]"
    where = f"Saver.save: part {own!r}"

    def write() -> JSON:
        state = hand_out()
        if state.tables:
            raise CheckpointError(f"{where}: tables are shared out among ranks. Pass it without PerRank.")
        meta = checked_object(f"{where}, meta", state.meta)
        for tensor_name, tensor in state.tensors.items():
            check_tensor(where, tensor_name, tensor)
        specs: list[JSON] = [[tensor, *_words(TensorSpec.of(values))] for tensor, values in state.tensors.items()]
        return [own, meta, specs, [*write_dense_file(root, own, state.tensors)] if state.tensors else None]

    return {
        each: PartEntry(
            kind,
            meta,
            {tensor: TensorSpec(dtype, tuple(shape)) for tensor, dtype, shape in specs},
            None if file is None else FileEntry(file[0], file[1], tuple(file[2])),
            {},
        )
        for each, meta, specs, file in ranks.together(write)
    }


def _words(spec: TensorSpec) -> tuple[str, list[JSON]]:
    return spec.dtype, [*spec.shape]


def write_dense_file(root: Location, name: str, tensors: dict[str, Tensor]) -> tuple[str, int, list[JSON]]:
    """Write the dense tensors of a part, and force them to the disk.

    Args:
        root: directory of the checkpoint.
        name: name of the part.
        tensors: by name.

    Returns:
        Path relative to the directory, size in bytes, and checksums.
    """
    relative = f"dense/{encode_name(name)}.safetensors"
    (root / "dense").mkdir(exist_ok=True)
    size, sums = write_tensors(root / relative, tensors, _tag(name))
    return relative, size, list(sums)


def read_dense(root: Location, name: str, entry: PartEntry) -> dict[str, Tensor]:
    """Read the dense tensors of a part, and compare their file with its checksums.

    Args:
        root: directory of the checkpoint.
        name: name of the part.
        entry: what the manifest says of it.

    Returns:
        By name, in memory of their own.

    Raises:
        CorruptCheckpoint: the file has changed, or does not hold what the manifest says.
    """
    if entry.file is None:
        return {}
    file = entry.file
    return read_tensors(root / file.path, f"part {name!r}", file.size, file.crc32, entry.tensors, _tag(name))


def _tag(name: str) -> dict[str, JSON]:
    return {"part": name}
