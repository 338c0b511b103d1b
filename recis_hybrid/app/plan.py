"""``recis-hybrid plan``: the memory of a configuration's tables, and the bytes that ranks send in a step."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recis_hybrid.app.build import SPARSE, embeddings_of
from recis_hybrid.app.config import Config, ConfigError, load_config
from recis_hybrid.embedding import RankEstimate, TableEstimate, plan
from recis_hybrid.saver.cli import Parser

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_PARTS = {
    "id map": "id_map",
    "embedding": "embedding",
    "state": "optimizer_state",
    "metadata": "metadata",
    "padding": "padding",
    "spare": "spare",
    "admission": "admission",
    "total": "total",
}
"""Parts of the memory by heading."""
_PARTS_ON_DISK = {"cache": "cache", "locations": "locations", "file": "disk", "while saving": "disk_of_save"}
"""Parts of tables on disk by heading: memory, which is in the total, and bytes of the disk."""


def plan_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "plan",
        "estimate the memory of the tables, and the bytes that ranks send in a step, without training",
        epilog="Numbers may have a unit: 250k, 1.5M, 2G (powers of 1000). Example: recis-hybrid plan config.yaml "
        "--rows item=50M,user=200M --ranks 8 --ids history=40 --distinct 0.4",
    )
    parser.add_argument("config", type=Path, help="the configuration, a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="set a key of the configuration")
    parser.add_argument(
        "--rows", action="append", required=True, metavar="TABLE=N,...", help="rows of each table, over all ranks"
    )
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks (1)")
    parser.add_argument(
        "--ids", action="append", default=[], metavar="FEATURE=N,...", help="mean number of ids of a sample (1)"
    )
    parser.add_argument(
        "--distinct", type=float, default=1.0, help="distinct ids of a batch as a share of its ids (1.0, the most)"
    )
    parser.add_argument(
        "--rejected", action="append", default=[], metavar="TABLE=N,...", help="ids that min_frequency holds back (0)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run_plan(args: argparse.Namespace) -> int:
    """Print the estimate; return the exit status."""
    config = load_config(args.config, args.overrides)
    ranks = estimate(config, args)
    if args.json:
        print(json.dumps([_values(rank) for rank in ranks]))
    else:
        print(_text(config, ranks))
    return 0


def estimate(config: Config, args: argparse.Namespace) -> list[RankEstimate]:
    """Return the estimate of each rank.

    Raises:
        ConfigError: A table or feature is unknown, the rows of a table are missing, or a number is out of range.
    """
    rows, rejected = _whole("--rows", args.rows), _whole("--rejected", args.rejected)
    try:
        return plan(
            embeddings_of(config),
            rows=rows,
            rejected=rejected,
            ids=_numbers("--ids", args.ids),
            samples=config.data.batch_size,
            distinct=args.distinct,
            ranks=args.ranks,
            optimizer=SPARSE[config.optimizer.sparse],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _whole(option: str, texts: Sequence[str]) -> dict[str, int]:
    return {name: round(number) for name, number in _numbers(option, texts).items()}


def _numbers(option: str, texts: Sequence[str]) -> dict[str, float]:
    """Return the numbers of an option ``NAME=N,NAME=N`` by name."""
    numbers: dict[str, float] = {}
    for text in ",".join(texts).split(",") if texts else ():
        name, _, number = text.rpartition("=")
        match = re.fullmatch(r"([0-9_]+(?:\.[0-9]+)?(?:e[0-9]+)?)([kMG]?)", number)
        if not name or match is None:
            raise ConfigError(f"plan: {option} must be NAME=NUMBER, such as item=50M, got {text!r}")
        if name in numbers:
            raise ConfigError(f"plan: {option} has {name!r} twice")
        numbers[name] = float(match[1]) * _UNITS[match[2]]
    return numbers


def _values(rank: RankEstimate) -> dict[str, Any]:
    tables = [
        {"members": list(t.members), "sharding": t.sharding, "rows": t.rows, "memory": t.memory, "wire": t.wire}
        for t in rank.tables
    ]
    return {"rank": rank.rank, "memory": rank.memory, "wire": rank.wire, "tables": tables}


def _text(config: Config, ranks: Sequence[RankEstimate]) -> str:
    """Return the estimates as a text table; ranks with equal numbers are shown once."""
    groups: dict[str, list[RankEstimate]] = {}
    for rank in ranks:
        groups.setdefault(json.dumps({**_values(rank), "rank": None}), []).append(rank)
    lines = []
    for group in groups.values():
        numbers = ", ".join(str(rank.rank) for rank in group)
        title = f"rank {numbers}" if len(group) == 1 else f"each of the ranks {numbers}"
        title = "one process" if len(ranks) == 1 else title
        lines += [f"{title}, batches of {config.data.batch_size:,} samples", "", *_memory_lines(group[0])]
        if len(ranks) > 1:
            lines += ["", *_wire_lines(group[0])]
        lines.append("")
    total = sum(rank.memory["total"] for rank in ranks)
    return "\n".join([*lines, f"all ranks: {_size(total)}; pending gradients and batches are not counted"])


def _memory_lines(rank: RankEstimate) -> list[str]:
    lines = _part_lines("memory of", _PARTS, rank, rank.tables)
    if on_disk := [table for table in rank.tables if table.memory["disk"]]:
        lines += ["", *_part_lines("on disk, with a cache", _PARTS_ON_DISK, rank, on_disk)]
    return lines


def _part_lines(title: str, parts: Mapping[str, str], rank: RankEstimate, tables: Sequence[TableEstimate]) -> list[str]:
    def line(name: str, rows: int, memory: Mapping[str, int]) -> str:
        return _line(name, f"{rows:,}", [_size(memory[part]) for part in parts.values()])

    lines = [line(_name(table), table.rows, table.memory) for table in tables]
    total = line("all tables", sum(table.rows for table in tables), rank.memory)
    return [_line(title, "rows", list(parts)), *lines, total]


def _wire_lines(rank: RankEstimate) -> list[str]:
    kinds = [kind for kind in rank.wire if kind != "total"]
    lines = [_line("sent in a step by", "sharding", [*kinds, "total"])]
    for table in rank.tables:
        sent = [_size(table.wire[kind]) if kind in table.wire else "" for kind in kinds]
        lines.append(_line(_name(table), table.sharding, [*sent, _size(sum(table.wire.values()))]))
    return [*lines, _line("all tables", "", [_size(count) for count in rank.wire.values()])]


def _line(name: str, what: str, cells: Sequence[str]) -> str:
    return f"{name:<22}{what:>14}" + "".join(f"{cell:>13}" for cell in cells)


def _name(table: TableEstimate) -> str:
    first, *others = table.members
    return f"{first} and {len(others)} more" if others else first


def _size(count: int) -> str:
    if count == 0:
        return "0"
    power = min(int(math.log2(count)) // 10, 4)
    return f"{count:,} B" if power == 0 else f"{count / 1024**power:,.1f} {'KMGT'[power - 1]}iB"
