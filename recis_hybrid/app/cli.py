"""The command ``recis-hybrid``, which dispatches subcommands to packages."""

from __future__ import annotations

import difflib
import importlib
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

_APP, _SAVER = "recis_hybrid.app.commands", "recis_hybrid.saver.cli"
COMMANDS = {
    "train models without a script": {
        "init": (_APP, "write a starter configuration and a small click log to run it on"),
        "train": (_APP, "train a model from a configuration"),
        "evaluate": (_APP, "evaluate a trained model on data"),
        "predict": (_APP, "write the scores of a trained model to a file"),
        "report": (_APP, "write the log of a run as one HTML page"),
        "plan": (_APP, "estimate memory and traffic of a configuration without training"),
    },
    "inspect checkpoints": {
        "inspect": (_SAVER, "show the contents of a checkpoint: parts, tables, rows, bytes"),
        "verify": (_SAVER, "check every file of a checkpoint by its checksums"),
        "diff": (_SAVER, "show the bitwise differences between two checkpoints"),
    },
    "convert checkpoints": {
        "compact": (_SAVER, "turn an incremental checkpoint into a full one"),
        "export": ("recis_hybrid.app.export", "write a run for serving: a bundle, or its tables and towers"),
        "import-recis": (_SAVER, "convert a checkpoint of RecIS"),
    },
    "serve": {
        "serve": ("recis_hybrid.serving.server.cli", "answer requests with a bundle over HTTP"),
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command-line arguments. None uses ``sys.argv``.

    Returns:
        The exit status.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    modules = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
    if args and args[0] == "help":
        args = [*args[1:2], "--help"]
    if args in ([], ["-h"], ["--help"]):
        print(_usage())
        sys.exit(0)
    if args in (["-V"], ["--version"], ["version"]):
        print(
            f"recis-hybrid {metadata.version('recis_hybrid')} (Python {platform.python_version()}, torch "
            f"{metadata.version('torch')})"
        )
        return 0
    if args[0] not in modules:
        kind = "option" if args[0].startswith("-") else "command"
        known = ["--help", "--version"] if kind == "option" else list(modules)
        bare = args[0].strip("-")
        close = [name for name in modules if bare and name.startswith(bare)]
        close = close or difflib.get_close_matches(args[0], known, 1) or difflib.get_close_matches(bare, modules, 1)
        hint = f"; did you mean `recis-hybrid {close[0]}`?" if close else "."
        print(f"recis-hybrid: unknown {kind} {args[0]!r}{hint} Commands are: {', '.join(modules)}", file=sys.stderr)
        sys.exit(2)
    # Import a package only when one of its commands runs.
    status: int = importlib.import_module(modules[args[0]]).main(args)
    return status


def _usage() -> str:
    lines = ["usage: recis-hybrid COMMAND ...", ""]
    for title, commands in COMMANDS.items():
        lines += [f"{title}:", *(f"  {name:<14}{text}" for name, (_, text) in commands.items()), ""]
    return "\n".join([*lines, "`recis-hybrid COMMAND --help` explains a command, `--version` prints the version."])


if __name__ == "__main__":
    sys.exit(main())
