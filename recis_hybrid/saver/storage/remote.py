"""Checkpoints in an object store: complete once the manifest, which is written last, exists."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable

from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.location import RemotePath
from recis_hybrid.saver.format.manifest import MANIFEST
from recis_hybrid.saver.storage.lease import LEASE
from recis_hybrid.saver.storage.step_directory import STEP, step_name


class RemoteStorage:
    """Checkpoints in an object store, where nothing can be renamed: the manifest, written last, completes a checkpoint.

    Object stores also have no lock that ends with its holder. A saver writes a mark instead, and checks before each
    manifest that the mark is still its own. A restarted job thus takes over from one that hangs, whose next save fails.
    """

    def __init__(self, root: RemotePath) -> None:
        self.root = root
        self._mark = b""

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, ascending."""
        found = [int(match[1]) for match in map(STEP.fullmatch, self.root.names()) if match]
        return sorted(step for step in found if (self.root / step_name(step) / MANIFEST).is_file())

    def take(self) -> None:
        """Write this saver's mark unless it exists, and remove what a crash left behind."""
        if not self._mark or self._holder() == b"":
            self._mark = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(16)}".encode()
            (self.root / LEASE).write_bytes(self._mark)
        self._refuse_other()
        complete = set(self.steps())
        for match in map(STEP.fullmatch, self.root.names()):
            if match and int(match[1]) not in complete:
                (self.root / match[0]).remove_below()

    def folder(self, step: int) -> RemotePath:
        """Return the folder for the files of a step."""
        return self.root / step_name(step)

    def begin(self, step: int) -> None:
        """Do nothing: a folder exists once it has a file."""

    def commit(self, step: int, manifest: bytes) -> None:
        """Write the manifest.

        Raises:
            CheckpointError: Another saver has taken over.
        """
        self._refuse_other()
        (self.folder(step) / MANIFEST).write_bytes(manifest)

    def finish(self, step: int) -> None:
        """Do nothing: files are durable once written."""

    def abandon(self, step: int) -> None:
        """Remove the files of a checkpoint that will not be completed; if that fails, the next save removes them."""
        folder = self.folder(step)
        try:
            if self._holder() == self._mark:
                (folder / MANIFEST).unlink(missing_ok=True)
                folder.remove_below()
        except OSError:
            return

    def remove(self, step: int) -> Callable[[], None]:
        """Remove a checkpoint by deleting its manifest.

        Returns:
            A function that deletes its other files.
        """
        folder = self.root / step_name(step)
        (folder / MANIFEST).unlink()
        return folder.remove_below

    def _holder(self) -> bytes:
        try:
            return (self.root / LEASE).read_bytes()
        except FileNotFoundError:
            return b""

    def _refuse_other(self) -> None:
        holder = self._holder()
        if holder != self._mark:
            name = holder.decode(errors="replace").rpartition(",")[0]
            raise CheckpointError(
                f"{self.root}: another saver has taken over here ({name}). Save to another place, or end the other job."
            )
