"""A Saveable with a given state, and edits of checkpoints with correct checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from recis_hybrid.saver import PartState, TableState
from recis_hybrid.saver.storage.lease import LEASE

LOWEST, HIGHEST = -(2**63), 2**63 - 1


class Shelf:
    """Returns a given state, and keeps the one that it loads."""

    def __init__(self, state: PartState) -> None:
        self.state = state
        self.loaded: PartState | None = None

    def checkpoint_state(self) -> PartState:
        return self.state

    def load_checkpoint_state(self, state: PartState) -> None:
        self.loaded = state


def example_table() -> TableState:
    """Return five unsorted rows."""
    ids = torch.tensor([HIGHEST, 5, -1, 0, LOWEST])
    embedding = torch.tensor([[4.0, 40.0], [2.0, 20.0], [0.0, -0.0], [1.0, 10.0], [3.0, 30.0]])
    moments = torch.tensor([[0.5], [0.25], [0.0], [0.125], [0.375]], dtype=torch.bfloat16)
    columns = {"ids": ids, "embedding": embedding, "exp_avg": moments}
    return TableState(columns, torch.tensor([65535, 7, 0, 7, 65535]), {"dim": 2, "dtype": "float32"})


def example_shelf() -> Shelf:
    """Return one table, one dense tensor and some JSON."""
    counts = torch.tensor([3, 1], dtype=torch.int32)
    return Shelf(PartState({"user/country": example_table()}, {"counts": counts}, {"seed": 1}))


def empty_shelf() -> Shelf:
    """Return the same structure without rows, as in a new process."""
    full = example_table()
    columns = {name: column[:0] for name, column in full.columns.items()}
    table = TableState(columns, full.buckets[:0], full.meta)
    return Shelf(PartState({"user/country": table}, {"counts": torch.zeros(2, dtype=torch.int32)}))


def sealed(document: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest with a correct CRC-32, made as docs/format.md specifies."""
    rest = {key: value for key, value in document.items() if key != "crc32"}
    body = json.dumps(rest, indent=1).removesuffix("\n}").encode()
    return body + b',\n "crc32": "%08x"\n}\n' % zlib.crc32(body)


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and seal it again."""
    path = directory / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(sealed(document))


def entries(directory: Path) -> list[str]:
    """Return the entries of a run's directory, without the lease and files being deleted."""
    names = [entry.name for entry in directory.iterdir()]
    return sorted(name for name in names if name != LEASE and not name.endswith(".deleted"))
