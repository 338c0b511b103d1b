"""Plans the files of tables, and the rank that writes each; all ranks compute the same plan.

The boundaries of files depend only on the whole table, so that equal tables give equal bytes on any number of ranks,
however their rows are distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from recis_hybrid.checkpointing import BUCKETS, JSON
from recis_hybrid.saver.checkpoint.local_table import LocalTable
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.runtime.ranks import Ranks

RANGE_BYTES = 64 * 2**20
MOST_RANGES = 1024


def range_count(rows: int, row_bytes: int) -> int:
    """Return the number of files of a table, which depends on the table only, not on the world size.

    It is the smallest power of two with at most 64 MiB of columns per file on average, but at most 1024.

    Args:
        rows: Rows of the whole table.
        row_bytes: Bytes of one row in all columns.

    Returns:
        A power of two; each file has 65536 / that many buckets.

    Example:
        >>> range_count(1000, 776), range_count(5_000_000, 776)
        (1, 64)
    """
    count = 1
    while count < MOST_RANGES and rows * row_bytes > count * RANGE_BYTES:
        count *= 2
    return count


@dataclass(frozen=True)
class PlannedFile:
    """A file in the plan."""

    number: int
    table: int
    range: int
    first_bucket: int
    last_bucket: int
    rows: tuple[int, ...]
    """Number of rows by rank."""
    present: tuple[int, ...]
    """Number of buckets with rows by rank; no bucket has rows of two ranks."""
    writer: int


@dataclass(frozen=True)
class _TableOfRank:
    """A table as one rank describes it to the others."""

    name: str
    rows: int
    buckets: tuple[int, int] | None
    """First and last bucket with rows; None without rows."""
    meta: JSON
    columns: JSON


def plan_files(ranks: Ranks, part: str, tables: Sequence[LocalTable]) -> list[PlannedFile]:
    """Plan the files of some tables; collective.

    Args:
        ranks: This rank and the others.
        part: Name of the part.
        tables: This rank's rows of each table.

    Returns:
        The files, table by table, in the order of buckets.

    Raises:
        CheckpointError: The ranks hold different tables, or rows of the same buckets.
    """
    about: list[JSON] = [
        [
            table.name,
            table.ids.numel(),
            table.present[[0, -1]].tolist() if table.ids.numel() else None,
            table.meta,
            [[name, str(spec)] for name, spec in table.specs.items()],
        ]
        for table in tables
    ]
    answers = [[_TableOfRank(*table) for table in answer] for answer in ranks.exchange(about)]
    _refuse_unlike(part, answers)
    totals = [sum(answer[number].rows for answer in answers) for number in range(len(tables))]
    counts = [range_count(total, table.row_bytes) for total, table in zip(totals, tables, strict=True)]
    mine: list[JSON] = []
    for table, count in zip(tables, counts, strict=True):
        rows, present = table.cuts(count)
        mine.append(
            [[i, rows[i + 1] - rows[i], present[i + 1] - present[i]] for i in range(count) if rows[i + 1] > rows[i]]
        )
    shares = ranks.exchange(mine)
    plan: list[PlannedFile] = []
    for number, count in enumerate(counts):
        of_ranks = [{i: (rows, present) for i, rows, present in share[number]} for share in shares]
        for i in range(count):
            first, last = i * BUCKETS // count, (i + 1) * BUCKETS // count - 1
            rows_of, present_of = zip(*(of_rank.get(i, (0, 0)) for of_rank in of_ranks), strict=True)
            # Round-robin over the ranks with rows, or over all, so that rank 0 does not write all small tables.
            writers = [rank for rank, rows in enumerate(rows_of) if rows] or list(range(ranks.size))
            writer = writers[len(plan) % len(writers)]
            plan.append(PlannedFile(len(plan), number, i, first, last, rows_of, present_of, writer))
    return plan


def _refuse_unlike(part: str, answers: Sequence[Sequence[_TableOfRank]]) -> None:
    """Raise if tables differ between ranks, or a rank has rows of buckets before those of an earlier rank."""
    first = answers[0]
    for rank, answer in enumerate(answers):
        if [(t.name, t.meta, t.columns) for t in answer] != [(t.name, t.meta, t.columns) for t in first]:
            raise CheckpointError(
                f"Saver.save: part {part!r}: all ranks must hold the same tables with the same columns and meta, rank "
                f"{rank} differs from rank 0: {[t.name for t in answer]} and {[t.name for t in first]}. Build the "
                "object alike on all ranks."
            )
    for number, table in enumerate(first):
        spans = [(rank, span) for rank, own in enumerate(answers) if (span := own[number].buckets) is not None]
        for (a, before), (b, after) in pairwise(spans):
            if after[0] <= before[1]:
                raise CheckpointError(
                    f"Saver.save: part {part!r}, table {table.name!r}: each rank must hold rows of later buckets than "
                    f"the ranks before it, rank {a} has buckets {before[0]} to {before[1]}, rank {b} {after[0]} to "
                    f"{after[1]}. Shard the table by recis_hybrid.checkpointing.owned_buckets, or return it on one "
                    "rank only."
                )
