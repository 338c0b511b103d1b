"""RecordLayout: how one row's record lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

_ALIGN = 16


@dataclass(frozen=True)
class StateField:
    """One tensor of optimizer state that every row carries."""

    name: str
    """By torch.optim's name: ``exp_avg``, ``sum``, …"""
    width: int | None = None
    """Elements; None for as many as the embedding has."""
    first_value: float = 0.0
    """What it starts as."""


@dataclass(frozen=True)
class RecordLayout:
    """Embedding first, optimizer state beside it, each part and the whole padded to 16 bytes.

    Example:
        >>> layout = RecordLayout(dim=10, state=(StateField("exp_avg"), StateField("exp_avg_sq")))
        >>> layout.offset("exp_avg"), layout.record_bytes
        (48, 144)
    """

    dim: int
    """Elements of the embedding."""
    state: tuple[StateField, ...] = ()
    """Optimizer state, in order."""
    dtype: torch.dtype = torch.float32
    """Of the embedding."""

    def __post_init__(self) -> None:
        if self.dim <= 0:
            raise ValueError(f"RecordLayout: dim must be positive, got {self.dim}")
        if self.dtype != torch.float32:
            raise ValueError(f"RecordLayout: the dtype must be torch.float32, got {self.dtype}")
        names = [field.name for field in self.state]
        if len(set(names)) != len(names) or "embedding" in names:
            raise ValueError(f"RecordLayout: state names must be distinct and none 'embedding', got {names}")

    def width(self, name: str) -> int:
        """Returns the number of elements of a part: ``"embedding"`` or a state's name."""
        if name == "embedding":
            return self.dim
        field = next((field for field in self.state if field.name == name), None)
        if field is None:
            known = [field.name for field in self.state]
            raise KeyError(f"the record has no optimizer state {name!r}; it has {known}")
        return self.dim if field.width is None else field.width

    def offset(self, name: str) -> int:
        """Returns the byte offset of a part within the record."""
        self.width(name)
        return self._offsets[name]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts, in order."""
        return ("embedding", *(field.name for field in self.state))

    @cached_property
    def record_bytes(self) -> int:
        """The size of a record."""
        return self._offsets[""]

    @cached_property
    def _offsets(self) -> dict[str, int]:
        offsets, at = {}, 0
        for name in self.parts:
            offsets[name] = at
            at += -(-4 * self.width(name) // _ALIGN) * _ALIGN
        offsets[""] = at
        return offsets
