"""Sharding: how a table's rows are distributed over ranks.

Letters: R rows, W ranks, D dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

from recis_hybrid.embedding.config import EmbeddingConfig
from recis_hybrid.embedding.initializers import QUAD
from recis_hybrid.embedding.table.record_layout import StateField

Sharding: TypeAlias = Literal["row", "table", "column", "replicated"]

COLLECTIVE_S = 50e-6
"""Fixed cost of a collective in seconds: a round trip between hosts, and the calls."""
BYTES_PER_S = 10e9
"""Bandwidth between two ranks, in bytes per second."""
LOOKUP_S = 25e-9
"""Seconds to look up an id for another rank."""
REPLICA_BYTES = 64 << 20
"""Maximum size of the embeddings of a replicated table on each rank, in bytes."""


def sharding_of(config: EmbeddingConfig, ranks: int, optimizer_state: tuple[StateField, ...] = ()) -> Sharding:
    """Return the sharding of a table: from its config, or for ``auto`` the fastest by an estimate.

    The estimate is for the busiest rank in the worst case: every rank's batch contains every id of the table. With
    vectors of v bytes:

    - ``row``: hashing assigns the busiest rank M = R / W + √(2 R / W · ln W) of R rows. It sends
      (W - 1) (8 R / W + 2 v M) bytes in three collectives, and looks up W M ids.
    - ``column``: every rank sends all ids to all ranks, and exactly its share of vectors and gradients:
      (W - 1) (8 R + 2 v R / W) bytes in three collectives, and looks up W R ids. This pays off for a few very long
      rows, which hashing distributes unevenly.
    - ``replicated``: (W - 1) R (8 + v) bytes in two collectives, and W R lookups. Considered only if the embeddings
      fit into ``REPLICA_BYTES``.

    ``table`` is never chosen, because it sends as much as ``row``, but less evenly. ``column`` requires at least 4
    elements of a row on each rank, and an optimizer without per-row state. Tables without ``expected_rows`` are
    sharded by row.

    Args:
        config: Config of the table.
        ranks: W.
        optimizer_state: Optimizer state of every row.

    References:
        Raab, Steger: "Balls into bins" - a simple and tight analysis. RANDOM 1998 (the estimate of M).

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
    if config.dim >= QUAD * ranks and all(field.splits_by_column for field in optimizer_state):
        seconds["column"] = _seconds(3, others * (8 * rows + 2 * vector * rows / ranks), ranks * rows)
    if rows * vector <= REPLICA_BYTES:
        seconds["replicated"] = _seconds(2, others * rows * (8 + vector), ranks * rows)
    return min(seconds, key=seconds.__getitem__)


def _seconds(collectives: int, sent: float, lookups: float) -> float:
    return collectives * COLLECTIVE_S + sent / BYTES_PER_S + lookups * LOOKUP_S


def deal(loads: Sequence[float], ranks: int) -> list[int]:
    """Assign each load to a rank: the heaviest first, to the rank with the smallest total; return the ranks."""
    owners, totals = [0] * len(loads), [0.0] * ranks
    for number in sorted(range(len(loads)), key=lambda k: (-loads[k], k)):
        owners[number] = totals.index(min(totals))
        totals[owners[number]] += loads[number]
    return owners


def columns_of(dim: int, ranks: int) -> list[int]:
    """Return the number of elements of each row that each rank has if rows are split by column.

    First values are drawn four at a time, so each rank has a multiple of four, and the last rank also the remainder.
    """
    quads, remainder = divmod(dim, QUAD)
    bounds = [quads * rank // ranks for rank in range(ranks + 1)]
    widths = [QUAD * (end - begin) for begin, end in pairwise(bounds)]
    widths[-1] += remainder
    return widths
