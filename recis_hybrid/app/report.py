"""``recis-hybrid report``: the log of a run as one self-contained HTML page."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from recis_hybrid.app import svg
from recis_hybrid.pipelines.metrics_record import is_reserved
from recis_hybrid.saver import Location
from recis_hybrid.saver.storage.resolve import storage_of

PHASES = ("data", "features", "lookup", "exchange", "towers", "update")
TABLES = 12
"""Number of tables with a chart, the largest ones."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --dim: #667080; --paper: #f5f6f8; --card: #fff; --line: #dfe3e8;
  --c0: #2f6fde; --c1: #d9762b; --c2: #2a9d6f; --c3: #b4489a; --c4: #8a6fd1; --c5: #b8941f; --c6: #3aa3b8;
  --c7: #c2504d }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --dim: #98a2b1; --paper: #14171c; --card: #1d2128;
  --line: #333a45; --c0: #6ea0f5; --c1: #f0a062; --c2: #58c99a; --c3: #df84c8; --c4: #b39ef0; --c5: #dcbd54;
  --c6: #6fcbdd; --c7: #ea8683 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 22px; margin: 0 0 2px } h2 { font-size: 15px; margin: 0 0 8px } p { margin: 0 }
.dim { color: var(--dim) }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px }
.tiles b { display: block; font-size: 20px; font-variant-numeric: tabular-nums }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; min-width: 0 }
section.wide { grid-column: 1 / -1; overflow-x: auto }
svg { display: block; width: 100%; height: auto }
.tick { fill: var(--dim); font-size: 11px } .grid { stroke: var(--line) }
polyline { fill: none; stroke-width: 1.8 } .legend { font-size: 13px; margin-top: 6px }
.legend span { margin-right: 14px; white-space: nowrap }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { text-align: right; padding: 4px 12px; border-bottom: 1px solid var(--line) }
th { color: var(--dim); font-weight: 500 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
""" + "".join(
    f"polyline.c{n} {{ stroke: var(--c{n}) }} circle.c{n}, polygon.c{n}, rect.c{n} {{ fill: var(--c{n}) }} "
    f"i.c{n} {{ background: var(--c{n}) }}\n"
    for n in range(svg.COLORS)
)


def write_report(run: str | os.PathLike[str], out: Path | None = None) -> Path:
    """Write the log of a run as a page: curves, growth of tables, breakdown of time, frequencies of ids.

    Args:
        run: Folder or URL with ``log.jsonl``, as written by JsonLog.
        out: Path of the page. None uses ``report.html`` in the folder.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: There is no log, or no folder for the page.
        ValueError: The log is empty, or the run is at a URL and ``out`` is None.
    """
    folder = Path(run) if "://" not in str(run) else storage_of(run).root
    log = folder / "log.jsonl"
    if not log.is_file():
        raise FileNotFoundError(_no_log(folder, log))
    records = []
    for line in log.read_bytes().decode().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # truncated by a crash
    if not records:
        raise ValueError(f"{log}: the log is empty; train first")
    if out is None and not isinstance(folder, Path):
        raise ValueError(f"{run} is not a local folder; name the page with --out")
    out = out or Path(run) / "report.html"
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; create it first")
    out.write_text(_page(folder.absolute().name, records))
    return out


def _no_log(run: Location, log: Location) -> str:
    if not isinstance(run, Path) or not run.exists():
        return f"{log}: there is no folder {run}; name the folder of a run"
    if not run.is_dir():
        return f"{run}: must be the folder of a run, which contains log.jsonl, but is a file"
    below = sorted(path.parent for path in run.glob("*/log.jsonl"))
    hint = f"; did you mean {below[0]}?" if below else ": it is not a run, or its training has not started"
    return f"{log}: {run} has no log{hint}"


def _page(name: str, records: Sequence[dict[str, Any]]) -> str:
    train = [record for record in records if record["event"] == "train"]
    evaluations = [record for record in records if record["event"] == "eval"]
    charts = [
        ("Loss", svg.lines(_series(train, [n for n in _names(train) if n == "loss" or n.startswith("loss/")]))),
        *((title, svg.lines(series)) for title, series in _metrics(evaluations)),
        ("Samples/s", svg.lines(_series(train, ["samples_per_s"]), from_zero=True)),
        ("Time of a step", _time_split(train)),
        ("Rows of tables", svg.lines(_series(train, _names(train, "rows/"), prefix="rows/"), from_zero=True)),
        (
            "Rows admitted and evicted since the previous log entry",
            svg.lines(_series(train, ["admitted", "evicted"]), from_zero=True),
        ),
        (
            "Memory",
            svg.lines(_series(train, _names(train, "memory/"), prefix="memory/"), y_format=_bytes, from_zero=True),
        ),
        ("Learning rate", svg.lines(_series(train, _names(train, "lr/"), prefix="lr/"), from_zero=True)),
        ("Gradient norm", svg.lines(_series(train, ["grad_norm"]), from_zero=True)),
        ("Weights of objectives", svg.lines(_series(train, _names(train, "weight/"), prefix="weight/"))),
        *((name, svg.lines(_series(train, [name]))) for name in _names(train) if not is_reserved(name)),
        *_frequencies(records),
    ]
    cards = [f"<section><h2>{escape(title)}</h2>{chart}</section>" for title, chart in charts if chart]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f'<h1>{escape(name)}</h1><p class="dim">{_subtitle(records)}</p>'
        f'<div class="tiles">{_tiles(train, evaluations)}</div>'
        f"<main>{''.join(cards)}{_evaluations(evaluations)}</main></body></html>\n"
    )


def _subtitle(records: Sequence[dict[str, Any]]) -> str:
    last = records[-1]
    stopped = [record["reason"] for record in records if record["event"] == "stop"]
    saves = sum(record["event"] == "save" for record in records)
    parts = [f"{last['step']:,} steps", f"{saves} checkpoints"]
    parts += [
        f"{escape(key)} from {escape(_shown(old))} to {escape(_shown(new))} at step {record['step']:,}"
        for record in records
        if record["event"] == "config"
        for key, (old, new) in record["changes"].items()
    ]
    parts += [f"stopped: {escape(reason)}" for reason in stopped]
    return ", ".join(parts)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tiles(train: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> str:
    tiles: list[tuple[str, str]] = []
    if train:
        last = train[-1]
        rows = sum(value for name, value in last.items() if name.startswith("rows/"))
        rates = sorted(record["samples_per_s"] for record in train)
        tiles += [
            ("loss", f"{last['loss']:.4f}" if last["loss"] is not None else "NaN"),
            ("samples", svg.short(last["samples"])),
            ("samples/s, median", svg.short(rates[len(rates) // 2])),
            ("rows in tables", svg.short(rows)),
        ]
    latest: dict[str, Any] = {}
    for record in evaluations:
        latest |= {name: value for name, value in record.items() if name.startswith(f"{record['name']}/")}
    tiles += [(name, "NaN" if value is None else f"{value:.5f}") for name, value in latest.items()]
    return "".join(f'<div><b>{escape(value)}</b><span class="dim">{escape(name)}</span></div>' for name, value in tiles)


def _names(records: Iterable[dict[str, Any]], prefix: str = "") -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record if name.startswith(prefix)))


def _series(records: Sequence[dict[str, Any]], names: Sequence[str], prefix: str = "") -> dict[str, svg.Points]:
    series = {name: [(r["step"], r[name]) for r in records if name in r] for name in names}
    return {name.removeprefix(prefix): points for name, points in series.items() if points}


def _metrics(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, svg.Points]]]:
    """Return a chart per metric, with a line per evaluation stage that computes it."""
    charts: dict[str, dict[str, list[tuple[float, float | None]]]] = defaultdict(lambda: defaultdict(list))
    for record in evaluations:
        stage = record["name"]
        for name, value in record.items():
            if name.startswith(f"{stage}/"):
                charts[name.removeprefix(f"{stage}/")][stage].append((record["step"], value))
    return [(name, dict(series)) for name, series in charts.items()]


def _time_split(train: Sequence[dict[str, Any]]) -> str:
    measured = [record for record in train if "time/towers" in record or "time/update" in record]
    present = [phase for phase in PHASES if any(record.get(f"time/{phase}") for record in measured)]
    series = {phase: [record.get(f"time/{phase}") or 0.0 for record in measured] for phase in present}
    return svg.stacked(series, [record["step"] for record in measured], y_format=lambda s: f"{s * 1000:.4g} ms")


def _frequencies(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    tables = [record["tables"] for record in records if record["event"] == "tables"]
    if not tables:
        return []
    largest = sorted(tables[-1].items(), key=lambda item: -item[1]["rows"])[:TABLES]
    charts = []
    for name, table in largest:
        counts = {_frequency_label(level): count for level, count in enumerate(table["frequency"])}
        charts.append((f"{name}: {table['rows']:,} ids by frequency", svg.bars(counts, unit="ids")))
    return charts


def _frequency_label(level: int) -> str:
    return "1" if level == 0 else f"{2**level}+"


def _evaluations(evaluations: Sequence[dict[str, Any]]) -> str:
    if not evaluations:
        return ""
    names = list(
        dict.fromkeys(
            name.removeprefix(f"{record['name']}/")
            for record in evaluations
            for name in record
            if name.startswith(f"{record['name']}/")
        )
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in ("evaluation", "step", *names))
    rows = []
    for record in evaluations:
        values = [record.get(f"{record['name']}/{name}") for name in names]
        cells = [escape(record["name"]), f"{record['step']:,}", *("" if v is None else f"{v:.5f}" for v in values)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        f'<section class="wide"><h2>Evaluations</h2><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )


def _bytes(value: float) -> str:
    for bound, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= bound:
            return f"{value / bound:.4g} {unit}"
    return f"{value:.4g} B"
