"""The command ``recis-hybrid``: hands each subcommand to its room."""

from __future__ import annotations

import difflib
import importlib
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

_PIPELINES, _SAVER = "recis_hybrid.app.commands", "recis_hybrid.saver.cli"
COMMANDS = {
    "train models without a script": {
        "init": (_PIPELINES, "write a configuration to start from, and a small log to run it on"),
        "train": (_PIPELINES, "train as a configuration says"),
        "evaluate": (_PIPELINES, "compute the metrics of a run on data"),
        "predict": (_PIPELINES, "write the scores of a run on data to a file"),
        "report": (_PIPELINES, "write the log of a run as one HTML page"),
    },
    "look into checkpoints": {
        "inspect": (_SAVER, "show the contents of a checkpoint: parts, tables, rows, bytes"),
        "verify": (_SAVER, "check every file of a checkpoint by its checksums"),
        "diff": (_SAVER, "show the differences of two checkpoints, bit for bit"),
    },
    "convert checkpoints": {
        "compact": (_SAVER, "turn an incremental checkpoint into a full one"),
        "export": (_SAVER, "write embeddings and towers for serving"),
        "import-recis": (_SAVER, "convert a checkpoint of RecIS"),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command line; None: that of the process.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    rooms = {name: room for group in COMMANDS.values() for name, (room, _) in group.items()}
    if given and given[0] == "help":
        given = [*given[1:2], "--help"]
    if given in ([], ["-h"], ["--help"]):
        print(_usage())
        sys.exit(0)
    if given in (["-V"], ["--version"], ["version"]):
        print(
            f"recis-hybrid {metadata.version('recis_hybrid')} (Python {platform.python_version()}, torch "
            f"{metadata.version('torch')})"
        )
        return 0
    if given[0] not in rooms:
        what = "option" if given[0].startswith("-") else "command"
        known = ["--help", "--version"] if what == "option" else list(rooms)
        bare = given[0].strip("-")
        close = [name for name in rooms if bare and name.startswith(bare)]
        close = close or difflib.get_close_matches(given[0], known, 1) or difflib.get_close_matches(bare, rooms, 1)
        meant = f"; did you mean `recis-hybrid {close[0]}`?" if close else "."
        print(f"recis-hybrid: there is no {what} {given[0]!r}{meant} There are: {', '.join(rooms)}", file=sys.stderr)
        sys.exit(2)
    # Import a package only when one of its commands runs.
    status: int = importlib.import_module(rooms[given[0]]).main(given)
    return status


def _usage() -> str:
    lines = ["usage: recis-hybrid COMMAND ...", ""]
    for title, commands in COMMANDS.items():
        lines += [f"{title}:", *(f"  {name:<14}{text}" for name, (_, text) in commands.items()), ""]
    return "\n".join([*lines, "`recis-hybrid COMMAND --help` explains a command, `--version` prints the version."])


if __name__ == "__main__":
    sys.exit(main())
