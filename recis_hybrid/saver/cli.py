"""The subcommands of ``recis-hybrid`` that inspect, verify, compare, compact and export checkpoints.

Exit status: 0 on success, 1 if a checkpoint is damaged, differs or cannot be written, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from recis_hybrid.saver.actions.recis_import import import_recis
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint, open_checkpoint
from recis_hybrid.saver.compact import compact
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.export import EXPORT_DTYPES, export
from recis_hybrid.saver.format.location import Location
from recis_hybrid.saver.inspect import differences, left_out, size_text, summarized, summary, summary_text
from recis_hybrid.saver.storage.step_directory import STEP


class Parser(argparse.ArgumentParser):
    """An argument parser of one subcommand whose errors list the valid options.

    Args:
        command: Name of the subcommand.
        about: Summary in the imperative, beginning with a small letter.
        options: Further arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, command: str, about: str, **options: Any) -> None:
        super().__init__(
            f"recis-hybrid {command}", description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False, **options
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of the subcommand; options may appear between positional arguments."""
        return self.parse_intermixed_args(list(arguments))

    def error(self, message: str) -> NoReturn:
        """Exit with status 2; list the valid options if some are unknown."""
        options = [each for each in self._option_string_actions if each.startswith("--")]
        if message.startswith("unrecognized arguments: "):
            given = message.partition(": ")[2].split()[0]
            close = difflib.get_close_matches(given.partition("=")[0], options, 1)
            meant = f"; did you mean {close[0]}?" if close else "."
            message = f"{message}{meant} Options are {', '.join(options)}"
        self.exit(2, f"{self.format_usage()}{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: Arguments of the command line; None takes those of the process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsers = _parsers()
    if not words or words[0] not in parsers:
        print(f"recis-hybrid: the first argument must be one of {', '.join(parsers)}, got {words[:1]}", file=sys.stderr)
        sys.exit(2)
    args = parsers[words[0]].parse(words[1:])
    try:
        status: int = args.run(args)
    except (CheckpointError, OSError) as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"recis-hybrid: {error}", file=sys.stderr)
        return 1
    return status


def _parsers() -> dict[str, Parser]:
    parsers: dict[str, Parser] = {}
    for name, run, paths, about in (
        ("inspect", _inspect, ["path"], "show what a checkpoint holds: parts, tables, rows, columns, bytes"),
        (
            "verify",
            _verify,
            ["path"],
            "verify the sizes, checksums, headers and row order of all files",
        ),
        (
            "diff",
            _diff,
            ["first", "second"],
            "show the differences of two checkpoints, bit for bit, whatever their steps; exit with 1 if any",
        ),
        (
            "compact",
            _compact,
            ["path"],
            "merge an incremental checkpoint with those it builds on into a full one",
        ),
        ("import-recis", _import_recis, [], "convert a checkpoint of RecIS"),
        ("export", _export, ["path"], "write ids, embeddings and towers for serving, without optimizer state"),
    ):
        parsers[name] = command = Parser(name, about)
        for path in paths:
            command.add_argument(path, help="directory or URL of a run (its latest checkpoint), or a step_… in it")
        if len(paths) == 1:
            command.add_argument("--step", type=int, help="step of the checkpoint, if PATH is a run")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=run)
    parsers["diff"].add_argument("--all", action="store_true", help="print every difference in full")
    parsers["compact"].add_argument("--to", help="directory or URL to write to (default: replace the checkpoint)")
    parsers["import-recis"].add_argument("source", type=Path, help="folder of the RecIS checkpoint, with its index")
    parsers["import-recis"].add_argument("out", help="directory or URL to write to, as step_…")
    parsers["import-recis"].add_argument("--step", type=int, default=0, help="step of the new checkpoint (0)")
    parsers["import-recis"].add_argument(
        "--adam-step", type=int, metavar="N", help="steps of the sparse optimizer (default: as saved)"
    )
    parsers["import-recis"].add_argument("--tables-only", action="store_true", help="skip the towers")
    parsers["import-recis"].add_argument(
        "--slot",
        action="append",
        default=[],
        metavar="SLOT=STATE",
        help="optimizer slot in RecIS, and its state here",
    )
    parsers["export"].add_argument("out", help="directory or URL to write to, as step_…")
    parsers["export"].add_argument(
        "--dtype",
        choices=EXPORT_DTYPES,
        help="dtype of the embeddings; int8 and int4 scale each row (default: unchanged)",
    )
    return parsers


def _inspect(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(args.path, args.step)
    found = summary(checkpoint.manifest)
    path = checkpoint.directory
    print(json.dumps({"path": str(path), **found}) if args.json else f"{path}\n{summary_text(found)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(args.path, args.step)
    path, parts = checkpoint.directory, checkpoint.manifest.parts
    for name in parts:
        _progress(f"{path}: part {name}")
        checkpoint.verify(name)
    size, step = summary(checkpoint.manifest)["bytes"], checkpoint.manifest.step
    sound: dict[str, Any] = {"path": str(path), "step": step, "bytes": size, "sound": True}
    print(json.dumps(sound) if args.json else f"{path}: sound, {len(parts)} parts, {size_text(size)}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    first, second = open_checkpoint(args.first), open_checkpoint(args.second)
    found = differences(first, second, lambda name: _progress(f"part {name}"))
    a, b = str(first.directory), str(second.directory)
    if args.json:
        print(json.dumps({"first": a, "second": b, "differences": found}))
    else:
        shown = found if args.all else summarized(found)
        print("\n".join(shown) if found else f"{a} and {b} are equal")
    return 1 if found else 0


def _compact(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(args.path, args.step)
    return _report(args, compact(checkpoint, args.to), "is a full checkpoint")


def _export(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(args.path, args.step)
    notes = [
        f"part {name!r} lacks {files['tensors']} frozen tensors, which are in {files['source']}"
        for name, part in checkpoint.manifest.parts.items()
        for files in left_out(part)
    ]
    return _report(args, export(checkpoint, args.out, args.dtype), "is written", notes)


def _import_recis(args: argparse.Namespace) -> int:
    slots = dict(slot.split("=", 1) if "=" in slot else (slot, slot) for slot in args.slot)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        path = import_recis(
            args.source, args.out, args.step, slots=slots, adam_step=args.adam_step, tables_only=args.tables_only
        )
    return _report(args, path, "is written", [str(note.message) for note in notes])


def _report(args: argparse.Namespace, path: Location, what: str, notes: Sequence[str] = ()) -> int:
    step = STEP.fullmatch(path.name)
    assert step is not None
    found = summary(StoredCheckpoint(path.parent, int(step[1])).manifest)
    if args.json:
        extra = {"notes": list(notes)} if notes else {}
        print(json.dumps({"path": str(path), "step": found["step"], "bytes": found["bytes"], **extra}))
    else:
        print(f"{path} {what}, {size_text(found['bytes'])}")
        for note in notes:
            print(f"recis-hybrid: {note}", file=sys.stderr)
    return 0


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
