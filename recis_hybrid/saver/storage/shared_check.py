"""Whether all ranks see the same directory: one that is each machine's own would lose most of a checkpoint."""

from __future__ import annotations

import secrets
import socket
import time

from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.runtime.ranks import Ranks

PATIENCE_S = 5.0
"""How long a rank looks for what rank 0 has written: file systems of several machines may show it late."""


def refuse_unshared(root: Location, ranks: Ranks) -> None:
    """Raise on all ranks if one of them does not see the directory that rank 0 sees.

    Args:
        root: the directory, which rank 0 has made.
        ranks: this rank and the others.

    Raises:
        CheckpointError: it is not the same directory everywhere.
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
                    "not find what rank 0 wrote there. Save to a file system that all machines share, or to an object "
                    "store."
                )
            time.sleep(0.05)

    try:
        ranks.together(look)
    finally:
        if ranks.rank == 0:
            (root / name).unlink()
