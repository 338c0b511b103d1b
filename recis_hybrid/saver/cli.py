"""The command `recis-hybrid`: looks at checkpoints, checks them and compares them.

Exit status: 0 if all is well, 1 if a checkpoint is damaged or differs, 2 for a wrong call.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recis_hybrid.saver.directory import STEP, read_manifest
from recis_hybrid.saver.errors import CheckpointError
from recis_hybrid.saver.manifest import Manifest
from recis_hybrid.saver.part_files import read_part, verify_part
from recis_hybrid.saver.saver import Saver
from recis_hybrid.saver.show import differences, size_text, summary, summary_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None takes the process's.

    Returns:
        The exit status.
    """
    args = _parser().parse_args(arguments)
    try:
        status: int = args.run(args)
    except (CheckpointError, OSError) as error:
        if args.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"recis-hybrid: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("recis-hybrid", description="Looks at checkpoints, checks them and compares them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, paths, about in (
        ("inspect", _inspect, ["path"], "what a checkpoint holds: parts, tables, rows, columns, bytes"),
        ("verify", _verify, ["path"], "whether every file is as it was written: sizes, checksums, headers, row order"),
        ("diff", _diff, ["first", "second"], "in what two checkpoints differ, bit for bit, whatever their steps"),
    ):
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        for path in paths:
            command.add_argument(
                path, type=Path, help="a run's directory, of which the latest checkpoint is taken, or a step_…"
            )
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=run)
    return parser


def _open(path: Path) -> tuple[Path, Manifest]:
    """Find a checkpoint and read its manifest."""
    match = STEP.fullmatch(path.absolute().name)
    if match is None:
        saver = Saver(path)
        latest = saver.latest()
        if latest is None:
            raise CheckpointError(f"{path} holds no complete checkpoint. Name a run's directory, or a step_… in it.")
        return _open(path / f"step_{latest:06d}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory. Name a run's directory, or a step_… in it.")
    return path, read_manifest(path, int(match[1]))


def _inspect(args: argparse.Namespace) -> int:
    path, manifest = _open(args.path)
    found = summary(manifest)
    print(json.dumps({"path": str(path), **found}) if args.json else f"{path}\n{summary_text(found)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    path, manifest = _open(args.path)
    for name, part in manifest.parts.items():
        _progress(f"{path}: part {name}")
        verify_part(path, name, part)
        read_part(path, name, part)
    size = summary(manifest)["bytes"]
    sound: dict[str, Any] = {"path": str(path), "step": manifest.step, "bytes": size, "sound": True}
    print(json.dumps(sound) if args.json else f"{path}: sound, {len(manifest.parts)} parts, {size_text(size)}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    first, second = _open(args.first), _open(args.second)
    found = differences(first, second, lambda name: _progress(f"part {name}"))
    if args.json:
        print(json.dumps({"first": str(first[0]), "second": str(second[0]), "differences": found}))
    else:
        print("\n".join(found) if found else f"{first[0]} and {second[0]} hold the same")
    return 1 if found else 0


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
