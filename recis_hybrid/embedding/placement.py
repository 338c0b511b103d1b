"""Placement: the devices of a table's IDMap and blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from recis_hybrid.accelerator import accelerator, is_accelerator
from recis_hybrid.validation import check_integer


def device_of(device: torch.device | str, index: int | None = None) -> torch.device:
    """Return a device with its index, as tensors have it; by default, GPUs get the index of the current one."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"a device must be one of torch's, e.g. 'cpu' or 'cuda:0', got {device!r}: {error}") from None
    if device.index is None and is_accelerator(device):
        return accelerator(index)
    return device


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Devices of a table's IDMap and blocks; the engine's outputs are on the engine's device regardless.

    With pinned blocks, a table may be larger than the GPU's memory. With ``cache_bytes``, the records that are looked
    up most often are also in a cache on the GPU; results are bitwise the same.

    With blocks on disk, a table may be larger than the memory: ``cache_bytes`` of memory hold the records that are
    looked up most often, and the others are in a file in the folder ``path``; results are bitwise the same. The file
    has no name and vanishes with the process: only checkpoints survive it. Each rank has a file of its own.

    Example:
        >>> Placement(id_map="cpu", blocks="cpu").blocks
        'cpu'
        >>> large = Placement(id_map="cuda", blocks="pinned", cache_bytes=8 << 30)
        >>> larger = Placement(blocks="disk", path="/local_ssd", cache_bytes=64 << 30)
    """

    id_map: Literal["cpu", "cuda"] = "cpu"
    """Device on which ids are looked up."""
    blocks: Literal["cpu", "cuda", "pinned", "disk"]
    """Memory of the records: host memory, used by the CPU; GPU memory; pinned host memory, used by the GPU; or a
    disk, used by the CPU."""
    cache_bytes: int = 0
    """Memory for records on each rank: with blocks on disk, host memory, which must hold all rows of a batch; with
    pinned blocks, GPU memory for copies, allocated at the first training lookup, 0 for none.

    Training lookups copy the records of their ids, optimizer state included, into the cache, where they replace those
    that are used least often; changed records are written back when they are replaced. Lookups in evaluation mode or in
    tables with ``trainable=False`` never change the GPU cache. Coalesced tables share one.
    ``HashTable.cache_statistics`` and the log of a Trainer have the hit rate."""
    path: str | os.PathLike[str] | None = None
    """Existing folder of the file of records on disk, on a local SSD; several ranks may share the folder."""

    def __post_init__(self) -> None:
        if self.id_map not in ("cpu", "cuda"):
            raise ValueError(f"Placement: id_map must be 'cpu' or 'cuda', got {self.id_map!r}")
        if self.blocks not in ("cpu", "cuda", "pinned", "disk"):
            raise ValueError(f"Placement: blocks must be 'cpu', 'cuda', 'pinned' or 'disk', got {self.blocks!r}")
        check_integer("Placement", "cache_bytes", self.cache_bytes, low=0)
        if self.cache_bytes and self.blocks not in ("pinned", "disk"):
            raise ValueError(
                f"Placement: cache_bytes={self.cache_bytes} needs blocks='pinned', got blocks={self.blocks!r}; "
                f"use blocks='pinned' or 'disk', or cache_bytes=0"
            )
        if self.path is not None:
            object.__setattr__(self, "path", self._checked_path(self.path))
        if self.blocks == "disk":
            self._check_disk()

    def _checked_path(self, path: object) -> str:
        if not isinstance(path, str | os.PathLike) or not isinstance(found := os.fspath(path), str):
            raise TypeError(f"Placement: path must be a str or a Path, got {path!r}")
        if not found:
            raise ValueError("Placement: path must be an existing folder, got ''; for the current one, use '.'")
        if self.blocks != "disk":
            raise ValueError(
                f"Placement: path={found!r} needs blocks='disk', got blocks={self.blocks!r}; leave out path, or use "
                f"blocks='disk'"
            )
        return found

    def _check_disk(self) -> None:
        if self.id_map != "cpu":
            raise ValueError(f"Placement: blocks='disk' needs id_map='cpu', got id_map={self.id_map!r}")
        if self.path is None:
            raise ValueError("Placement: blocks='disk' needs path=, the folder of the file of records, got None")
        if not self.cache_bytes:
            raise ValueError(
                "Placement: blocks='disk' needs cache_bytes=, the memory for records that are in use, got 0"
            )

    @staticmethod
    def on(device: torch.device) -> Placement:
        """Return a placement of IDMap and blocks on the same device."""
        if is_accelerator(device):
            return Placement(id_map="cuda", blocks="cuda")
        return Placement(id_map="cpu", blocks="cpu")

    def map_device(self, index: int | None = None) -> torch.device:
        """Return the device of the IDMap; ``index`` is that of the GPU, by default of the current one."""
        return accelerator(index) if self.id_map == "cuda" else torch.device("cpu")

    def blocks_device(self, index: int | None = None) -> torch.device:
        """Return the device whose kernels work on the blocks."""
        return torch.device("cpu") if self.blocks in ("cpu", "disk") else accelerator(index)


def output_device(device: torch.device | str) -> torch.device:
    """Return a device that the engine supports.

    Raises:
        ValueError: If it is another.
    """
    found = device_of(device)
    if found.type != "cpu" and not is_accelerator(found):
        raise ValueError(f"EmbeddingEngine: device must be 'cpu' or 'cuda', got {str(found)!r}")
    return found
