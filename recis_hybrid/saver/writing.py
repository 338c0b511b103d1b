"""Writes a whole checkpoint folder: under a temporary name, forced to the disk, and then put into its place."""

import datetime
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from recis_hybrid.saver.directory import step_name
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.files import sync_directory
from recis_hybrid.saver.manifest import MANIFEST, Link, Manifest, PartEntry, dump_manifest
from recis_hybrid.saver.part_files import write_part
from recis_hybrid.saver.protocol import JSON, PartState


def partial_of(root: Path, step: int) -> Path:
    """The temporary name of a checkpoint.

    Args:
        root: the directory of checkpoints.
        step: its step.

    Returns:
        A folder beside its later place.
    """
    return root / f".{step_name(step)}.partial"


def write_checkpoint(
    root: Path,
    step: int,
    parts: Iterable[tuple[str, str, PartState]],
    place: Callable[[Path], object],
    link: Link | None = None,
) -> None:
    """Write a checkpoint; if that fails, nothing of it is left.

    Args:
        root: the directory that takes it, leased by the caller.
        step: its step.
        parts: name, kind and state of each part.
        place: moves the written folder to where the checkpoint is to be; the move is forced to the disk after it.
        link: what the checkpoint builds on.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = partial_of(root, step)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        entries: dict[str, PartEntry] = {name: write_part(partial, name, kind, state) for name, kind, state in parts}
        _write_manifest(partial, Manifest(step, 1, entries, _about(), link))
        place(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{partial}: could not be written ({error}). Make room, or save elsewhere."
            ) from error
        raise
    sync_directory(root)


def _write_manifest(partial: Path, manifest: Manifest) -> None:
    for folder in ("dense", "sparse", "removed"):
        if (partial / folder).is_dir():
            sync_directory(partial / folder)
    with open(partial / MANIFEST, "xb") as file:
        file.write(dump_manifest(manifest))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(partial)


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
