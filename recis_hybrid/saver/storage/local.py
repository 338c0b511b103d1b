"""Checkpoints in a directory: written under a temporary name, synced to disk, renamed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.file_io import remove_folder, sync_directory
from recis_hybrid.saver.format.manifest import MANIFEST
from recis_hybrid.saver.storage.lease import Lease
from recis_hybrid.saver.storage.step_directory import STEP, step_name

_LEFTOVER = re.compile(r"\.step_\d{6,18}\.(?:partial|deleted)|\.shared\.[0-9a-f]{32}")


class LocalStorage:
    """A directory of checkpoints, on this machine or shared by several.

    A checkpoint is written under a temporary name, synced to disk, and renamed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lease = Lease(root)

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        names = [entry.name for entry in os.scandir(self.root) if entry.is_dir()]
        found = [int(match[1]) for match in map(STEP.fullmatch, names) if match]
        return sorted(step for step in found if (self.root / step_name(step) / MANIFEST).is_file())

    def take(self) -> None:
        """Create the directory, take its lease, and remove what a crash left behind.

        Raises:
            CheckpointError: Another saver holds the lease.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        sync_directory(self.root.parent)
        self._lease.take()
        for entry in list(os.scandir(self.root)):
            if _LEFTOVER.fullmatch(entry.name):
                remove_folder(Path(entry.path)) if entry.is_dir() else os.unlink(entry.path)

    def folder(self, step: int) -> Path:
        """Return the folder for the files of a step while they are written."""
        return self.root / f".{step_name(step)}.partial"

    def begin(self, step: int) -> None:
        """Create the folder of a step, for :meth:`commit` or :meth:`abandon`."""
        self.folder(step).mkdir()

    def commit(self, step: int, manifest: bytes) -> None:
        """Turn the synced folder into the checkpoint of its step, replacing an existing one."""
        folder = self.folder(step)
        for inner, _, _ in os.walk(folder, topdown=False):
            if inner != str(folder):
                sync_directory(Path(inner))
        with open(folder / MANIFEST, "xb") as file:
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(folder)
        place = self.root / step_name(step)
        if place.exists():
            _exchange(folder, place)
        else:
            folder.rename(place)

    def finish(self, step: int) -> None:
        """Sync the rename to disk, and remove the checkpoint that was replaced."""
        sync_directory(self.root)
        if self.folder(step).exists():
            remove_folder(self.folder(step))

    def abandon(self, step: int) -> None:
        """Remove the folder of a checkpoint that will not be completed."""
        shutil.rmtree(self.folder(step), ignore_errors=True)

    def remove(self, step: int) -> Callable[[], None]:
        """Remove a checkpoint by one rename.

        Returns:
            A function that deletes its files.
        """
        # Rename first: a crash during deletion must not leave a checkpoint that looks complete but is not.
        doomed = self.root / f".{step_name(step)}.deleted"
        (self.root / step_name(step)).rename(doomed)
        return partial(_remove, doomed)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories atomically, so that one of them is always in place.

    File systems that do not support this (some network ones) need two renames. A crash between them leaves both
    directories under names that the next save removes.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(here, os.fsencode(new), here, os.fsencode(old), both) == 0:
        return
    aside = old.with_name(f".{old.name}.deleted")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    shutil.rmtree(aside)


def _remove(folder: Path) -> None:
    try:
        remove_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be removed ({error}). Remove it manually.") from error
