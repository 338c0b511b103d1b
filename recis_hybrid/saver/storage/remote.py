"""Checkpoints in an object store: complete once the manifest is there, which is written last."""

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
    """An object store, where nothing is renamed: a step is complete once its manifest is there, which is written last.

    There is no lock that would end with its holder either. Whoever saves leaves its mark, and looks whether it is still
    there before it writes a manifest: a job that is started anew takes over from one that hangs, and that one fails.
    """

    def __init__(self, root: RemotePath) -> None:
        self.root = root
        self._mark = b""

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, ascending."""
        found = [int(match[1]) for match in map(STEP.fullmatch, self.root.names()) if match]
        return sorted(step for step in found if (self.root / step_name(step) / MANIFEST).is_file())

    def take(self) -> None:
        """Leave this saver's mark, unless it is there, and remove what a crash has left."""
        if not self._mark or self._holder() == b"":
            self._mark = f"process {os.getpid()} on {socket.gethostname()}, {secrets.token_hex(16)}".encode()
            (self.root / LEASE).write_bytes(self._mark)
        self._refuse_other()
        complete = set(self.steps())
        for match in map(STEP.fullmatch, self.root.names()):
            if match and int(match[1]) not in complete:
                (self.root / match[0]).remove_below()

    def folder(self, step: int) -> RemotePath:
        """Where the files of a step are to be written."""
        return self.root / step_name(step)

    def begin(self, step: int) -> None:
        """Nothing: a folder is there once something is in it."""

    def commit(self, step: int, manifest: bytes) -> None:
        """Write the manifest.

        Raises:
            CheckpointError: another saver has taken over.
        """
        self._refuse_other()
        (self.folder(step) / MANIFEST).write_bytes(manifest)

    def finish(self, step: int) -> None:
        """Nothing: what is written is there."""

    def abandon(self, step: int) -> None:
        """Remove files that are not to become a checkpoint, as far as that can be done now; else the next save does."""
        folder = self.folder(step)
        try:
            if self._holder() == self._mark:
                (folder / MANIFEST).unlink(missing_ok=True)
                folder.remove_below()
        except OSError:
            return

    def remove(self, step: int) -> Callable[[], None]:
        """Take a checkpoint away: its manifest at once.

        Returns:
            Removes its other files.
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
