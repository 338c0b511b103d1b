"""Operators of EmbeddingBlocks: first values, gather and pool, plain reads and writes of records.

Shapes: N positions (ids of a call), B bags of a feature, D dim. ``Blocks`` names the storage: a table of block
addresses, the binary logarithm of a block's rows, and the bytes of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recis_hybrid.ops._fake import nothing_returned

nothing_returned("blocks_init_fresh", "gather_bags", "blocks_read", "blocks_write")

COMBINERS = {"sum": 0, "mean": 1}


class Blocks(NamedTuple):
    """EmbeddingBlocks as kernels see them."""

    addresses: Tensor
    """int64 ``[blocks]``: the address of each block, on the blocks' device."""
    block_shift: int
    """Binary logarithm of the rows of a block."""
    record_bytes: int
    """Bytes of a record, a multiple of 16."""


@dataclass(frozen=True)
class InitializerArgs:
    """The first values of each feature's member table, as flat lists."""

    kinds: list[int]
    """0 constant, 1 uniform, 2 normal."""
    values: list[float]
    """Two for each feature: (value, 0), (low, high) or (mean, std)."""
    keys: list[int]
    """A signed 64-bit key of (seed, member table's name)."""


@dataclass(frozen=True)
class StateArgs:
    """The optimizer state of a record, as flat lists."""

    offsets: list[int]
    """Bytes from the record's start."""
    widths: list[int]
    """float32 elements."""
    first_values: list[float]


def init_fresh(
    blocks: Blocks, counters: Tensor, fresh: Tensor, ids: Sequence[Tensor], init: InitializerArgs, dim: int,
    state: StateArgs,
) -> None:  # fmt: skip
    """Gives the rows handed out since the last call their first values, and counts them as old.

    Args:
        blocks: Written. Must hold every row that ``counters`` counts.
        counters: int64 ``[2]`` of the IDMap.
        fresh: int64 ``[N]`` as find_or_insert left it.
        ids: For each feature, int64 ``[n_f]``: the same lists as in that call.
        init: First values, by feature.
        dim: D.
        state: First values of the optimizer state.
    """
    torch.ops.recis.blocks_init_fresh(
        *blocks, counters, fresh, ids, init.kinds, init.values, init.keys, dim,
        state.offsets, state.widths, state.first_values,
    )  # fmt: skip


def gather_bags(
    blocks: Blocks, rows: Tensor, ids: Sequence[Tensor], offsets: Sequence[Tensor], combiners: Sequence[int],
    init: InitializerArgs, dim: int, outs: Sequence[Tensor],
) -> None:  # fmt: skip
    """Writes the combined embeddings of each bag.

    Args:
        blocks: Read.
        rows: int64 ``[N]``; -1 stands for an id without a row, which counts with its first value.
        ids: For each feature, int64 ``[n_f]``.
        offsets: For each feature, int64 ``[B + 1]`` into its ids, or an empty tensor: one id a bag.
        combiners: For each feature, a value of ``COMBINERS``.
        init: First values, by feature.
        dim: D.
        outs: For each feature, float32 ``[B, D]``, contiguous; written. An empty bag gives zeros.
    """
    torch.ops.recis.gather_bags(
        *blocks, rows, ids, offsets, combiners, init.kinds, init.values, init.keys, dim, outs
    )  # fmt: skip


def read(blocks: Blocks, rows: Tensor, offset: int, values: Tensor) -> None:
    """Copies one part of the records of ``rows`` (int64 ``[n]``) into ``values`` (float32 ``[n, width]``)."""
    torch.ops.recis.blocks_read(*blocks, rows, offset, values)


def write(blocks: Blocks, rows: Tensor, offset: int, values: Tensor) -> None:
    """Copies ``values`` (float32 ``[n, width]``) into one part of the records of ``rows`` (int64 ``[n]``, distinct)."""
    torch.ops.recis.blocks_write(*blocks, rows, offset, values)
