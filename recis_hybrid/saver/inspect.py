"""Contents of a checkpoint, and differences between two, as plain data and as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from recis_hybrid.checkpointing import PartState, TableState
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.format.manifest import Manifest, PartEntry
from recis_hybrid.saver.format.manifest_reader import part_files, table_files
from recis_hybrid.saver.parts.compare import state_differences
from recis_hybrid.saver.parts.frozen_weights import KEY


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return the contents of a manifest as JSON: parts, and tables with their rows, columns and bytes."""
    return {
        "step": manifest.step,
        "previous": None if manifest.previous is None else manifest.previous.step,
        "world_size": manifest.world_size,
        "bytes": sum(_part_bytes(part) for part in manifest.parts.values()),
        "parts": {name: _part_summary(part) for name, part in sorted(manifest.parts.items())},
        "meta": manifest.meta,
    }


def summary_text(found: dict[str, Any]) -> str:
    """Return a summary as text: a line for each part, and one for each of its tables."""
    lines = [
        f"step {found['step']}, written by {found['world_size']} process(es) at {found['meta'].get('wall_time', '?')}, "
        f"{size_text(found['bytes'])}"
    ]
    if found["previous"] is not None:
        lines.append(f"builds on step {found['previous']}: tables list the changes since then")
    for name, part in found["parts"].items():
        lines.append(f"{part['kind']:<10} {name}  {part['tensors']} tensors, {size_text(part['bytes'])}")
        for files in part["files"]:
            lines.append(f"  {files['tensors']} frozen tensors left out: {files['source']}, digest {files['digest']}")
        for table, rows in part["tables"].items():
            columns = ", ".join(f"{column} {spec}" for column, spec in rows["columns"].items())
            removed = "" if rows["removed"] is None else f" changed, {rows['removed']:,} removed"
            lines.append(f"  table {table}: {rows['rows']:,} rows{removed}, {size_text(rows['bytes'])}: {columns}")
    return "\n".join(lines)


def size_text(count: float) -> str:
    """Return a number of bytes as text, such as ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def differences(first: StoredCheckpoint, second: StoredCheckpoint, reading: Callable[[str], None]) -> list[str]:
    """Compare two checkpoints by content; steps, times and the split of tables into files are ignored.

    One part of each is in memory at a time.

    Args:
        first: One checkpoint.
        second: The other.
        reading: Called with the name of each part before it is read.

    Returns:
        One text per difference.
    """
    a, b = first.manifest, second.manifest
    found = []
    for name in sorted(a.parts.keys() | b.parts.keys()):
        if name not in a.parts or name not in b.parts:
            found.append(f"part {name!r} is in {'the first' if name in a.parts else 'the second'} only")
            continue
        reading(name)
        mine, theirs = first.read(name), second.read(name)
        found += [f"part {name!r}: {text}" for text in _differences(mine, theirs)]
    return found


def _differences(a: PartState, b: PartState) -> Iterator[str]:
    structural = state_differences(a, b)
    if structural:
        yield from (text.replace("checkpoint", "first").replace("live object", "second") for text in structural)
        return
    yield from _json_differences("meta", a.meta, b.meta)
    for name, tensor in sorted(a.tensors.items()):
        if not _equal(tensor, b.tensors[name]):
            yield f"tensor {name!r} differs"
    for name, table in sorted(a.tables.items()):
        yield from (f"table {name!r}: {text}" for text in _row_differences(table, b.tables[name]))


def _json_differences(where: str, a: Any, b: Any) -> Iterator[str]:
    """Compare JSON values down to the keys whose values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if key not in a or key not in b:
                yield f"{where}.{key} is in the {'first' if key in a else 'second'} only"
            else:
                yield from _json_differences(f"{where}.{key}", a[key], b[key])
    elif a != b or type(a) is not type(b):
        yield f"{where}: {json.dumps(a)} and {json.dumps(b)}"


def summarized(found: Sequence[str], lines: int = 20, width: int = 79) -> list[str]:
    """Shorten a list of differences to a screen of 80 columns and 24 lines.

    Args:
        found: Result of :func:`differences`.
        lines: Maximum number of lines.
        width: Maximum number of characters per line.

    Returns:
        The differences themselves if they are few; otherwise one line per kind and part.

    Example:
        >>> summarized([f"part 'model': tensor 'w{n}' differs" for n in range(100)])
        ["part 'model': 100 tensors differ: 'w0', 'w1', 'w2', 'w3', 'w4', 'w5', 'w6', …", '--all shows all']
    """
    shown = list(found)
    for kind in ("tensor", "meta", "table"):
        if len(shown) > lines:
            shown = _grouped(shown, kind, width)
    more = f" and {len(shown) - lines + 1} more" if len(shown) > lines else ""
    cut = [text if len(text) <= width else f"{text[: width - 1]}…" for text in shown[: lines - bool(more)]]
    return cut if cut == list(found) else [*cut, f"--all shows all{more and f', {more.strip()}'}"]


_NAMED = {
    "tensor": (re.compile(r"(part '.*?'): tensor ('.*?')"), "tensors"),
    "meta": (re.compile(r"(part '.*?'): meta\.(.*?)(?:: | is in the )"), "values of meta"),
    "table": (re.compile(r"(part '.*?'): table ('.*?')"), "tables"),
}


def _grouped(texts: Sequence[str], kind: str, width: int) -> list[str]:
    """Merge differences of one kind in a part, in the place of the first."""
    pattern, several = _NAMED[kind]
    groups: dict[str, list[tuple[str, str]]] = {}
    for text in texts:
        match = pattern.match(text)
        groups.setdefault(match[1] + "\n" if match else text, []).append((match[2] if match else "", text))
    result = []
    for part, members in groups.items():
        names = list(dict.fromkeys(name for name, _ in members))
        one = len(members) == 1
        result.append(members[0][1] if one else _list(f"{part.strip()}: {len(names)} {several} differ: ", names, width))
    return result


def _list(text: str, names: Sequence[str], width: int) -> str:
    for number, name in enumerate(names):
        if len(text) + len(name) + 3 > width:
            return f"{text}…"
        text += name if number == len(names) - 1 else f"{name}, "
    return text


def _row_differences(a: TableState, b: TableState) -> Iterator[str]:
    order_a, order_b = a.columns["ids"].argsort(), b.columns["ids"].argsort()
    ids_a, ids_b = a.columns["ids"][order_a], b.columns["ids"][order_b]
    in_b, in_a = torch.isin(ids_a, ids_b, assume_unique=True), torch.isin(ids_b, ids_a, assume_unique=True)
    for where, ids, common in (("first", ids_a, in_b), ("second", ids_b, in_a)):
        if not bool(common.all()):
            yield f"{int((~common).sum()):,} ids are in the {where} only, such as {ids[~common][:3].tolist()}"
    order_a, order_b = order_a[in_b], order_b[in_a]
    for name in a.columns:
        left, right = a.columns[name][order_a], b.columns[name][order_b]
        if not _equal(left, right):
            rows = (left != right).view(left.size(0), -1).any(1)
            yield f"{name} differs in {int(rows.sum()):,} of {left.size(0):,} common rows"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Bitwise: NaN equals itself, and 0.0 differs from -0.0.
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def left_out(part: PartEntry) -> list[dict[str, Any]]:
    """Return the files that have frozen parameters of a part, and how many (``parts.frozen_weights``)."""
    found: Any = part.meta.get(KEY, []) if part.kind == "module" else []
    return [{key: files[key] for key in ("source", "digest")} | {"tensors": len(files["tensors"])} for files in found]


def _part_summary(part: PartEntry) -> dict[str, Any]:
    return {
        "kind": part.kind,
        "tensors": len(part.tensors),
        "files": left_out(part),
        "bytes": _part_bytes(part),
        "tables": {
            name: {
                "rows": table.rows,
                "removed": None if table.removed is None else table.removed.rows,
                "bytes": sum(file.size for file in table_files(table)),
                "files": len(table.ranges),
                "columns": {column: str(spec) for column, spec in table.columns.items()},
                "meta": table.meta,
            }
            for name, table in sorted(part.tables.items())
        },
    }


def _part_bytes(part: PartEntry) -> int:
    return sum(file.size for file in part_files(part))
