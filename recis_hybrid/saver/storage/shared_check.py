"""A check that all ranks see the same directory; otherwise most of a checkpoint would be lost."""

from __future__ import annotations

import secrets
import socket
import time

from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.runtime.ranks import Ranks

PATIENCE_S = 5.0
"""Seconds to wait for the file of rank 0, which shared file systems may show late."""


def refuse_unshared(root: Location, ranks: Ranks) -> None:
    """Raise on all ranks if one of them does not see the directory of rank 0; collective.

    Args:
        root: The directory, created by rank 0.
        ranks: This rank and the others.

    Raises:
        CheckpointError: The ranks see different directories.
    """
    if ranks.size == 1:
        return

    def mark() -> str | None:
        if ranks.rank != 0:
            return None
        name = f".shared.{secrets.token_hex(16)}"
        (root / name).write_bytes(b"")
        return name

    name = ranks.together(mark)[0]

    def look() -> None:
        until = time.monotonic() + PATIENCE_S
        while not (root / name).exists():
            if time.monotonic() > until:
                raise CheckpointError(
                    f"{root}: all ranks must see the same directory, rank {ranks.rank} on {socket.gethostname()} does "
                    "not find the file of rank 0. Save to a file system that all machines share, or to an object "
                    "store."
                )
            time.sleep(0.05)

    try:
        ranks.together(look)
    finally:
        if ranks.rank == 0:
            (root / name).unlink()
