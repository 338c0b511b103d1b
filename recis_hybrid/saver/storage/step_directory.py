"""The directory of one checkpoint: its name and its files."""

from __future__ import annotations

import re

from recis_hybrid.saver.errors import OTHER_STEP, CorruptCheckpoint
from recis_hybrid.saver.format.file_io import file_size, list_files
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.format.manifest import MANIFEST, Manifest
from recis_hybrid.saver.format.manifest_reader import parse_manifest, part_files

STEP = re.compile(r"step_(\d{6,18})")
"""Name of a checkpoint's directory."""


_MOST_BYTES = 2**30
"""Limit for a manifest; thousands of tables of a thousand files each need less."""


def step_name(step: int) -> str:
    """Return the name of the directory of a step."""
    return f"step_{step:06d}"


def read_manifest(directory: Location, step: int, *, listed: bool = True) -> Manifest:
    """Read a manifest and compare it with the files of its directory.

    Args:
        directory: Directory of the checkpoint.
        step: Step of the checkpoint.
        listed: Whether to list the files; one rank does so for all.

    Returns:
        The manifest.

    Raises:
        CorruptCheckpoint: The manifest is damaged or of another step, or a file is missing, unknown or of another size.
        CheckpointError: Its format version is not supported.
    """
    path = directory / MANIFEST
    if (length := file_size(path)) > _MOST_BYTES:
        raise CorruptCheckpoint(f"{path}: must have at most {_MOST_BYTES} bytes, has {length}. {OTHER_STEP}")
    manifest = parse_manifest(path.read_bytes(), path)
    if manifest.step != step:
        raise CorruptCheckpoint(
            f"{path}: a directory must be named after its step, {directory.name} has step {manifest.step}. Rename it "
            f"to {step_name(manifest.step)}, or load another step."
        )
    if not listed:
        return manifest
    found = list_files(directory)
    del found[MANIFEST]
    for name, part in manifest.parts.items():
        for file in part_files(part):
            size = found.pop(file.path, None)
            if size is None:
                raise CorruptCheckpoint(f"{directory / file.path} (part {name!r}): the file is missing. {OTHER_STEP}")
            if size != file.size:
                raise CorruptCheckpoint(
                    f"{directory / file.path} (part {name!r}): must have {file.size} bytes, as the manifest "
                    f"says, has {size}. {OTHER_STEP}"
                )
    if found:
        raise CorruptCheckpoint(
            f"{directory}: must hold only what its manifest names, but also holds {sorted(found)}. Remove these files "
            "if they are not the checkpoint's, or load another step."
        )
    return manifest
