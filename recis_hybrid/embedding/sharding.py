"""On which ranks a table's rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from recis_hybrid.embedding.config import EmbeddingConfig

Sharding: TypeAlias = Literal["row", "table", "replicated"]

COLLECTIVE_S = 50e-6
"""Seconds that a collective takes beside those for its bytes: a round trip between hosts and the calls."""
BYTES_PER_S = 10e9
"""Bytes a second between two ranks."""
REPLICA_BYTES = 64 << 20
"""The most that the embeddings of a replicated table may take on each rank."""


def sharding_of(config: EmbeddingConfig, ranks: int) -> Sharding:
    """Returns how a table is sharded: what its config says, or for ``auto`` what takes less time on the wire.

    The estimate is of a batch that has every id of the table on every rank, the dearest one. Of W ranks each sends
    ``(W - 1) / W`` of R rows' ids, embeddings and gradients, in three collectives, where rows are spread; and ids and
    gradients to ``W - 1`` others, in two, where they are replicated. So tables of few rows are replicated, if
    ``REPLICA_BYTES`` hold their embeddings; all others, and those without ``expected_rows``, are spread by row. It
    never chooses ``table``, which sends as much as ``row``, and not evenly.

    Args:
        config: Of the table.
        ranks: W.

    Example:
        >>> sharding_of(EmbeddingConfig(dim=8, sharding="auto", expected_rows=100), 4)
        'replicated'
        >>> sharding_of(EmbeddingConfig(dim=8, sharding="auto"), 4)
        'row'
    """
    if config.sharding != "auto":
        return config.sharding
    rows, vector = config.expected_rows, 4 * config.dim
    if rows is None or rows * vector > REPLICA_BYTES:
        return "row"
    spread = 3 * COLLECTIVE_S + rows * (ranks - 1) / ranks * (8 + 2 * vector) / BYTES_PER_S
    replicated = 2 * COLLECTIVE_S + rows * (ranks - 1) * (8 + vector) / BYTES_PER_S
    return "replicated" if replicated < spread else "row"


def deal(loads: Sequence[float], ranks: int) -> list[int]:
    """Returns a rank for each load: the heaviest first, to the rank that has least."""
    owners, totals = [0] * len(loads), [0.0] * ranks
    for number in sorted(range(len(loads)), key=lambda k: (-loads[k], k)):
        owners[number] = totals.index(min(totals))
        totals[owners[number]] += loads[number]
    return owners
