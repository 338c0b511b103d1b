"""On which ranks a table's rows lie.

Letters: R rows, W ranks, D dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from recis_hybrid.embedding.config import EmbeddingConfig
from recis_hybrid.embedding.initializers import QUAD
from recis_hybrid.embedding.table.record_layout import StateField

Sharding: TypeAlias = Literal["row", "table", "column", "replicated"]

COLLECTIVE_S = 50e-6
"""Seconds that a collective takes beside those for its bytes: a round trip between hosts and the calls."""
BYTES_PER_S = 10e9
"""Bytes a second between two ranks."""
LOOKUP_S = 25e-9
"""Seconds in which a rank looks up an id that it is asked for."""
REPLICA_BYTES = 64 << 20
"""The most that the embeddings of a replicated table may take on each rank."""


def sharding_of(config: EmbeddingConfig, ranks: int, optimizer_state: tuple[StateField, ...] = ()) -> Sharding:
    """Return how a table is sharded: what its config says, or for ``auto`` what takes least time.

    The estimate is of a batch that has every id of the table on every rank, the dearest one, and of the busiest rank.
    With vectors of v bytes, c seconds for a collective, b bytes a second and l seconds for a lookup:

    - ``row``: hashing gives the busiest rank M = R / W + √(2 R / W · ln W) of R rows. It sends
      (W - 1) (8 R / W + 2 v M) bytes, in three collectives, and looks W M ids up.
    - ``column``: every rank sends all ids to all, and exactly its share of vectors and gradients:
      (W - 1) (8 R + 2 v R / W) bytes, in three collectives, and looks W R ids up. So it pays for few and very long
      rows, which hashing deals unevenly.
    - ``replicated``: (W - 1) R (8 + v) bytes, in two collectives, and W R lookups; if ``REPLICA_BYTES`` hold the
      embeddings.

    It never chooses ``table``, which sends as much as ``row``, and less evenly; nor ``column`` where it cannot be:
    ranks would have fewer than 4 elements of a row, or the optimizer keeps one number for a whole row. Tables without
    ``expected_rows`` are spread by row.

    Args:
        config: Of the table.
        ranks: W.
        optimizer_state: What the optimizer keeps for every row.

    References:
        Raab, Steger: "Balls into bins" - a simple and tight analysis. RANDOM 1998: for M.

    Example:
        >>> sharding_of(EmbeddingConfig(dim=8, sharding="auto", expected_rows=100), 4)
        'replicated'
        >>> sharding_of(EmbeddingConfig(dim=8, sharding="auto"), 4)
        'row'
        >>> sharding_of(EmbeddingConfig(dim=4096, sharding="auto", expected_rows=100), 8)
        'column'
    """
    if ranks == 1:
        return "row"
    if config.sharding != "auto":
        return config.sharding
    if config.expected_rows is None:
        return "row"
    rows, vector, others = config.expected_rows, 4 * config.dim, ranks - 1
    most = min(rows, rows / ranks + math.sqrt(2 * rows / ranks * math.log(ranks)))
    seconds: dict[Sharding, float] = {
        "row": _seconds(3, others * (8 * rows / ranks + 2 * vector * most), ranks * most),
    }
    if config.dim >= QUAD * ranks and all(field.width is None for field in optimizer_state):
        seconds["column"] = _seconds(3, others * (8 * rows + 2 * vector * rows / ranks), ranks * rows)
    if rows * vector <= REPLICA_BYTES:
        seconds["replicated"] = _seconds(2, others * rows * (8 + vector), ranks * rows)
    return min(seconds, key=seconds.__getitem__)


def _seconds(collectives: int, sent: float, lookups: float) -> float:
    return collectives * COLLECTIVE_S + sent / BYTES_PER_S + lookups * LOOKUP_S


def deal(loads: Sequence[float], ranks: int) -> list[int]:
    """Return a rank for each load: the heaviest first, to the rank that has least."""
    owners, totals = [0] * len(loads), [0.0] * ranks
    for number in sorted(range(len(loads)), key=lambda k: (-loads[k], k)):
        owners[number] = totals.index(min(totals))
        totals[owners[number]] += loads[number]
    return owners
