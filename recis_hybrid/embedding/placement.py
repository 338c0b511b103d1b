"""Placement: the devices on which a table's IDMap and its blocks live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


def device_of(device: torch.device | str, index: int | None = None) -> torch.device:
    """Return the device with its number, which tensors carry: the current one where ``index`` is None."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"a device must be one of torch's, as 'cpu' or 'cuda:0', got {device!r}: {error}") from None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)
    return device


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Devices of a table's IDMap and blocks; the engine's outputs are on the engine's device regardless.

    Example:
        >>> Placement(id_map="cpu", blocks="cpu").blocks
        'cpu'
    """

    id_map: Literal["cpu", "cuda"]
    """Device on which ids are looked up."""
    blocks: Literal["cpu", "cuda", "pinned"]
    """Memory of the records: host memory, processed by the CPU; GPU memory; or pinned host memory, read and written by
    the GPU."""

    def __post_init__(self) -> None:
        if self.id_map not in ("cpu", "cuda"):
            raise ValueError(f"Placement: id_map must be 'cpu' or 'cuda', got {self.id_map!r}")
        if self.blocks not in ("cpu", "cuda", "pinned"):
            raise ValueError(f"Placement: blocks must be 'cpu', 'cuda' or 'pinned', got {self.blocks!r}")

    @staticmethod
    def on(device: torch.device) -> Placement:
        """Return the placement of both halves on one device."""
        if device.type == "cuda":
            return Placement(id_map="cuda", blocks="cuda")
        return Placement(id_map="cpu", blocks="cpu")

    def map_device(self, index: int | None = None) -> torch.device:
        """Return the IDMap's device; ``index`` is the GPU's number, by default the current one."""
        return device_of(self.id_map, index)

    def blocks_device(self, index: int | None = None) -> torch.device:
        """Return the device whose kernels work on the blocks."""
        return device_of("cuda" if self.blocks == "pinned" else self.blocks, index)
