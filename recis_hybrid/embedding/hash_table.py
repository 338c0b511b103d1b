"""HashTable: one logical table, IDMap and EmbeddingBlocks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recis_hybrid import ops
from recis_hybrid.embedding.blocks import EmbeddingBlocks
from recis_hybrid.embedding.id_map import MAX_MEMBERS, IdMap
from recis_hybrid.embedding.initializers import Initializer, table_key
from recis_hybrid.embedding.lookup import FeatureIds, Lookup, Pending, RowGradients
from recis_hybrid.embedding.record_layout import RecordLayout


@dataclass(frozen=True)
class MemberTable:
    """A table as the user named it."""

    name: str
    initializer: Initializer


class Anchor(nn.Parameter):
    """A table's place in autograd and in optimizers; its one element means nothing."""

    table: HashTable

    def __new__(cls, table: HashTable) -> Anchor:
        """Makes the anchor of a table."""
        anchor = super().__new__(cls, torch.zeros(1, device=table.device), requires_grad=True)
        anchor.table = table
        return anchor

    def __deepcopy__(self, memo: dict[int, Any]) -> Anchor:
        raise TypeError("an embedding table cannot be deep-copied; save it with Saver and load it into a new engine")


class RowUpdate(Protocol):
    """An optimizer's step on one table: updates the records that ``gradients`` belong to."""

    def __call__(self, table: HashTable, gradients: RowGradients) -> None:
        """Updates the table."""


class HashTable:
    """A growing, collision-free table of records for one or more member tables.

    Args:
        members: The member tables; their number is their index here.
        layout: How a record lies in memory.
        device: Where IDMap and blocks live.
        seed: Of the rows' first values.
    """

    def __init__(
        self, members: Sequence[MemberTable], layout: RecordLayout, device: torch.device, seed: int = 0
    ) -> None:
        if not 0 < len(members) <= MAX_MEMBERS:
            raise ValueError(f"a hash table holds 1 to {MAX_MEMBERS} member tables, got {len(members)}")
        self.members = tuple(members)
        self.layout = layout
        self.device = device
        self.generation = 0
        """Raised by whatever makes row numbers of earlier lookups meaningless."""
        self.pending = Pending()
        self.reseed(seed)
        self._empty()
        self.anchor = Anchor(self)

    def __len__(self) -> int:
        """Rows in use; waits for the device."""
        return len(self.id_map)

    def reseed(self, seed: int) -> None:
        """Sets the seed of first values, for rows that are not there yet."""
        self.seed = seed
        self._keys = [table_key(seed, member.name) for member in self.members]

    def clear(self) -> None:
        """Removes every row."""
        self._empty()
        self.generation += 1

    def _empty(self) -> None:
        self.id_map = IdMap(self.device)
        self.blocks = EmbeddingBlocks(self.layout, self.device)
        self.pending.clear()

    def lookup(self, features: Sequence[FeatureIds], *, insert: bool) -> Lookup:
        """Finds the rows of all features' ids.

        Args:
            features: The ids, on the table's device.
            insert: Gives ids that have no row one, with its first values; else their row is -1.
        """
        ids = [feature.ids for feature in features]
        members = [feature.member for feature in features]
        if insert:
            rows = self._insert(ids, members)
        else:
            rows = self.id_map.find(ids, members)
        return Lookup(tuple(features), rows, self.id_map.row_bound, self.generation)

    def _insert(self, ids: list[Tensor], members: list[int]) -> Tensor:
        total = sum(part.numel() for part in ids)
        self.id_map.reserve(total)
        self.blocks.reserve(self.id_map.row_bound + total)
        rows, fresh = self.id_map.find_or_insert(ids, members)
        ops.blocks.init_fresh(
            self.blocks.handle, self.id_map.counters, fresh, ids, self._init(members), self.layout.dim, self._state()
        )
        return rows

    def gather(self, lookup: Lookup, outs: Sequence[Tensor]) -> None:
        """Writes each feature's combined embeddings, float32 ``[B, dim]``, into ``outs``."""
        self._check(lookup)
        features = lookup.features
        ops.blocks.gather_bags(
            self.blocks.handle,
            lookup.rows,
            [feature.ids for feature in features],
            [feature.offsets for feature in features],
            [feature.combiner for feature in features],
            self._init([feature.member for feature in features]),
            self.layout.dim,
            outs,
        )

    def apply_gradients(self, lookup: Lookup, gradients: Sequence[Tensor], update: RowUpdate) -> None:
        """Updates the rows of a lookup by the gradients of what it gave, float32 ``[B, dim]`` for each feature."""
        self._check(lookup)
        update(self, RowGradients(self._usable(lookup, gradients), lookup.groups))

    def add_gradients(self, lookup: Lookup, gradients: Sequence[Tensor]) -> None:
        """Keeps the gradients of a lookup until :meth:`apply_pending`."""
        self._check(lookup)
        self.pending.add(lookup, self._usable(lookup, gradients))

    def apply_pending(self, update: RowUpdate) -> bool:
        """Reduces all gradients that backward has left here, once, and updates their rows. False if there are none."""
        if not self.pending.lookups:
            return False
        update(self, RowGradients(self.pending.gradients, Lookup.merged(self.pending.lookups).groups))
        self.pending = Pending()
        return True

    def export(self, member: int) -> dict[str, Tensor]:
        """Returns a member table's ids (int64 ``[n]``, ascending) and every part of their records."""
        ids, rows = self.id_map.ids(member)
        return {"ids": ids, **{part: self.blocks.read(rows, part) for part in self.layout.parts}}

    def insert(self, member: int, ids: Tensor, parts: dict[str, Tensor]) -> None:
        """Gives distinct ids (int64 ``[n]``) rows whose parts are ``parts``, float32 ``[n, width]`` each."""
        if ids.numel() == 0:
            return
        ids = ids.to(self.device).contiguous()
        rows = self._insert([ids], [member])
        for part, values in parts.items():
            self.blocks.write(rows, part, values)

    def _check(self, lookup: Lookup) -> None:
        if lookup.generation != self.generation:
            names = ", ".join(member.name for member in self.members)
            raise RuntimeError(
                f"table {names}: this lookup was made in generation {lookup.generation} and the table is in generation "
                f"{self.generation}: its rows were cleared or moved since; look the batch up again"
            )

    def _init(self, members: Sequence[int]) -> ops.blocks.InitializerArgs:
        chosen = [self.members[member].initializer for member in members]
        return ops.blocks.InitializerArgs(
            [initializer.kind for initializer in chosen],
            [value for initializer in chosen for value in initializer.values],
            [self._keys[member] for member in members],
        )

    def _state(self) -> ops.blocks.StateArgs:
        state = self.layout.state
        return ops.blocks.StateArgs(
            [self.layout.offset(field.name) for field in state],
            [self.layout.width(field.name) for field in state],
            [field.first_value for field in state],
        )

    def _usable(self, lookup: Lookup, gradients: Sequence[Tensor]) -> list[Tensor]:
        # Kernels take any stride between rows (0 for an expanded gradient) but none within one.
        usable = []
        for feature, gradient in zip(lookup.features, gradients, strict=True):
            expected = (feature.bags, self.layout.dim)
            if tuple(gradient.shape) != expected or gradient.dtype != torch.float32:
                name = self.members[feature.member].name
                raise ValueError(
                    f"table {name}: a gradient must be float32 {list(expected)}, "
                    f"got {gradient.dtype} {list(gradient.shape)}"
                )
            usable.append(gradient if expected[1] == 1 or gradient.stride(1) == 1 else gradient.contiguous())
        return usable
