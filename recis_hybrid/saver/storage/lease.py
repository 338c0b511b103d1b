"""Leases: one saver at a time may save in a directory."""

from __future__ import annotations

import fcntl
import os
import socket
import weakref
from pathlib import Path

from recis_hybrid.saver.errors import CheckpointError

LEASE = ".lease"


class Lease:
    """The right to save in a directory, held as long as this object lives.

    It is an operating system's lock on a file. The lock ends with the process that holds it, however that process ends,
    so nothing has to be removed manually.

    Args:
        root: The directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._held = False

    def take(self) -> None:
        """Take the lease, unless this object already holds it.

        Raises:
            CheckpointError: Another saver holds it.
            OSError: The file cannot be created.
        """
        if self._held:
            return
        file = os.open(self._root / LEASE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 256).decode(errors="replace") or "an unknown process"
            os.close(file)
            raise CheckpointError(
                f"{self._root}: another saver saves here ({holder}). Save to another directory, or end the other job."
            ) from error
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        weakref.finalize(self, os.close, file)
        self._held = True
