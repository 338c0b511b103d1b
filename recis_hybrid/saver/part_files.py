"""Writes and reads the files of one part."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recis_hybrid.saver.files import encode_name, seal_file, sync_directory, verify_file
from recis_hybrid.saver.json_values import checked_object
from recis_hybrid.saver.manifest import FileEntry, PartEntry, RemovedEntry, TableEntry, TensorSpec
from recis_hybrid.saver.parse import table_files
from recis_hybrid.saver.protocol import JSON, PartState
from recis_hybrid.saver.table_files import read_table, write_table
from recis_hybrid.saver.tensors import check_tensor, open_tensors, write_tensors


def write_part(root: Path, name: str, kind: str, state: PartState) -> PartEntry:
    """Write a part's files and force them to the disk.

    Args:
        root: directory of the checkpoint.
        name: name of the part.
        kind: one of `manifest.KINDS`.
        state: the state.

    Returns:
        What the manifest says of the part.

    Raises:
        CheckpointError: the state cannot be saved as it is, or cannot be written.
    """
    where = f"Saver.save: part {name!r}"
    meta = checked_object(f"{where}, meta", state.meta)
    for tensor_name, tensor in state.tensors.items():
        check_tensor(where, tensor_name, tensor)
    file = None
    if state.tensors:
        relative = f"dense/{encode_name(name)}.safetensors"
        (root / "dense").mkdir(exist_ok=True)
        write_tensors(root / relative, _unshared(state.tensors), _tag(name))
        file = FileEntry(relative, *seal_file(root / relative))
    tables = {table: write_table(root, name, table, rows) for table, rows in state.tables.items()}
    for table, rows in state.tables.items():
        if rows.removed is not None:
            gone = write_table(root, name, table, rows.removed, "removed")
            tables[table] = replace(tables[table], removed=RemovedEntry(gone.rows, gone.ranges))
    for folder in ("sparse", "removed"):
        if (root / folder / encode_name(name)).is_dir():
            sync_directory(root / folder / encode_name(name))
    specs = {tensor_name: TensorSpec.of(tensor) for tensor_name, tensor in state.tensors.items()}
    return PartEntry(kind, meta, specs, file, tables)


def verify_part(root: Path, name: str, entry: PartEntry) -> None:
    """Compare all files of a part with their checksums.

    Args:
        root: directory of the checkpoint.
        name: name of the part.
        entry: what the manifest says of it.

    Raises:
        CorruptCheckpoint: a file has changed.
    """
    if entry.file is not None:
        verify_file(root / entry.file.path, f"part {name!r}", entry.file.size, entry.file.crc32)
    for table, rows in entry.tables.items():
        verify_table(root, name, table, rows)


def verify_table(root: Path, name: str, table: str, entry: TableEntry) -> None:
    """Compare the files of a table with their checksums.

    Args:
        root: directory of the checkpoint.
        name: name of the part.
        table: name of the table.
        entry: what the manifest says of it.

    Raises:
        CorruptCheckpoint: a file has changed.
    """
    for file in table_files(entry):
        verify_file(root / file.path, f"part {name!r}, table {table!r}", file.size, file.crc32)


def read_part(root: Path, name: str, entry: PartEntry) -> PartState:
    """Read a part whose files have been verified.

    Args:
        root: directory of the checkpoint.
        name: name of the part.
        entry: what the manifest says of it.

    Returns:
        The state, in memory of its own.

    Raises:
        CorruptCheckpoint: a file does not hold what the manifest says.
    """
    tensors: dict[str, Tensor] = {}
    if entry.file is not None:
        with open_tensors(root / entry.file.path, f"part {name!r}") as file:
            file.check(entry.tensors, _tag(name))
            tensors = {tensor: file.read(tensor) for tensor in entry.tensors}
    tables = {table: read_table(root, name, table, rows) for table, rows in entry.tables.items()}
    return PartState(tables, tensors, entry.meta)


def _tag(name: str) -> dict[str, JSON]:
    return {"part": name}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that lie in memory of another one (tied weights), which safetensors refuses to write."""
    seen: set[tuple[torch.device, int]] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.untyped_storage().data_ptr())
        result[name] = tensor.clone() if key in seen else tensor
        seen.add(key)
    return result
