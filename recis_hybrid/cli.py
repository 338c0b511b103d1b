"""The command `recis-hybrid`: hands each subcommand to its room."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """\
usage: recis-hybrid COMMAND ...   (each takes --help)

train models without a script:
  init      write a configuration to begin with, and a small log that it runs on
  train     train what a configuration says
  report    make one HTML page of the log of a run

look at checkpoints:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Of the command line; None takes the process's.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A room is loaded when one of its commands is asked for.
    if given and given[0] in ("init", "train", "report"):
        from recis_hybrid.pipelines.cli import main as of_pipelines

        return of_pipelines(given)
    from recis_hybrid.saver.cli import main as of_saver

    if given in ([], ["-h"], ["--help"]):
        print(USAGE, flush=True)
        return of_saver(["--help"])
    return of_saver(given)


if __name__ == "__main__":
    sys.exit(main())
